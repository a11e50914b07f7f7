"""Faults with what others put into a model: passed over, called twice, or drawing other numbers."""

from functools import partial

from tests.mutants import Mutant

_output = partial(Mutant, file="model/output.py")
_modules = partial(Mutant, file="model/modules.py")
_block = partial(Mutant, file="model/block.py")
_redrawing = partial(Mutant, file="model/redrawing.py")
_pretrained = partial(Mutant, file="model/pretrained.py")
_reversible = partial(Mutant, file="model/reversible.py")

MUTANTS = [
    _output(
        what="the bias of a head is left out of the loss",
        original="linear_bias=head.bias",
        replacement="linear_bias=None",
    ),
    _output(
        what="every head with a weight is plain",
        original="    return type(head) in PLAIN and",
        replacement="    return hasattr(head, 'weight') and",
    ),
    _output(
        what="subclasses are plain",
        original="type(head) in PLAIN and",
        replacement="isinstance(head, PLAIN) and",
    ),
    _output(
        what="hooks of a head are passed over",
        original="(not is_hooked(head) or",
        replacement="(True or",
    ),
    _output(
        what="a weight that a hook makes is not made",
        original='hasattr(head.weight, "placements")',
        replacement="type(head.weight) is not nn.Parameter",
    ),
    _output(
        what="options reach the plain heads alone",
        original="cross_entropy(x_BLV.flatten(0, -2), targets_BL.flatten(), **options)",
        replacement="cross_entropy(x_BLV.flatten(0, -2), targets_BL.flatten())",
    ),
    _output(
        what="logits of the loss are not bounded",
        original="x_BLV = logits(head, h_BLD, softcap)",
        replacement="x_BLV = logits(head, h_BLD, None)",
    ),
    Mutant(
        what="a head needs a weight to be moved",
        file="model/transformer.py",
        original='getattr(self.head, "weight", None) is',
        replacement="self.head.weight is",
    ),
    _modules(
        what="hooks before a module are none",
        original="module._forward_pre_hooks or module._forward_hooks",
        replacement="module._forward_hooks",
    ),
    _modules(
        what="hooks behind a module are none",
        original="module._forward_pre_hooks or module._forward_hooks",
        replacement="module._forward_pre_hooks",
    ),
    _modules(
        what="hooks of gradients are none",
        original="or module._backward_pre_hooks or module._backward_hooks",
        replacement="",
    ),
    _modules(
        what="a forward of its own is none",
        original='or "forward" in vars(module)',
        replacement="",
    ),
    _modules(
        what="the forward of a subclass is passed over",
        original='cls._fuses = "_fused" in vars(cls)',
        replacement="cls._fuses = True",
    ),
    _modules(
        what="hooks of a norm are passed over",
        original="if not self._fuses or is_hooked(self):",
        replacement="if not self._fuses:",
    ),
    _modules(
        what="a norm that is called loses what is added",
        original="residual = (residual + x).to(residual.dtype)",
        replacement="residual = x.to(residual.dtype)",
    ),
    _block(
        what="queries' and keys' norms of others are passed over",
        original="return norm is None or (usual and not is_hooked(norm))",
        replacement="return True",
    ),
    _block(
        what="hooks of queries' and keys' norms are passed over",
        original="(usual and not is_hooked(norm))",
        replacement="usual",
    ),
    _block(
        what="another epsilon of queries and keys is passed over",
        original="and norm.eps == self.norm_eps",
        replacement="",
    ),
    _block(
        what="heads of norms of others are not turned",
        original="            if self.rotates:\n",
        replacement="            if False:\n",
    ),
    _pretrained(
        what="a changed model is written",
        original="        if want != got:",
        replacement="        if False:",
    ),
    _pretrained(
        what="what is more than the config's is left out",
        original="for name in (*wanted, *(name for name in found if name not in wanted)):",
        replacement="for name in wanted:",
    ),
    _pretrained(
        what="parameters are not looked at",
        original="return modules | parameters",
        replacement="return modules",
    ),
    _pretrained(
        what="modules are not looked at",
        original="return modules | parameters",
        replacement="return parameters",
    ),
    _pretrained(
        what="sizes of modules are not looked at",
        original='{_kind(type(x))}({x.extra_repr()})"',
        replacement='{_kind(type(x))}()"',
    ),
    _pretrained(
        what="classes of others pass for torch's",
        original='if not kind.__module__.startswith(("tritium.model.", "torch.nn.modules.")):',
        replacement="if False:",
    ),
    _pretrained(
        what="layers of torch are others than Tritium's",
        original="return (kind if base is nn.Module else base).__name__",
        replacement="return kind.__name__",
    ),
    _pretrained(
        what="any tokenizer is taken",
        original="if tokenizer is not None and not isinstance(tokenizer, SavedTokenizer):",
        replacement="if False:",
    ),
    Mutant(
        what="an embedding of torch is asked for a dtype",
        file="model/transformer.py",
        original="isinstance(self.embedding, Embedding)",
        replacement="True",
    ),
    _redrawing(
        what="no module draws",
        original="return kind.__module__.startswith(DRAW_NONE)",
        replacement="return True",
    ),
    _redrawing(
        what="every module draws",
        original="return kind.__module__.startswith(DRAW_NONE)",
        replacement="return False",
    ),
    _redrawing(
        what="no hook draws",
        original="or is_hooked(part)",
        replacement="",
    ),
    _redrawing(
        what="other numbers are drawn again",
        original="torch.set_rng_state(state)",
        replacement="torch.manual_seed(0)",
    ),
    _redrawing(
        what="the generators stay where the repetition leaves them",
        original="with torch.random.fork_rng(devices):",
        replacement="if True:",
    ),
    Mutant(
        what="a recomputed block draws anew",
        file="model/activation_checkpointing.py",
        original="draws = draws or (not torch.compiler.is_compiling() and may_draw(block))",
        replacement="pass",
    ),
    _reversible(
        what="a reconstructed half draws anew",
        original="with trail.cast(), ctx.replay():",
        replacement="with trail.cast():",
    ),
]

"""Faults of the reversible stack: other streams, other random numbers, gradients that get lost."""

from functools import partial

from tests.mutants import Mutant

_reversible = partial(Mutant, file="model/reversible.py")
_model = partial(Mutant, file="model/transformer.py")

MUTANTS = [
    _reversible(
        what="the streams change places once too often",
        original="        a_BLD, b_BLD = b_BLD, c_BLD\n",
        replacement="        a_BLD, b_BLD = c_BLD, b_BLD\n",
    ),
    _reversible(
        what="one stream leaves",
        original="    return a_BLD + b_BLD\n",
        replacement="    return b_BLD\n",
    ),
    _reversible(
        what="added instead of subtracted on the way down",
        original="a_BLD = c_BLD - added_BLD.detach()",
        replacement="a_BLD = c_BLD + added_BLD.detach()",
    ),
    _reversible(
        what="the stream above is handed down",
        original="trail.streams = (a_BLD, b_BLD.detach())",
        replacement="trail.streams = (c_BLD, b_BLD.detach())",
    ),
    _reversible(
        what="no gradient of the stream that is carried along",
        original="return None, None, None, dc_BLD, db_BLD, *dweights",
        replacement="return None, None, None, None, db_BLD, *dweights",
    ),
    _reversible(
        what="no gradient of the stream that is read",
        original="return None, None, None, dc_BLD, db_BLD, *dweights",
        replacement="return None, None, None, dc_BLD, None, *dweights",
    ),
    _reversible(
        what="every half-block keeps its streams",
        original="last = (b_BLD, c_BLD) if i == trail.length - 1 else ()",
        replacement="last = (b_BLD, c_BLD)",
    ),
    _reversible(
        what="a second backward pass begins where the first ended",
        original="b_BLD, c_BLD = kept or trail.streams",
        replacement="b_BLD, c_BLD = trail.streams or kept",
    ),
    _reversible(
        what="dropout drawn anew",
        original="self._dropout, seed=self._seed)",
        replacement="self._dropout)",
    ),
    _reversible(
        what="one seed for both halves",
        original="dropout, seeds[1])",
        replacement="dropout, seeds[0])",
    ),
    _reversible(
        what="no dropout behind attention",
        original="more, dropout, seeds[0])",
        replacement="more, dropout, None)",
    ),
    _reversible(
        what="recomputed without autocast",
        original="with trail.cast(), ctx.replay():",
        replacement="with ctx.replay():",
    ),
    _reversible(
        what="the copies of mixed precision get no gradient",
        original="found.append(module.narrow)",
        replacement="pass",
    ),
    _reversible(
        what="biases and norms get no gradient",
        original="found += module.parameters(recurse=False)",
        replacement="found += [p for p in module.parameters(recurse=False) if p.ndim > 1]",
    ),
    _reversible(
        what="weights of another pass are read",
        original="if any(x is not y for x, y in zip(half.weights(), weights, strict=True)):",
        replacement="if False:",
    ),
    _reversible(
        what="changed weights are not noticed",
        original="ctx.save_for_backward(*last, *weights)",
        replacement="ctx.save_for_backward(*last, *(w.detach().clone() for w in weights))",
    ),
    _reversible(
        what="a second derivative that is wrong",
        original="    @once_differentiable(made_in_forward=True)\n",
        replacement="",
    ),
    _reversible(
        what="no recomputation",
        original="        and torch.is_grad_enabled()\n",
        replacement="        and False\n",
    ),
    _reversible(
        what="recomputed in a compiler",
        original=" and not torch.compiler.is_compiling()",
        replacement="",
    ),
    _reversible(
        what="the cache of another layer",
        original="cache.layer(i)",
        replacement="cache.layer(0)",
    ),
    _model(
        what="the cache forgets how far it is",
        original="            cache.length = end\n        return h_BLD",
        replacement="            pass\n        return h_BLD",
    ),
    _model(
        what="nothing is normalised at the end",
        original="return self.norm(residual_stack(self.blocks, x_BLD, places, cache, dropout))",
        replacement="return residual_stack(self.blocks, x_BLD, places, cache, dropout)",
    ),
    _model(
        what="dropout in evaluation",
        original="self.dropout if self.training else 0.0",
        replacement="self.dropout",
    ),
    Mutant(
        what="blocks are checkpointed in addition",
        file="model/activation_checkpointing.py",
        original='if reversible and policy != "none":',
        replacement="if False:",
    ),
    Mutant(
        what="saved tensors read twice",
        file="model/reversible.py",
        original="kept = saved[: len(saved) - len(weights)]",
        replacement="kept = ctx.saved_tensors[: len(saved) - len(weights)]",
    ),
    Mutant(
        what="plans that a reversible model refuses",
        file="training/memory/plan.py",
        original="policies[:1] if self.memory.config.reversible else policies",
        replacement="policies",
    ),
    Mutant(
        what="exported as a model of one stream",
        file="model/native.py",
        original='"parallel_blocks": False, "reversible": False,',
        replacement='"parallel_blocks": False,',
    ),
]

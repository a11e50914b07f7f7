"""Prove that what others put into a model counts: heads, norms, hooks, and what these draw."""

import warnings
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from families import configs, few
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations, prune, weight_norm

from tritium.kernels import rms_norm
from tritium.model import ModelConfig, RMSNorm, Transformer, lora, reversible, transformer
from tritium.model.modules import is_hooked
from tritium.model.output import is_plain
from tritium.model.redrawing import may_draw

V, D = 23, 16
CONFIG = {"vocab_size": V, "n_layers": 2, "d_model": D, "n_heads": 4, "max_seq_len": 8}


def build(options=None, **changes):
    torch.manual_seed(1)
    model = Transformer(ModelConfig(**CONFIG | changes), **options or {})
    with torch.no_grad():  # as after training: nothing is zero or one
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.3)
    return model.double()


def ids():
    return torch.randint(V, (2, 3, 8)).unbind()


class Adapted(nn.Module):
    """A layer beside a low-rank one, that shows the first one's weight as peft's do."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.low = inner, nn.Sequential(nn.Linear(D, 2), nn.Linear(2, V))

    @property
    def weight(self):
        return self.inner.weight

    def forward(self, x):
        return self.inner(x) + self.low(x)


class Scaled(nn.Linear):
    def forward(self, input):
        return super().forward(input) * 0.3


def normed_by_weight(head):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return weight_norm(head)


def pruned(head):
    return prune.random_unstructured(head, "weight", 0.5)


def hooked(head, kind="forward_hook", hook=lambda *x: x[-1] * 0.3):
    getattr(head, f"register_{kind}")(hook)
    return head


def patched(head):
    head.forward = lambda x, w=head.weight: x @ w.mT * 0.3
    return head


HEADS = {
    "bias": lambda _: nn.Linear(D, V),
    "layers": lambda _: nn.Sequential(nn.Linear(D, D), nn.GELU(), nn.Linear(D, V)),
    "adapter": Adapted,
    "subclass": lambda _: Scaled(D, V),
    "forward_hook": hooked,
    "pre_hook": lambda head: hooked(head, "forward_pre_hook", lambda _, x: x[0] * 0.3),
    "backward_hook": lambda head: hooked(
        head, "full_backward_hook", lambda _, dx, __: (dx[0] * 2,)
    ),
    "pre_backward": lambda head: hooked(head, "full_backward_pre_hook", lambda _, dy: (dy[0] * 2,)),
    "patched": patched,
    "pruned": pruned,
    "weight_norm": normed_by_weight,
    "parametrized": parametrizations.weight_norm,
}


def results(model, loss):
    model.zero_grad()
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters())]


@pytest.mark.parametrize("kind", HEADS)
def test_the_loss_is_of_the_logits_of_any_head_after_a_step_too(kind):
    model = build(
        tie_embeddings=False, softcap=4.0, options={"z_loss": 0.1, "label_smoothing": 0.1}
    )
    model.head = HEADS[kind](model.head).double()
    (tokens, targets), optimizer = ids(), torch.optim.SGD(model.parameters(), lr=0.5)
    targets[0, 2] = -100
    for _ in range(2):
        x = model(tokens).flatten(0, 1)
        of_logits = F.cross_entropy(x, targets.flatten(), label_smoothing=0.1)
        of_logits = of_logits + 0.1 * x.logsumexp(-1)[targets.flatten() >= 0].square().mean()
        expected = [x.clone() for x in results(model, of_logits)]
        for x, y in zip(results(model, model(tokens, targets)), expected, strict=True):
            torch.testing.assert_close(x, y, check_dtype=False)
        optimizer.step()


def test_a_head_without_a_weight_moves_with_its_model_and_is_loaded():
    model = build(tie_embeddings=False)
    model.head = HEADS["layers"](None)
    again = build(tie_embeddings=False)
    again.head = HEADS["layers"](None)
    again.float().load_state_dict(model.float().state_dict())
    tokens, targets = ids()
    assert torch.equal(again(tokens, targets), model(tokens, targets))


class Shifted(RMSNorm):
    """Gemma's norm."""

    def forward(self, x):
        return rms_norm(x, self.normalized_shape, self.weight, self.eps, offset=1.0)


def norms(model):
    return [(m, n, x) for m in model.modules() for n, x in m.named_children() if "norm" in n]


def changed_by_hook(owner, name, norm):
    norm.register_forward_hook(lambda _, x, y: y + x[0].sin())


def changed_by_subclass(owner, name, norm):
    new = Shifted(norm.normalized_shape, norm.eps).double()
    new.weight = norm.weight
    setattr(owner, name, new)


def changed_by_epsilon(owner, name, norm):
    norm.eps = 0.5


def not_changed(owner, name, norm):
    pass


CHANGES = {
    changed_by_hook: lambda norm, x: F.rms_norm(x, x.shape[-1:], norm.weight, norm.eps) + x.sin(),
    changed_by_subclass: lambda norm, x: F.rms_norm(x, x.shape[-1:], 1 + norm.weight, norm.eps),
    changed_by_epsilon: lambda norm, x: F.rms_norm(x, x.shape[-1:], norm.weight, 0.5),
    not_changed: lambda norm, x: F.rms_norm(x, x.shape[-1:], norm.weight, norm.eps),
}


class Called(nn.Module):
    """A norm of no class of Tritium, computed as it says."""

    dropout = 0.0

    def __init__(self, norm, by):
        super().__init__()
        self.norm, self.by = norm, by

    def forward(self, x):
        return self.by(self.norm, x)

    def add(self, x, residual):
        s = x if residual is None else x + residual
        return self(s), s


@pytest.mark.parametrize("positions", ["rope", "learned"])
@pytest.mark.parametrize("change", CHANGES)
def test_every_norm_is_what_its_module_says(change, positions):
    model, expected = (build(positions=positions) for _ in range(2))
    for place in norms(model):
        change(*place)
    for owner, name, norm in norms(expected):
        setattr(owner, name, Called(norm, CHANGES[change]))
    tokens, targets = ids()
    for x, y in zip(*(results(m, m(tokens, targets)) for m in (model, expected)), strict=True):
        torch.testing.assert_close(x, y)


def test_hooks_see_every_norm_once():
    model, seen = build(), []
    for _, _, norm in norms(model):
        norm.register_forward_hook(lambda norm, *_: seen.append(norm))
    model(ids()[0])
    assert len(seen) == len({*seen}) == len(norms(model)) == 9


class Dropped(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner, self.dropout = inner, nn.Dropout(0.5)

    def forward(self, x):
        return self.inner(self.dropout(x))


def drawn_by_module(model):
    for block in model.blocks:
        block.feed_forward = Dropped(block.feed_forward)


def drawn_by_hook(model):
    for block in model.blocks:
        block.attention.output.register_forward_hook(lambda _, x, y: y + torch.randn_like(y))


def drawn_by_method(model):
    for block in model.blocks:
        down = block.feed_forward.down
        down.forward = lambda x, own=down.forward: F.dropout(own(x), 0.3)


@pytest.mark.parametrize("policy", ["selective", "every-2", "full", "reversible"])
@pytest.mark.parametrize("draw", [drawn_by_module, drawn_by_hook, drawn_by_method])
def test_what_others_draw_is_drawn_again_where_a_block_is_recomputed(draw, policy, monkeypatch):
    two = policy == "reversible"
    model, tokens_targets, found = build(reversible=two), ids(), []
    draw(model)
    for recomputes in (False, True):
        monkeypatch.setattr(reversible, "sees_through", lambda ordinary=not recomputes: ordinary)
        if recomputes and not two:
            model.activation_checkpointing = policy
        torch.manual_seed(7)
        loss = model(*tokens_targets)
        state = torch.get_rng_state()
        found.append([x.clone() for x in results(model, loss)])
        assert torch.equal(torch.get_rng_state(), state)  # the next step draws others
    for x, y in zip(*found, strict=True):
        torch.testing.assert_close(x, y)


def more_blocks(model):
    model.blocks.append(model.blocks[0])


def fewer_blocks(model):
    del model.blocks[1]


def extra_parameter(model):
    model.scale = nn.Parameter(torch.ones(1))


def own_layer(model):
    model.blocks[0].feed_forward.down = nn.Linear(model.blocks[0].feed_forward.down.in_features, D)


def other_epsilon(model):
    model.norm.eps = 0.5


def other_vocabulary(model):
    model.embedding = nn.Embedding(V + 1, D)


def other_head(kind, model):
    model.head = HEADS[kind](model.head)


WRITTEN = {
    more_blocks: r"blocks\.2 is not there; here it is Block\(\)",
    fewer_blocks: r"blocks\.1 is Block\(\); here it is not there",
    extra_parameter: "scale is not there; here it is a parameter",
    own_layer: r"down is Linear\(.*, bias=False\); here it is Linear\(.*, bias=True\)",
    other_epsilon: r"norm is RMSNorm\(.*, eps=1e-06, .*\); here it is RMSNorm\(.*, eps=0.5",
    other_vocabulary: r"embedding is Embedding\(23, 16\); here it is Embedding\(24, 16\)",
    partial(other_head, "layers"): r"head is Linear\(.*\); here it is Sequential\(\)",
    partial(other_head, "subclass"): r"head is Linear\(.*\); here it is .*\.Scaled\(",
    partial(other_head, "pruned"): r"head\.weight is a parameter .*; here it is not there",
}


@pytest.mark.parametrize("change", WRITTEN)
def test_a_folder_that_would_hold_another_model_is_not_written(change, tmp_path):
    model = build(tie_embeddings=False)
    change(model)
    with pytest.raises(ValueError, match="must be that of its config, where .*" + WRITTEN[change]):
        model.save_pretrained(tmp_path / "out")
    assert not [*tmp_path.iterdir()]


def test_torch_classes_of_the_same_layers_are_written(tmp_path):
    model, (tokens, _) = build(tie_embeddings=False).eval(), ids()
    head, embedding = model.head.weight, model.embedding.weight
    model.head = nn.Linear(D, V, bias=False)
    model.embedding = nn.Embedding(V, D)
    model.head.weight, model.embedding.weight = head, embedding
    lora.adapt(model, 2)
    model.save_pretrained(tmp_path / "out")
    torch.testing.assert_close(Transformer.from_pretrained(tmp_path / "out")(tokens), model(tokens))


def test_an_embedding_of_torch_serves_where_products_are_in_another_dtype(monkeypatch):
    model, (tokens, targets) = build(), ids()
    expected, weight = model(tokens, targets), model.embedding.weight
    model.embedding = nn.Embedding(V, D)
    model.embedding.weight = weight
    monkeypatch.setattr(transformer, "multiplied_dtype", lambda _: torch.bfloat16)  # as on a GPU
    assert torch.equal(model(tokens, targets), expected)


def test_a_tokenizer_of_another_kind_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match=r"tokenizer must have eot, decode and save.*got a dict"):
        build().save_pretrained(tmp_path / "out", {})
    assert not [*tmp_path.iterdir()]


@given(configs(), st.booleans())
@few
def test_blocks_of_tritium_draw_nothing_that_a_cuda_graph_could_not_hold(config, adapted):
    model = Transformer(config)
    if adapted:
        lora.adapt(model, 1)
    assert not may_draw(*model.blocks)
    assert not any(is_hooked(module) for module in model.modules())
    assert is_plain(model.head)

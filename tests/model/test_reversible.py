"""Prove that a reversible stack has the gradients of its ordinary graph, and keeps two streams."""

from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from families import LENGTH, configs, few
from hypothesis import given
from hypothesis import strategies as st
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from tritium.model import ModelConfig, Transformer, lora, reversible
from tritium.model.activation_checkpointing import saved_bytes
from tritium.model.masks import make_masks
from tritium.training.memory.plan import MemoryConfig, Planner
from tritium.training.memory.predict import Memory
from tritium.training.mixed_precision import MixedPrecision
from tritium.training.optim import OptimizerConfig

CONFIG = ModelConfig(
    vocab_size=23, n_layers=3, d_model=16, n_heads=4, n_kv_heads=2, d_ff=24, max_seq_len=LENGTH,
    reversible=True,
)  # fmt: skip


def build(config=CONFIG, **options):
    torch.manual_seed(1)
    model = Transformer(replace(config, reversible=True, parallel_blocks=False), **options)
    with torch.no_grad():  # as after training: nothing is zero, one, or near the identity
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.3)
    return model


def ids(model, rows=2, length=LENGTH):
    return torch.randint(model.config.vocab_size, (rows, length))


def results(model, *inputs, graph="recomputed"):
    """Loss and gradients, of the same random numbers each time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reversible, "sees_through", lambda: graph == "ordinary")
        torch.manual_seed(7)
        loss = model(*inputs)
        trained = [p for p in model.parameters() if p.requires_grad]
        return loss, torch.autograd.grad(loss, trained, allow_unused=True)


def plain(model, tokens):
    """The logits by the formulas of the two streams, block by block."""
    x, places = model.embedding(tokens), (model.cos_LK[: tokens.shape[1]],)
    masks = make_masks(model.config, tokens.shape[1], tokens.shape[1], None, x)
    places = (*places, model.sin_LK[: tokens.shape[1]], masks)
    if model.position_embedding is not None:
        x = x + model.position_embedding.weight[: tokens.shape[1]]
    y1 = y2 = x
    for block in model.blocks:
        y1 = y1 + block.attention(block.attention_norm(y2), places)
        y2 = y2 + block.feed_forward(block.feed_forward_norm(y1))
    return model.logits(model.norm(y1 + y2))


@given(configs(), st.sampled_from([0.0, 0.4]), st.booleans())
@few
def test_gradients_are_those_of_the_ordinary_graph(config, dropout, documents):
    model = build(config, dropout=dropout).double()
    tokens = ids(model)
    positions = torch.arange(LENGTH).expand(2, -1) % 5 if documents else None
    loss, gradients = results(model, tokens, tokens, positions)
    wanted, expected = results(model, tokens, tokens, positions, graph="ordinary")
    assert torch.equal(loss, wanted)
    for x, y in zip(gradients, expected, strict=True):
        assert (x is None) == (y is None)
        if x is not None and y is not None:  # of positions that documents hide there may be none
            torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-9 * (1 + y.abs().max().item()))
    if not dropout and not documents:
        torch.testing.assert_close(model(tokens), plain(model, tokens), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_checkpoint_around_the_model_changes_no_gradient(use_reentrant):
    """As where it is one part of a larger model: what it keeps is recomputed, with its masks."""
    model, found = build(dropout=0.4), []
    tokens, scale = ids(model), torch.ones((), requires_grad=True)

    def loss(scale):
        return scale * model(tokens, tokens)

    for run in (loss, partial(checkpoint, loss, use_reentrant=use_reentrant)):
        torch.manual_seed(7)
        model.zero_grad()
        run(scale).backward()
        found.append([p.grad for p in model.parameters()])
    assert all(map(torch.equal, *found))


def test_parallel_blocks_are_refused():
    with pytest.raises(ValueError, match="reversible needs a stream for each"):
        replace(CONFIG, parallel_blocks=True)


def test_gradients_in_float32_are_those_of_the_ordinary_graph_to_rounding():
    model = build(dropout=0.2)
    tokens = ids(model, 4)
    _, gradients = results(model, tokens, tokens)
    _, ordinary = results(model, tokens, tokens, graph="ordinary")
    _, exact = results(model.double(), tokens, tokens, graph="ordinary")
    for x, y, z in zip(gradients, ordinary, exact, strict=True):
        # The streams shrink on the way down, and what is left has the rounding of the larger ones.
        assert (x - z).norm() <= 50 * (y - z).norm() + 1e-4 * z.norm()


@pytest.mark.parametrize("cast", ["autocast", "mixed"])
def test_gradients_under_autocast_are_those_of_the_ordinary_graph(cast):
    model, found, dtypes = build(), [], []
    tokens = ids(model, 4)
    for layer in (model.blocks[0].attention.output, model.blocks[-1].feed_forward.down):
        layer.register_forward_hook(lambda _layer, _inputs, y: dtypes.append(y.dtype))
    for ordinary in (False, True):
        mixed = MixedPrecision(model)
        context = torch.autocast("cpu", torch.bfloat16) if cast == "autocast" else mixed
        with pytest.MonkeyPatch.context() as patch, context:
            patch.setattr(reversible, "sees_through", lambda o=ordinary: o)
            for part in tokens.split(2):  # two passes, whose gradients are added
                loss = model(part, part)
                with torch.autocast("cpu", enabled=False):
                    loss.backward()
        found.append([p.grad for p in model.parameters()])
        model.zero_grad()
    # Two layers, two passes, each of them twice where it is recomputed.
    assert dtypes == [torch.bfloat16] * (8 + 4)
    # A stream that is reconstructed to rounding may round a product to the neighbour.
    for x, y in zip(*found, strict=True):
        assert (x - y).norm() <= 0.02 * y.norm()


class Ones(torch.nn.Module):
    def forward(self, x, *_):
        return torch.ones_like(x)


def test_every_half_block_has_a_mask_of_its_own_and_draws_it_again():
    norm, layer, x = torch.nn.Identity(), Ones(), torch.randn(8, 50)
    block = SimpleNamespace(
        attention_norm=norm, attention=layer, feed_forward_norm=norm, feed_forward=layer
    )
    halves = list(reversible.half_blocks([block, block], x, (), None, 0.5))
    masks = [half(x) for half in halves]
    for i, mask in enumerate(masks):
        assert torch.equal(mask, halves[i](x))
        assert 0.35 < (mask == 0).float().mean() < 0.65
        assert {*mask.unique().tolist()} == {0.0, 2.0}
        assert not any(torch.equal(mask, other) for other in masks[:i])


def test_what_is_kept_does_not_grow_with_depth():
    kept, ordinary = [], []
    for n_layers in (2, 4, 8):
        for is_reversible, found in ((True, kept), (False, ordinary)):
            config = replace(CONFIG, n_layers=n_layers, reversible=is_reversible)
            model = Transformer(config)
            tokens = ids(model)
            given = [tokens, *model.parameters(), model.cos_LK, model.sin_LK]
            found.append(saved_bytes(partial(model, tokens, tokens), given))
    assert kept[0] == kept[1] == kept[2]
    assert ordinary[2] > 3 * ordinary[0] > 3 * kept[0]


def test_the_memory_of_a_step_is_predicted_and_planned_without_checkpointing():
    cpu = torch.device("cpu")
    memory = Memory(Transformer, CONFIG, OptimizerConfig(), cpu, torch.float32, 2)
    model = Transformer(CONFIG)
    tokens = ids(model)
    given = [tokens, *model.parameters(), model.cos_LK, model.sin_LK]
    kept = saved_bytes(partial(model, tokens, tokens), given)
    assert memory.step("none", 2).activations == kept
    assert {x.activation_checkpointing for x in Planner(memory, MemoryConfig()).plans()} == {"none"}


def test_adapters_are_trained_in_it():
    model = build().double()
    lora.adapt(model, 2)
    tokens = ids(model)
    for p in model.parameters():
        p.data += 0.1
    _, gradients = results(model, tokens, tokens)
    _, expected = results(model, tokens, tokens, graph="ordinary")
    for x, y in zip(gradients, expected, strict=True):
        torch.testing.assert_close(x, y)


@torch.no_grad()
def test_generation_with_a_cache_is_that_without():
    model = build(dropout=0.5).double().eval()
    tokens = ids(model, 2, 3)
    expected = tokens
    for _ in range(LENGTH - 3):
        expected = torch.cat((expected, model(expected)[:, -1:].argmax(-1)), 1)
    assert torch.equal(model.generate(tokens, LENGTH - 3, temperature=0), expected)
    ragged = model.generate([tokens[0], tokens[1, :2]], 5, temperature=0)
    alone = model.generate(tokens[1:, :2], 5, temperature=0)
    assert torch.equal(ragged[1], alone[0])


def test_compiles_in_one_graph_to_the_same_loss_and_gradients_and_is_exported():
    model = build(replace(CONFIG, n_layers=1))
    tokens = ids(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    losses = compiled(tokens, tokens), model(tokens, tokens)
    torch.testing.assert_close(*losses)
    gradients = [torch.autograd.grad(loss, list(model.parameters())) for loss in losses]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)
    free = {0: torch.export.Dim("B", min=2, max=64), 1: torch.export.Dim("L", min=2, max=LENGTH)}
    exported = torch.export.export(
        model, (tokens, tokens), dynamic_shapes=dict(tokens=free, targets=free)
    )
    other = ids(model, 5, 7)
    torch.testing.assert_close(exported.module()(other, other), model(other, other))
    torch.compiler.reset()


def test_what_it_cannot_do_is_refused(tmp_path):
    model = build()
    tokens = ids(model)
    with pytest.raises(ValueError, match="except for reversible=True \\(it has False\\)"):
        model.save_pretrained(tmp_path / "native")
    assert not (tmp_path / "native").exists()
    for policy in ("full", "selective", "every-2"):
        with pytest.raises(ValueError, match="must be none for a reversible model, which recomp"):
            model.activation_checkpointing = policy
        with pytest.raises(ValueError, match=f"reversible model, .* got '{policy}'; leave it out"):
            MemoryConfig(activation_checkpointing=policy).check(CONFIG)
    weights = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    loss = functional_call(model, weights, (tokens, tokens))
    with pytest.raises(RuntimeError, match="must find the weights that the forward pass read"):
        loss.backward()
    loss = model(tokens, tokens)
    with torch.no_grad():
        model.blocks[0].feed_forward.down.weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    last = model.blocks[-1].feed_forward.down.weight
    with pytest.raises(RuntimeError, match="first derivative only"):
        torch.autograd.grad(model(tokens).sum(), last, create_graph=True)


def test_a_graph_may_be_used_twice():
    model = build().double()
    loss = model(ids(model), ids(model))
    trained = list(model.parameters())
    first = torch.autograd.grad(loss, trained, retain_graph=True)
    last = model.blocks[-1].feed_forward.down.weight  # where a pass may end, with streams in hand
    assert torch.autograd.grad(loss, last, retain_graph=True)[0].any()
    for x, y in zip(first, torch.autograd.grad(loss, trained), strict=True):
        assert torch.equal(x, y)

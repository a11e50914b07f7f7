"""Prove that a model can be compiled once for all lengths, exported, and put through torch.func."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounter
from torch.func import functional_call, grad, hessian, jacrev, jvp, vmap

from tritium.model import ModelConfig, Transformer

CONFIG = ModelConfig(vocab_size=23, n_layers=1, d_model=16, n_heads=4, n_kv_heads=2, max_seq_len=16)
LENGTHS = 5, 2, 9, 16, 3, 4


def build(device, **options):
    model = Transformer(CONFIG, **options).to(device)
    with torch.no_grad():  # as after training: blocks that matter
        for block in model.blocks:
            block.attention.output.weight.mul_(20)
    return model


def inputs(kind, rows, length, device):
    tokens = torch.randint(CONFIG.vocab_size, (rows, length), device=device)
    positions = torch.arange(length, device=device).expand(rows, -1) % 3
    return {
        "logits": (tokens,),
        "loss": (tokens, tokens),
        "documents": (tokens, tokens, positions),
    }[kind]


def gradients(model, outputs):
    return torch.autograd.grad(outputs.square().sum(), list(model.parameters()))


@pytest.fixture
def compiler():
    torch.compiler.reset()
    yield CompileCounter()
    torch.compiler.reset()


@pytest.mark.parametrize("kind", ["logits", "loss", "documents"])
def test_one_compilation_serves_all_lengths(kind, device, compiler):
    model = build(device)
    compiled = torch.compile(model, dynamic=True, fullgraph=True, backend=compiler)
    for rows, length in zip((2, 3, 4, 5) * 3, LENGTHS, strict=False):
        given = inputs(kind, rows, length, device)
        found, expected = compiled(*given), model(*given)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(gradients(model, found), gradients(model, expected))
    assert compiler.frame_count == 1


@pytest.mark.parametrize("kind", ["logits", "loss", "documents"])
def test_of_itself_it_compiles_no_more_than_twice(kind, device, compiler):
    model = build(device)
    compiled = torch.compile(model, fullgraph=True, backend=compiler)
    for length in LENGTHS:
        given = inputs(kind, 2, length, device)
        torch.testing.assert_close(compiled(*given), model(*given))
    assert compiler.frame_count <= 2


@pytest.mark.parametrize("kind", ["logits", "loss", "documents"])
def test_is_exported_for_every_batch_and_length(kind, device):
    model, given = build(device), inputs(kind, 3, 9, device)
    free = {0: torch.export.Dim("B", min=2, max=64), 1: torch.export.Dim("L", min=2, max=16)}
    shapes = dict.fromkeys(["tokens", "targets", "positions"][: len(given)], free)
    exported = torch.export.export(model, given, dynamic_shapes=shapes)
    assert {*exported.state_dict} == {*model.state_dict()}
    run = exported.module()
    for rows, length in ((2, 16), (7, 2), (4, 11)):
        given = inputs(kind, rows, length, device)
        found, expected = run(*given), model(*given)
        torch.testing.assert_close(found, expected)
        own = dict(run.named_parameters())
        parameters = [own[name] for name, _ in model.named_parameters()]
        dp = torch.autograd.grad(found.square().sum(), parameters)
        torch.testing.assert_close(dp, gradients(model, expected))


def losses_of(model, kind):
    """The loss of one sequence, as a function of the weights and of it."""

    def loss(weights, tokens, positions):
        tokens = tokens[None]
        if kind == "logits":
            logits = functional_call(model, weights, (tokens, None, positions[None]))
            return F.cross_entropy(logits[0], tokens[0])
        return functional_call(model, weights, (tokens, tokens, positions[None]))

    return loss


JIT = "ignore:.*torch.jit.script:DeprecationWarning"  # of PyTorch's own rules for forward mode


@pytest.mark.filterwarnings(JIT)
@pytest.mark.filterwarnings("ignore:.*:torch.jit.TracerWarning", "ignore:.*jit:DeprecationWarning")
@pytest.mark.parametrize(
    "changes",
    [{}, {"attention": "softmax"}, {"reversible": True}, {"window": 2, "token_shift": True}],
    ids=str,
)
def test_a_trace_of_torch_jit_computes_the_same_for_other_tokens(changes, device):
    model = Transformer(replace(CONFIG, **changes)).to(device)
    traced = torch.jit.trace(model, inputs("loss", 3, 9, device), check_trace=False)
    batch = inputs("loss", 3, 9, device)
    torch.testing.assert_close(traced(*batch), model(*batch))


@pytest.mark.parametrize("policy", ["none", "selective", "full"])
@pytest.mark.parametrize("kind", ["logits", "loss"])
def test_transforms_of_torch_func_are_those_of_autograd(kind, policy, device):
    model = build(device, activation_checkpointing=policy).double()
    weights = {name: p.detach() for name, p in model.named_parameters()}
    tokens, _, positions = inputs("documents", 3, 8, device)
    loss = losses_of(model, kind)
    own = dict(model.named_parameters())
    each = [loss(own, *sequence) for sequence in zip(tokens, positions, strict=True)]
    expected = [torch.autograd.grad(x, list(model.parameters())) for x in each]

    first = grad(loss)(weights, tokens[0], positions[0])
    torch.testing.assert_close(tuple(first.values()), expected[0])
    torch.testing.assert_close(jacrev(loss)(weights, tokens[0], positions[0]), first)
    batched = vmap(loss, in_dims=(None, 0, 0))(weights, tokens, positions)
    torch.testing.assert_close(batched, torch.stack(each).detach())
    of_samples = vmap(grad(loss), in_dims=(None, 0, 0))(weights, tokens, positions)
    for i, found in enumerate(expected):
        torch.testing.assert_close(tuple(x[i] for x in of_samples.values()), found)
    direction = {name: torch.randn_like(p) for name, p in weights.items()}
    _, slope = jvp(lambda w: loss(w, tokens[0], positions[0]), (weights,), (direction,))
    torch.testing.assert_close(slope, sum((first[n] * direction[n]).sum() for n in first))


@pytest.mark.filterwarnings(JIT)
@pytest.mark.parametrize("kind", ["logits", "loss"])
def test_second_derivatives_are_the_slopes_of_the_first(kind, device):
    model = build(device).double()
    weights = {name: p.detach() for name, p in model.named_parameters()}
    tokens, _, positions = inputs("documents", 1, 6, device)
    loss, name = losses_of(model, kind), "blocks.0.attention.query_norm.weight"

    def of_one(weight):
        return loss({**weights, name: weight}, tokens[0], positions[0])

    weight, step = weights[name], 1e-5
    found = hessian(of_one)(weight)
    for i in range(len(weight)):
        shift = torch.zeros_like(weight)
        shift[i] = step
        slope = (grad(of_one)(weight + shift) - grad(of_one)(weight - shift)) / (2 * step)
        torch.testing.assert_close(found[i], slope, rtol=1e-4, atol=1e-8)


def test_models_are_stacked_and_run_as_one(device):
    models = [build(device).double() for _ in range(3)]
    weights, buffers = torch.func.stack_module_state(models)
    tokens = inputs("logits", 2, 9, device)[0]
    with torch.device("meta"):
        empty = Transformer(CONFIG)

    def run(weights, buffers):
        return functional_call(empty, (weights, buffers), (tokens,))

    found = vmap(run)(weights, buffers)
    torch.testing.assert_close(found, torch.stack([model(tokens) for model in models]))

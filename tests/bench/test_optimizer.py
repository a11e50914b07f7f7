"""The bench of optimizers measures what it says: shapes, bytes, errors, and whoever is there."""

import re
import sys
from dataclasses import replace
from math import prod

import pytest
import torch
from torch import nn

from tritium.bench import case, harness, optimizer, tables
from tritium.bench.__main__ import main
from tritium.bench.optimizer_implementations import Stepper, clipped, gradients
from tritium.bench.optimizer_shapes import CPU_MODELS, MODELS, SMALLEST, gpt2, llama
from tritium.bench.optimizer_tasks import EXACT, FUSED, TASKS, Task
from tritium.kernels import runtime
from tritium.kernels.optimizers.grad_norm import squares_reference
from tritium.kernels.roofline import Device

CPU = torch.device("cpu")
RATES = Device("a machine", "", copy=1e9, matrix_16=1e9, matrix_32=1e9, arithmetic=1e12)
SETTINGS = case.Settings(CPU, RATES, 0, seconds=1e-6)
TINY = {"tiny": [(3, 5), (7,)]}
N = 22


@pytest.fixture(autouse=True)
def references(monkeypatch):
    """The kernels themselves are tested elsewhere, and slow in the interpreter."""
    monkeypatch.setattr(runtime, "REFERENCE", True)


@pytest.mark.parametrize(
    ("model", "tensors", "parameters"),
    [
        ("GPT-2 124M", 148, 124_439_808),
        ("GPT-2 350M", 292, 354_823_168),
        ("GPT-2 1.5B", 580, 1_557_611_200),
        ("Llama-3 8B", 291, 8_030_261_248),
    ],
)
def test_models_are_as_large_as_published(model, tensors, parameters):
    assert len(MODELS[model]) == tensors
    assert sum(map(prod, MODELS[model])) == parameters


def test_shapes_are_those_of_the_models_themselves():
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):
        expected = transformers.GPT2LMHeadModel(
            transformers.GPT2Config(n_layer=3, n_embd=48, n_head=4, vocab_size=99, n_positions=17)
        )
        gated = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                num_hidden_layers=3, hidden_size=64, intermediate_size=160, vocab_size=99,
                num_attention_heads=8, num_key_value_heads=2, tie_word_embeddings=False,
            )
        )  # fmt: skip
    for model, shapes in ((expected, gpt2(3, 48, 99, 17)), (gated, llama(3, 64, 160, 99, 8, 2))):
        assert [tuple(p.shape) for p in model.parameters()] == shapes


def task(step=None, **options) -> Task:
    """AdamW in float32, by PyTorch's own, and by an implementation whose Stepper `step` makes."""
    implementations = {"Tritium": FUSED} | ({"other": lambda: step} if step else {})
    return Task("adamw", implementations, EXACT, **options)


def measured(**tasks: Task) -> list[tables.Row]:
    return list(optimizer.measure(TINY, tasks, SETTINGS))


def test_rows_hold_what_was_measured():
    rows = measured(plain=task(), extra=task(extra={"Tritium": 12}), master=task(master="split"))
    for row in rows:
        assert row.dims == {"N": N, "tensors": 2}
        assert (row.shape, row.implementation, row.problem) == ("tiny", "Tritium", None)
        assert row.bytes == 28 * N
        assert row.percent_of_bound == pytest.approx(28 * N / 1e9 / row.milliseconds * 1e5)
        moved = {"plain": 28, "extra": 40, "master": 28}[row.pass_name] * N
        assert row.percent_of_copy == pytest.approx(moved / 1e9 / row.milliseconds * 1e5)
        assert row.state_bytes == 8 * N + 4 * 2  # two moments, and a count of each tensor's steps
        assert row.peak_bytes is None
        assert 0 <= row.error < 2e-6
    assert [row.pass_name for row in rows] == ["plain", "extra", "master"]


@pytest.mark.parametrize("problem", [TypeError("no option 'master'"), torch.OutOfMemoryError()])
def test_an_implementation_that_cannot_be_made_is_a_row(problem):
    def make(params):
        raise problem

    actual, expected = measured(adamw=task(make))
    assert expected.problem in ("TypeError: no option 'master'", "out of memory")
    assert expected.milliseconds is None
    assert actual.milliseconds


def test_a_library_that_is_not_installed_is_a_note():
    peers = {"absent": lambda: __import__("no_such_library")}
    kinds = {"adamw": task(peers=peers)}
    assert len(measured(**kinds)) == 1
    assert "Not installed: absent." in list(optimizer._notes(kinds, SETTINGS))


def test_steps_of_small_models_take_turns(monkeypatch):
    """As many copies as together exceed the cache twice, each with an optimizer of its own."""
    made, turns = [], []

    def make(params) -> Stepper:
        made.append(params)
        return Stepper(lambda: turns.append(params[0].data_ptr()))

    settings = replace(SETTINGS, cache=8 * N)
    monkeypatch.setattr(optimizer, "error_of", lambda make, task, device: 0.0)
    only = Task("adamw", {"other": lambda: make}, EXACT)
    list(optimizer.measure(TINY, {"adamw": only}, settings))
    assert [[len(p) for p in params] for params in made] == [[3, 7]] * 3 + [[1, 1]]
    assert turns[0] != turns[1] != turns[2] != turns[0]


def test_error_is_of_the_way_of_the_weights():
    """1 % too far is 1e-2, whatever the weights are; standing still is 1."""

    def scaled(by: float):
        def make(params):
            exact = EXACT()(params)

            @torch.no_grad()
            def step():
                before = [p.clone() for p in params]
                exact.step()
                for p, b in zip(params, before, strict=True):
                    p.copy_(b + by * (p - b))

            return Stepper(step)

        return make

    assert optimizer.error_of(scaled(1.01), task(), CPU) == pytest.approx(0.01, rel=0.05)
    assert optimizer.error_of(scaled(0.0), task(), CPU) == pytest.approx(1)
    assert optimizer.error_of(EXACT(), task(), CPU) < 2e-6


def test_error_of_a_norm_is_its_own():
    norm = TASKS["norm float32"]

    def make(params):
        return Stepper(lambda: 1.25 * squares_reference(gradients(params)).sum().sqrt())

    assert optimizer.error_of(make, norm, CPU) == pytest.approx(0.25, rel=1e-4)
    assert optimizer.error_of(norm.implementations["torch"](), norm, CPU) < 1e-6


@pytest.mark.parametrize("name", TASKS)
def test_every_task_is_called_as_it_wants(name):
    rows = list(optimizer.measure(TINY, {name: replace(TASKS[name], peers={})}, SETTINGS))
    assert [row.implementation for row in rows] == list(TASKS[name].implementations)
    assert rows[0].implementation == "Tritium"
    for row in rows:
        if row.problem:  # a precision that the optimizers do not have yet
            assert re.match(r"TypeError: AdamW.__init__\(\) got an unexpected keyword", row.problem)
            assert row.implementation == "Tritium"
            continue
        # Rounded stochastically, a weight strays by a tenth of its way in so few steps.
        assert row.error < (0.2 if TASKS[name].dtype == torch.bfloat16 else 2e-6), row
        own = row.bytes + TASKS[name].extra.get(row.implementation, 0) * N
        assert row.percent_of_copy / row.percent_of_bound == pytest.approx(own / row.bytes)


def test_bounds_are_the_published_ones():
    found = [round(t.bound(128_000, RATES).bytes / 128_000, 3) for t in TASKS.values()]
    assert found == [28, 28, 26, 22, 14, 10.125, 28, 20, 20, 20, 20, 4, 2, 32, 30]


def test_clipping_apart_clips_before_the_step():
    p = nn.Parameter(torch.zeros(4))
    p.grad = torch.full((4,), 3.0)
    seen = []
    clipped(lambda: lambda params: Stepper(lambda: seen.append(params[0].grad.norm())))()(
        [p]
    ).step()
    assert seen[0].item() == pytest.approx(1)


def test_state_is_counted_once_and_through_quantized_tensors():
    class Quantized:
        codes, scale = torch.zeros(256, dtype=torch.uint8), torch.zeros(2)

        def __tensor_flatten__(self):
            return ["codes", "scale"], None

    shared = torch.zeros(8)
    stepper = Stepper(lambda: None, lambda: [shared, Quantized(), shared, torch.zeros(1).bool()])
    assert stepper.state_bytes == 4 * 8 + 256 + 2 * 4 + 1


def test_masters_of_apex_are_state_too():
    class Fused(torch.optim.SGD):
        def __init__(self, params, **options):
            super().__init__(params, lr=0.1)
            self.param_groups_master = [{"params": [p.detach().double() for p in params] + [None]}]

    from tritium.bench.optimizer_implementations import optimizer as loader

    stepper = loader(lambda: Fused)()(optimizer.parameters([(5,)], torch.float32, CPU))
    assert stepper.state_bytes == 5 * 8


def run_main(monkeypatch, *words: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(harness, "measured_device", lambda device, seconds: RATES)
    monkeypatch.setattr(harness, "cache_bytes", lambda device: 0)
    monkeypatch.setattr(sys, "argv", ["tritium.bench", "optimizer", *words])
    main()


def test_saves_plots_and_judges(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(tables, "results", lambda: tmp_path)
    words = ("--tasks", "clip + AdamW float32", "norm", "--quick", "--targets", "--save", "--plot")
    with pytest.raises(SystemExit) as exit:
        run_main(monkeypatch, *words)
    assert exit.value.code == 1  # the target is about another model
    saved = tables.load(tmp_path / "optimizer-a-machine.json")
    kinds = ["norm float32"] * 2 + ["norm bf16"] * 2 + ["clip + AdamW float32"] * 3
    assert [row.pass_name for row in saved.rows] == kinds
    assert {row.dims["N"] for row in saved.rows} == {sum(map(prod, SMALLEST))}
    assert (tmp_path / "optimizer-a-machine.png").read_bytes().startswith(b"\x89PNG")
    text = capsys.readouterr().out
    for words in (
        "optimizer, float32 and bfloat16, a machine (measured on a CPU, not a GPU)",
        "bound, B/param", "state, B/param", "% of copy", "host", "at most 150: not measured",
        "Tritium runs its PyTorch reference here",
    ):  # fmt: skip
        assert words in text, text
    assert "peak memory " not in text


@pytest.mark.parametrize(
    ("words", "found"),
    [((), CPU_MODELS), (("--models", "1.5B", "8B"), 2), (("--models", "GPT-2"), 3)],
)
def test_measures_the_models_asked_for(words, found, monkeypatch, tmp_path):
    chosen = []
    monkeypatch.setattr(
        optimizer, "measure", lambda models, tasks, settings: chosen.extend(models) or iter(())
    )
    run_main(monkeypatch, *words)
    assert len(chosen) == found
    assert set(chosen) <= set(MODELS)


@pytest.mark.parametrize(
    ("words", "message"),
    [(("--models", "9B"), "no model ['9B']; there are GPT-2"), (("--tasks", "x"), "no task ['x']")],
)
def test_refuses_what_it_does_not_have(words, message, monkeypatch, capsys):
    with pytest.raises(SystemExit, match="2"):
        run_main(monkeypatch, *words)
    assert message in capsys.readouterr().err

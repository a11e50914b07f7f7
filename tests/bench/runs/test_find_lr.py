"""The range test: rates grow by one factor, it ends where the loss has risen, and draws."""

import pytest
import torch

from tritium.bench.ends import WrongInputError
from tritium.bench.runs import find_lr
from tritium.training.command_line import parse


@pytest.fixture
def flags(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITIUM_HOME", str(tmp_path / "home"))
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"Number {i} is followed by number {i + 1}." for i in range(3000)))
    return ["tiny", "--data", str(text), "--model.n-layers", "1"]


def test_rates_grow_by_one_factor_and_weights_are_trained_by_them(flags, reference):
    config, *_ = parse(flags)
    pairs = list(find_lr.range_test(config, 1e-3, 1e-2, 11))
    rates, losses = zip(*pairs, strict=True)
    assert rates == pytest.approx([1e-3 * 10 ** (i / 10) for i in range(11)])
    assert losses[-1] < losses[0] - 0.1
    still = [loss for _, loss in find_lr.range_test(config, 1e-12, 1e-11, 11)]
    assert still[0] == pytest.approx(losses[0])
    assert abs(still[-1] - still[0]) < 0.1


def test_it_ends_where_the_loss_has_risen(flags, reference):
    config, *_ = parse(flags)
    assert len(list(find_lr.range_test(config, 1e-2, 1e3, 200))) < 150


def test_the_guess_is_below_the_lowest_loss(monkeypatch, tmp_path, capsys):
    def made_up(config, low, high, steps):
        for i in range(steps):
            lr = low * (high / low) ** (i / (steps - 1))
            yield lr, 5.0 + abs(torch.tensor(lr / 0.03).log().item())

    monkeypatch.setattr(find_lr, "range_test", made_up)
    find_lr.main(("tiny",), low=1e-4, high=1.0, steps=400, out=tmp_path / "lr.png")
    said = capsys.readouterr().out
    guess = float(said.partition("--learning-rate ")[2].split()[0].rstrip("."))
    assert 0.008 < guess < 0.016
    assert (tmp_path / "lr.png").stat().st_size > 1000


@pytest.mark.parametrize("wrong", [{"low": 0.0}, {"low": 2.0}, {"steps": 3}], ids=str)
def test_wrong_ranges_are_refused(wrong):
    with pytest.raises(WrongInputError, match="--low must be above 0"):
        find_lr.main(("tiny",), **wrong)
    with pytest.raises(WrongInputError, match="no preset 'huge'"):
        find_lr.main(("huge",))


@pytest.fixture
def reference(monkeypatch):
    """Train by the references, as on a CPU: the interpreter would take minutes."""
    from tritium.kernels import runtime

    if not torch.cuda.is_available():
        monkeypatch.setattr(runtime, "CPU_KERNELS", False)

"""The range test: rates grow by one factor, it ends where the loss has risen, and draws."""

import math

import pytest
import torch

from tritium.bench.ends import WrongInputError
from tritium.bench.runs import find_lr
from tritium.data import Tokenizer
from tritium.model import ModelConfig, Transformer
from tritium.training.command_line import parse
from tritium.training.initial import shaped


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


def test_a_test_begins_with_the_model_that_is_named(flags, reference, tmp_path, capsys):
    """Logits of 0 tell its vocabulary, which is neither the preset's nor its tokenizer's."""
    source = tmp_path / "source"
    tokenizer = Tokenizer.train([(tmp_path / "text.txt").read_text()], 300)
    model = Transformer(ModelConfig(vocab_size=310, n_layers=1, d_model=16, n_heads=2))
    torch.nn.init.zeros_(model.norm.weight)
    model.save_pretrained(source, tokenizer)
    named = [*flags[:3], "--init-from", str(source)]
    out = tmp_path / "lr.png"
    find_lr.main(tuple(named), low=1e-9, high=1e-8, steps=10, out=out)
    assert f"Weights of {source}, with a context of 64 of its" in capsys.readouterr().out
    config, *_ = parse(named)
    (_, first), *_ = find_lr.range_test(shaped(config), 1e-9, 1e-8, 10)
    assert first == pytest.approx(math.log(310), rel=1e-5)


def test_what_cannot_be_begun_or_written_is_refused_before_the_test(flags, tmp_path, monkeypatch):
    monkeypatch.setattr(find_lr, "range_test", lambda *_: pytest.fail("began"))
    (tmp_path / "file").write_text("")
    (tmp_path / "a.png").mkdir()
    for more, out, message in (
        (["--init-from", "/nowhere"], "b.png", "--init-from /nowhere: /nowhere holds no checkpo"),
        (["--resume", "--out", str(tmp_path)], "b.png", "drop --resume, or name it by --init-fr"),
        ([], "file/b.png", r"file/b.png cannot be written \((File exists|Not a directory)\); na"),
        ([], "a.png", r"a.png cannot be written \(Is a directory\); name a file elsewhere"),
        ([], "b.xyz", "--out must end with one of .* .png .*, got .*b.xyz"),
        ([], "b", "--out must end with one of .* .png .*, got .*b"),
    ):
        with pytest.raises(WrongInputError, match=message):
            find_lr.main((*flags[:3], *more), out=tmp_path / out)
    assert not (tmp_path / "b.png").exists()


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

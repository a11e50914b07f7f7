"""Ablations: effects and intervals of made-up runs, and runs of train.py that are made once."""

import shlex
from math import inf, nan

import pytest

from tritium.bench.ends import WrongInputError
from tritium.bench.runs import _trials, ablate
from tritium.bench.runs._trials import Outcome, RefusedError, Trial, TrialError, difference, run_all
from tritium.training.run.run_folder import lock_folder


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # train.py would inherit it
    monkeypatch.setenv("TRITIUM_HOME", str(tmp_path / "home"))
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"Number {i} is followed by number {i + 1}." for i in range(3000)))
    return text


def test_difference_is_of_pairs_with_students_interval():
    # Of -0.1, 0.0, 0.1: mean 0, standard error 0.1 / √3, and 4.303 of these at 2 degrees.
    effect, half = difference([1.0, 2.0, 3.0], [1.1, 2.0, 2.9])
    assert effect == pytest.approx(0.0)
    assert half == pytest.approx(4.303 * 0.1 / 3**0.5)
    assert difference([1.0], [0.5]) == (0.5, inf)
    assert str(difference([1.0, nan], [1.0, 1.0])) == "(nan, nan)"


def outcomes(**losses):
    return [
        Outcome(name, (name,), seed, 1.0, loss, 100, 1.0)
        for name, each in losses.items()
        for seed, loss in enumerate(each)
    ]


def test_the_best_change_comes_first_and_what_diverged_last(tmp_path):
    made = outcomes(
        unchanged=(2.0, 2.1, 2.2), noise=(2.1, 2.1, 2.0), bad=(2.5, 2.61, 2.69),
        good=(1.9, 2.0, 2.11), broken=(nan, 2.0, 2.0),
    )  # fmt: skip
    table = ablate.effects(made)
    names, *_, shown = (list(column.cells) for column in table.columns)
    assert names == ["good", "noise", "unchanged", "bad", "broken"]
    assert shown == ["yes", "no", "", "yes", "diverged"]


def test_the_picture_says_what_its_colors_mean(tmp_path, monkeypatch):
    made = outcomes(
        unchanged=(2.0, 2.1, 2.2), noise=(2.1, 2.1, 2.0), bad=(2.5, 2.61, 2.69),
        good=(1.9, 2.0, 2.11), broken=(nan, 2.0, 2.0), once=(1.0,),
    )  # fmt: skip
    figures = []
    monkeypatch.setattr(ablate.plt, "close", figures.append)
    ablate.plot(made, tmp_path / "effects.png")
    assert (tmp_path / "effects.png").stat().st_size > 1000
    (legend,) = figures[0].legends
    said = [x.get_text() for x in legend.get_texts()]
    seen = (0.5, 0.1), (0.0, 0.1), (-0.1, 0.05), (-1.0, inf)  # the worst first, as they are drawn
    assert said == [ablate._shown(*each)[1] for each in seen]
    colors = [ablate._shown(*each)[0] for each in seen]
    assert colors == ["tab:orange", "0.6", "tab:blue", "0.6"]
    assert [x.partition(":")[0] for x in said] == [
        "worse", "the interval holds 0", "better", "one seed, no interval"
    ]  # fmt: skip
    monkeypatch.undo()
    ablate.plt.close(figures[0])


def test_seeds_that_ended_are_compared_with_the_same_seeds():
    made = outcomes(unchanged=(2.0, 3.0, 5.0), all=(1.9, 2.9, 4.9), less=(1.0, 2.1))
    table = ablate.effects([x for x in made if (x.name, x.seed) != ("less", 0)])
    rows = list(zip(*(column.cells for column in table.columns), strict=True))
    assert [(row[0], row[1], row[3], row[4], row[-1]) for row in rows] == [
        ("less", "1", "-0.9000", "", "no"),
        ("all", "3", "-0.1000", "0.0000", "yes"),
        ("unchanged", "3", "", "", ""),
    ]
    without = ablate.pairs([x for x in made if (x.name, x.seed) != ("unchanged", 0)])
    held = {name: len(each) for name, (each, _) in without.items()}
    assert held == {"unchanged": 2, "all": 2, "less": 1}


def test_runs_are_made_once_and_their_ends_are_kept(corpus, tmp_path, monkeypatch):
    killed = tmp_path / "runs" / "0-as-it-is-0"
    killed.mkdir(parents=True)
    (killed / "log.jsonl").write_text('{"step": 1, "val_loss": 9.0}\n{"st')
    common = ["tiny", "--max-steps", "2", "--data", str(corpus)]
    trials = [Trial("as it is", (), 0), Trial("wide [b]/*", ("--model.d-model", "32"), 0)]
    first = run_all(trials, tmp_path / "runs", common)
    assert [x.name for x in first] == ["as it is", "wide [b]/*"]
    assert first[0].bits_per_byte != first[1].bits_per_byte
    assert all(x.tokens == 2 * 4 * 64 and 1 < x.bits_per_byte < 20 for x in first)
    assert all(0.5 < x.processor_seconds < 100 for x in first)  # as the start alone takes

    monkeypatch.setattr(_trials, "_run", lambda *_: pytest.fail("it was run again"))
    assert run_all(trials, tmp_path / "runs", common) == first
    trials.append(Trial("not yet", ("--seed", "3"), 0))
    assert run_all(trials, tmp_path / "runs", common, only_ended=True) == first


def test_a_run_in_progress_is_left_alone(tmp_path):
    with lock_folder(tmp_path / "0-as-it-is-0", resume=False) as run:
        (run / "log.jsonl").touch()
        with pytest.raises(RefusedError, match="is in use by process"):
            run_all([Trial("as it is", (), 0)], tmp_path, ["tiny"])
        assert (run / "log.jsonl").exists()


def test_a_run_without_a_step_is_said(tmp_path, monkeypatch):
    """Such as one that was started with less time than it takes to make the model."""
    script = tmp_path / "train.py"
    script.write_text(
        "import pathlib, sys\n"
        "run = pathlib.Path(sys.argv[-1])\n"
        "run.mkdir()\n"
        "(run / 'log.jsonl').touch()\n"
    )
    monkeypatch.setattr(_trials, "SCRIPT", script)
    with pytest.raises(TrialError, match="a, seed 1: its time had passed before the first step"):
        run_all([Trial("a", (), 1)], tmp_path / "runs", [])


def test_what_train_py_refuses_is_said(corpus, tmp_path):
    trials = [Trial("deep", ("--model.n-layers", "0"), 0)]
    with pytest.raises(RefusedError, match=r"^[^:]*n-layers") as refused:
        run_all(trials, tmp_path / "runs", ["tiny", "--data", str(corpus)])
    assert refused.value.name == "deep"
    assert not (tmp_path / "runs" / "trials.jsonl").exists()


@pytest.mark.parametrize(("name", "said"), [("wide", "wide: it refused"), ("unchanged", "it ref")])
def test_the_change_that_train_py_refuses_is_named(name, said, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise RefusedError("it refused", name)

    monkeypatch.setattr(ablate, "run_all", refuse)
    with pytest.raises(WrongInputError, match=f"^{said}"):
        ablate.main(out=tmp_path)


@pytest.mark.parametrize("name", ablate.CHANGES)
def test_every_change_is_one_that_train_py_takes(name):
    from tritium.training.command_line import parse

    config, _, _ = parse(["small", *ablate.CHANGES[name]])
    assert config != parse(["small"])[0]


def test_the_verb_trains_and_shows(corpus, tmp_path, capsys):
    ablate.main(
        ("narrow: --model.d-model 32",), preset="tiny", seeds=1, steps=2,
        flags=f"--data '{corpus}'", out=tmp_path / "out",
    )  # fmt: skip
    said = capsys.readouterr().out
    assert "narrow" in said
    assert "--flags=" + shlex.quote(f"--data '{corpus}'") in said  # else it takes them for its own
    assert (tmp_path / "out" / "ablations.png").exists()
    with pytest.raises(WrongInputError, match=r"no run without a change .*drop --ended"):
        ablate.main(out=tmp_path / "none", ended=True)
    with pytest.raises(WrongInputError, match="no change 'wider'"):
        ablate.main(("wider",))

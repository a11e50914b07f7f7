"""Prove that every verb ends with 2 and a sentence after wrong input, with 1 after a failure."""

import sys

import pytest

from tritium.bench.__main__ import VERBS, main
from tritium.bench.ends import FailedError, WrongInputError, at_least, ended, split_flags
from tritium.bench.runs import _trials, characters

WRONG = {
    "gpu": (["--minutes", "0.1"], "--minutes must be 0.5 or more, got 0.1"),
    "scale": (["--gpus", "8,x"], "gpus must be numbers with commas between them, got '8,x'"),
    "static": (["nonsense"], "no operation ['nonsense']; there are"),
    "explain": (["nonsense", "--shape", "M=1"], "op must be one of"),
    "host": (["nonsense"], "unset TRITON_INTERPRET"),  # which the tests set
    "step": (["--heads", "7"], "n_heads must divide d_model, got 7 heads for width 768"),
    "optimizer": (["--models", "9B"], "no model ['9B']; there are"),
    "resume": (["--runs", "-1"], "--runs must be at least 0, got -1"),
    "faults": (["--nonsense"], ""),
    "parallel_faults": (["--kills", "-1"], "--kills must be at least 0, got -1"),
    "two_hosts": (["--nonsense"], ""),
    "chunk_error": (["--T", "0"], "--T must be at least 1, got 0"),
    "low_precision": (["--seeds", "1"], "--seeds must be at least 2 to have a spread, got 1"),
    "residual": (["--seeds", "1"], "two seeds or more have a standard error, got 1"),
    "ablate": (["wider"], "no change 'wider'; give 'NAME: FLAGS', or one of"),
    "scaling": (["--seeds", "0"], "--seeds must be at least 1, got 0"),
    "tokens_to_loss": (["--steps", "39"], "--steps must be at least 40, got 39"),
    "characters": (["--flags", "'"], '--flags cannot be read: No closing quotation, got "\'"'),
    "find_lr": (["huge"], "there is no preset 'huge'; choose one of"),
    "trainer": (["--steps", "0"], "--steps must be at least 1, got 0"),
    "activations": (["--sequences", "0"], "--sequences must be at least 1, got 0"),
    "reversible": (["--seeds", "1"], "two seeds or more have a standard error, got 1"),
    "parallel": (["--steps", "3"], "--steps must be even, at least 2, got 3"),
    "report": ([], "name the folder of a run of train.py, or several"),
    "pictures": (["/nowhere"], "/nowhere holds no run"),
    "data": (["--mb", "nan"], "--mb must be at least 0.1, got nan"),
    "throughput": (["--threads", "0"], "--threads must be at least 1, got 0"),
    "generation": (["--shape", "nonsense"], "there is no shape 'nonsense'"),
    "cpu_record": (["--seeds", "2"], "--seeds must be at least 3, got 2"),
    "contention": (["--settle", "-1"], "--settle must be at least 0, got -1"),
}
"""A wrong command line of each verb, and what must be said; nothing where tyro says it."""


def run_main(monkeypatch, *words: str) -> int | str | None:
    """Return the status that the command ends with."""
    monkeypatch.setattr(sys, "argv", ["bench", *words])
    with pytest.raises(SystemExit) as exit:
        main()
    return exit.value.code


def test_every_verb_is_asked():
    assert WRONG.keys() == VERBS.keys()


@pytest.mark.parametrize("verb", VERBS)
def test_wrong_input_ends_with_2_and_a_sentence(verb, monkeypatch, capsys):
    words, sentence = WRONG[verb]
    assert run_main(monkeypatch, verb, *words) == 2
    shown, said = capsys.readouterr()
    assert not shown
    if sentence:
        assert sentence in said
        assert said.startswith(f"bench {verb}: ")
        assert said.count(f"{verb}: ") == 1
        assert "Traceback" not in said


BAD_DATA = {
    "scaling": ["--data", "/nowhere"],
    "tokens_to_loss": ["--data", "/nowhere"],
    "ablate": ["--flags=--data /nowhere"],
    "characters": ["--data", "/nowhere"],
    "find_lr": ["--", "tiny", "--data", "/nowhere"],
}


@pytest.mark.slow
@pytest.mark.parametrize("verb", BAD_DATA)
def test_text_that_is_not_there_is_one_plain_sentence(verb, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)  # for runs/
    assert run_main(monkeypatch, verb, *BAD_DATA[verb]) == 2
    sentence = "there is no file or folder /nowhere; a dataset of the hub is hf://NAME"
    assert capsys.readouterr().err.strip() == f"bench {verb}: {sentence}"


def test_a_failure_ends_with_1_and_what_is_no_end_passes(capsys):
    with pytest.raises(SystemExit) as exit, ended("bench step"):
        raise FailedError("the profiler saw no kernel")
    assert exit.value.code == 1
    assert capsys.readouterr().err == "bench step: the profiler saw no kernel\n"
    with pytest.raises(ValueError, match="a fault of the code"), ended("bench step"):
        raise ValueError("a fault of the code")


def test_numbers_and_flags():
    at_least(1, seeds=1, steps=2)
    with pytest.raises(WrongInputError, match="--micro-batches must be at least 1, got 0"):
        at_least(1, seeds=1, micro_batches=0)
    assert split_flags("--data 'a b'") == ["--data", "a b"]


def test_a_folder_of_runs_that_cannot_be_made_is_wrong_input(tmp_path):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "runs"):
        for make in (
            lambda out: _trials.run_all([], out, []),
            lambda out: _trials.once(out, "key", dict, dict),
            lambda out: characters.main(out=out),
        ):
            with pytest.raises(WrongInputError, match=rf"^--out {out}\S+ cannot be written \("):
                make(out)


def test_the_status_of_train_py_decides(tmp_path):
    log = tmp_path / "log.txt"
    log.write_text("a warning\ntrain.py: a sentence\nin two lines; fix\n")
    _trials.check_status(0, log, "wide")
    with pytest.raises(_trials.RefusedError, match=r"^a sentence\nin two lines; fix$") as refused:
        _trials.check_status(2, log, "wide")
    assert refused.value.name == "wide"
    with pytest.raises(_trials.TrialError, match=r"wide: train.py ended with status 70: in two"):
        _trials.check_status(70, log, "wide")
    log.write_text("")
    with pytest.raises(_trials.RefusedError, match="nothing said"):
        _trials.check_status(2, log, "wide")

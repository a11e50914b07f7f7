"""Every fault can be planted: its line is in the file that the table names, exactly once."""

from pathlib import Path

import pytest

from tests.mutants import Mutant
from tests.mutants import __main__ as command
from tests.mutants.__main__ import OPS, file_of, mutants, sample

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("op", OPS)
def test_applies(op):
    assert file_of(op).exists()
    for mutant in mutants(op):
        source = (ROOT / mutant.file).read_text()
        mutated = mutant.apply(source)
        assert mutated != source, mutant.what
        compile(mutated, mutant.file, "exec")


def test_refuses_a_stale_table():
    mutant = Mutant("stale", "file.py", original="a", replacement="b")
    with pytest.raises(ValueError, match="must hold 'a' once, got 2 times; rewrite"):
        mutant.apply("a a")


def test_sample_is_the_same_for_a_seed_and_of_every_table():
    """A part of the operations, run alone, has the same faults as in the run of all."""
    everything = [(op, mutant) for op in OPS for mutant in mutants(op)]
    assert sample(len(everything), 3) == sample(10**6, 0) == everything
    first = sample(60, 0)
    assert first == sample(60, 0) != sample(60, 1)
    assert len({(op, mutant.what) for op, mutant in first}) == 60
    assert set(first) < set(everything)


def test_a_survivor_is_named_and_fails_the_run(monkeypatch, capsys):
    survivor = mutants("swiglu")[1].what
    killer = {survivor: "", "nothing": ""}
    monkeypatch.setattr(command, "run", lambda op, mutant: killer.get(mutant.what, "test_x[1]"))
    assert command.main(["swiglu"]) == 1
    count = len(mutants("swiglu"))
    printed = capsys.readouterr().out
    assert printed.splitlines()[1] == f"swiglu: {survivor}: SURVIVED"
    assert printed.count("killed by test_x[1]\n") == count - 1
    assert printed.endswith(f"{count - 1} of {count} faults killed\n")
    monkeypatch.setattr(command, "run", lambda op, mutant: "test_y")
    assert command.main(["swiglu"]) == 2  # fails without a fault, too

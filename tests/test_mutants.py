"""Every fault can be planted: its line is in the file that the table names, exactly once."""

from pathlib import Path

import pytest

from tests.mutants import Mutant
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

"""Every fault can be planted: its line is in the file that the table names, exactly once."""

from pathlib import Path

import pytest

from tests.mutants import Mutant
from tests.mutants.__main__ import OPS, file_of, mutants

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

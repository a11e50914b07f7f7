"""Characters: both are trained on the same text once, and the reference is nanoGPT's recipe."""

from math import log

import pytest

from tritium.bench import tables
from tritium.bench.runs import characters
from tritium.bench.runs.characters import Run
from tritium.data import prepare


@pytest.fixture
def text(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITIUM_HOME", str(tmp_path / "home"))
    folder = tmp_path / "text"
    folder.mkdir()
    for i in range(60):
        (folder / f"{i}.txt").write_text(f"Number {i} is followed by number {i + 1}.\n" * 5)
    return folder


def test_the_recipe_learns_and_its_rate_is_that_of_nanogpt(text):
    """From 1e-3 behind the warm-up to 1e-4 at the end; a few steps lower the loss."""
    folder = prepare(text, tokenizer="characters", progress=False)
    untrained, trained = (characters.reference(folder, 0, steps).loss for steps in (0, 40))
    assert untrained == pytest.approx(log(257), rel=0.05)
    assert trained < untrained - 1
    rates = [characters._rate(step, 2000) for step in range(2000)]
    assert max(rates) == rates[100] == pytest.approx(1e-3)
    assert rates[-1] == pytest.approx(1e-4, rel=1e-3)
    assert rates[:101] == sorted(rates[:101])


def test_what_ended_is_not_trained_again_and_the_table_has_both(text, tmp_path, monkeypatch):
    made = {"reference": [], "preset": []}

    def run(name, loss):
        def train(_where, seed, *_):
            made[name].append(seed)
            return Run(loss + seed, 10.0, 5.0)

        return train

    monkeypatch.setattr(characters, "reference", run("reference", 2.0))
    out = tmp_path / "out"
    monkeypatch.setattr(characters, "preset", run("preset", 1.75))
    shown = []
    monkeypatch.setattr(tables, "present", lambda lines, table, **_: shown.append((lines, table)))
    characters.main(text, seeds=2, out=out)
    characters.main(text, seeds=3, out=out)
    assert made == {"reference": [0, 1, 2], "preset": [0, 1, 2]}
    lines, table = shown[-1]
    assert "Difference -0.2500 ± 0.0000" in lines[-1]
    assert [*table.columns[3].cells] == ["-0.2500"] * 3


def test_the_text_that_is_written_is_about_a_megabyte_and_stays_as_it_is(tmp_path):
    """Not written again, so that what was prepared of it, and the runs' keys, are found again."""
    first, second = (
        {file.name: file.read_text() for file in characters.write_text(tmp_path / name).iterdir()}
        for name in "ab"
    )
    stamps = {file: file.stat().st_mtime_ns for file in (tmp_path / "a").iterdir()}
    characters.write_text(tmp_path / "a")
    assert stamps == {file: file.stat().st_mtime_ns for file in (tmp_path / "a").iterdir()}
    assert first == second
    assert 1_000_000 <= sum(map(len, first.values())) < 1_300_000

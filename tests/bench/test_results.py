"""Prove where benchmarks keep their results, and that each verb is explained."""

import sys

import pytest
from rich.table import Table

from tritium.bench import tables
from tritium.bench.__main__ import VERBS, main


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    kept = tmp_path / "checkout" / "inside" / "bench" / "results"
    kept.mkdir(parents=True)
    (tmp_path / "checkout" / "pyproject.toml").touch()
    monkeypatch.setattr(tables, "KEPT", kept)
    return tmp_path / "checkout"


def test_at_the_root_of_a_checkout_results_are_kept_there(checkout, monkeypatch):
    monkeypatch.chdir(checkout)
    assert tables.results() == tables.KEPT


def test_elsewhere_they_lie_where_the_user_stands(checkout, tmp_path, monkeypatch):
    for folder in (tmp_path, checkout / "inside"):
        monkeypatch.chdir(folder)
        assert tables.results() == folder / "bench-results"


def test_never_in_a_package_that_is_installed(checkout, monkeypatch):
    monkeypatch.chdir(checkout)  # a user's project, with its environment in it
    installed = checkout / ".venv" / "lib" / "site-packages" / "bench" / "results"
    monkeypatch.setattr(tables, "KEPT", installed)
    assert tables.results() == checkout / "bench-results"
    installed.mkdir(parents=True)
    assert tables.results() == checkout / "bench-results"


def test_what_is_presented_is_written_as_markdown(tmp_path, monkeypatch, capsys):
    table = Table("a [b]", "c")
    table.add_row("1", "2")
    path = tmp_path / "made" / "x.md"
    tables.present(["a line [b]", "more"], table, width=80, write_to=None)
    assert not path.parent.exists()
    tables.present(["a line [b]", "more"], table, width=80, write_to=path)
    assert "| 1" in path.read_text()
    assert path.read_text().startswith("a line [b]\n\nmore\n")
    assert capsys.readouterr().out.count("a line [b]") == 2


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"], ["help"], ["nonsense"], ["--nonsense"]])
def test_help_explains_each_verb_in_a_line(words, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench", *words])
    with pytest.raises(SystemExit) as exit:
        main()
    wrong = "nonsense" in "".join(words)
    assert exit.value.code == (2 if wrong else 0)
    shown, errors = capsys.readouterr()
    text = errors if wrong else shown
    assert not (shown if wrong else errors)
    for verb, (_, what) in VERBS.items():
        assert any(line.split() == [verb, *what.split()] for line in text.splitlines())
    assert all(len(line) <= 100 for line in text.splitlines())

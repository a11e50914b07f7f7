"""Prove that an entry of docs/cpu says what its runs did, counts when they were not disturbed, and
compares by Welch's interval, and that the table of docs/cpu.md is that of the entries."""

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tritium.bench.runs import cpu_entries
from tritium.bench.runs._trials import SCRIPT, interval, welch
from tritium.bench.runs.cpu_entries import Entry, EntryError, Run, best_before, verdict

DOCS = SCRIPT.parent / "docs"


def run(seed=0, loss=1.5, **changed):
    found = Run(seed, loss, loss - 0.04, 700, 700 * 2048, 179.0, 320.0, 0.97)
    return replace(found, **changed)


def entry(*losses, date="2026-01-01T00:00:00Z", cpu="A", protocol=1, runs=None, uncommitted=False):
    runs = runs or tuple(run(i, x) for i, x in enumerate(losses))
    return Entry(
        protocol, date, "a | name", "0123456789", uncommitted, cpu, 1e11, {"torch": "2.13.0"},
        "python -m tritium.bench cpu_record", "small", ("seed: 1, now 2",), runs,
    )  # fmt: skip


def test_the_table_of_the_page_is_that_of_the_entries():
    page = (DOCS / "cpu.md").read_text()
    assert cpu_entries.page(page, cpu_entries.load_all(DOCS / "cpu")) == page


def test_an_entry_is_read_as_it_was_written_and_says_its_mean_to_others(tmp_path):
    kept = entry(1.5, 1.52, 1.54)
    file = cpu_entries.save(kept, tmp_path)
    assert file.name == "20260101T000000Z-0123456.json"
    assert cpu_entries.load_all(tmp_path) == [kept]
    said = json.loads(file.read_text())
    assert said["mean"] == pytest.approx(1.52)
    assert said["half_of_95_percent_interval"] == pytest.approx(4.303 * 0.02 / 3**0.5)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda x: x | {"mean": 1.4}, "mean and interval must be"),
        (lambda x: {k: v for k, v in x.items() if k != "runs"}, "is no entry"),
        (lambda x: x | {"another": 1}, "is no entry"),
        (lambda x: x | {"runs": [{**x["runs"][0], "bits_per_byte": 1.0}]}, "mean and interval"),
        (lambda x: [x], "is no entry"),
    ],
)
def test_a_file_that_was_changed_by_hand_is_refused(change, words, tmp_path):
    file = cpu_entries.save(entry(1.5, 1.52, 1.54), tmp_path)
    file.write_text(json.dumps(change(json.loads(file.read_text()))))
    with pytest.raises(EntryError, match=words):
        cpu_entries.load(file)


@pytest.mark.parametrize(
    ("changed", "mark"),
    [
        ({"share": 0.9, "seconds": 183.6}, None),
        ({"share": 0.899}, "busy: 90% of its cores"),
        ({"seconds": 183.7}, "took 184 s"),
    ],
)
def test_one_run_that_was_disturbed_marks_the_entry(changed, mark):
    found = entry(runs=(run(0), run(1, **changed), run(2)))
    assert found.marks == ([mark] if mark else [])
    assert verdict(found, []) == (f"does not count: {mark}" if mark else "first on this CPU")


def test_code_that_nobody_can_fetch_marks_the_entry():
    assert entry(1.5, 1.6, 1.7, uncommitted=True).marks == ["changes not committed"]


@pytest.mark.parametrize(
    ("losses", "word"),
    [
        ((1.40, 1.41, 1.42), "better: -0.1000 ± 0.02"),
        ((1.60, 1.61, 1.62), "worse: +0.1000 ± 0.02"),
        ((1.49, 1.50, 1.51), "not shown: -0.0100 ± 0.02"),
    ],
)
def test_the_verdict_is_that_of_the_interval_of_the_difference(losses, word):
    later = entry(*losses, date="2026-02-01T00:00:00Z")
    assert verdict(later, [entry(1.50, 1.51, 1.52)]).startswith(word)


def test_the_best_older_entry_of_the_same_cpu_and_protocol_that_counts_is_compared_with():
    older = [
        entry(1.3, 1.3, 1.3, cpu="B"), entry(1.2, 1.2, 1.2, protocol=2),
        entry(1.1, 1.1, 1.1, uncommitted=True), entry(1.0, 1.0, 1.0, date="2026-03-01T00:00:00Z"),
        best := entry(1.5, 1.5, 1.5), entry(1.6, 1.6, 1.6),
    ]  # fmt: skip
    later = entry(1.4, 1.4, 1.4, date="2026-02-01T00:00:00Z")
    assert best_before(later, [*older, later]) is best
    assert best_before(best, [*older, later]) is None


def test_the_table_has_the_best_first_and_what_does_not_count_last():
    entries = [entry(1.6, 1.6, 1.6), entry(1.1, 1.1, 1.1, uncommitted=True), entry(1.5, 1.5, 1.5),
               entry(1.7, 1.7, 1.7, protocol=2)]  # fmt: skip
    head, *rows = cpu_entries.page(f"A.\n{cpu_entries.MARKER}old\n", entries).splitlines()
    assert head == "A."
    rows = [[x.strip() for x in row.strip("|").split("|")] for row in rows if row.startswith("|")]
    assert {len(row) for row in rows} == {10}
    assert [row[1][:6] for row in rows[2:]] == ["1.7000", "1.5000", "1.6000", "1.1000"]
    assert rows[3][6] == f"{700 * 2048 / 179:,.0f}"
    with pytest.raises(EntryError, match="must have the line"):
        cpu_entries.page("A.\n", entries)


@given(st.integers(2, 9), st.floats(0.01, 1.0))
def test_welchs_interval_has_the_freedom_of_both_spreads(n, spread):
    values = [spread * i for i in range(n)]
    same = [x + 1 for x in values]
    difference, half = welch(same, values)
    assert difference == pytest.approx(1.0)
    pooled = interval([0.0] * 2 * n)[1] + 2**0.5 * interval(values)[1]  # the first is 0
    points = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179,
              2.160, 2.145, 2.131, 2.120)  # fmt: skip
    assert half == pytest.approx(pooled * points[2 * n - 3] / points[n - 2])
    # Of values that do not differ there is nothing to learn of the spread.
    assert welch(values, [3.0] * 5)[1] == pytest.approx(interval(values)[1])


def test_welchs_freedom_is_rounded_down():
    # Variances 1 and 4 of three each: (1 + 4)² / ((1² + 4²) / 2) = 2.94.
    assert welch([0.0, 1.0, 2.0], [0.0, 2.0, 4.0])[1] == pytest.approx(4.303 * (5 / 3) ** 0.5)
    assert welch([1.0, 1.0], [2.0, 2.0, 2.0]) == (-1.0, 0.0)

"""Prove that the protocol for CPUs takes no other text, cores, clock or settings than its own, and
that one command runs every seed and writes the entry."""

import hashlib
import os
import subprocess
from math import log2
from pathlib import Path
from types import SimpleNamespace

import pytest

from tritium.bench.ends import WrongInputError
from tritium.bench.runs import cpu_entries, cpu_record, cpu_text
from tritium.bench.runs._trials import SCRIPT, TrialError
from tritium.bench.runs.cpu_record import Waits, asked, cpu_name, two_cores
from tritium.data import Tokenizer
from tritium.data.shards import Shard
from tritium.model.transformer import ModelConfig, Transformer
from tritium.training.validation import ConfigError

OWN = "--device", "cpu", "--threads", "2", "--max-minutes", "3"


# The text.


@pytest.fixture
def library(tmp_path):
    """A library whose sums begin with bytes on both sides of the boundary."""
    folder, sums, i = tmp_path / "lib", {}, 0
    wanted = {f"{x:02x}" for x in (0, 12, 13, 255)}
    while wanted:
        text, i = f"# {i}\n" + "x = 1\n" * 40, i + 1
        digest = hashlib.sha256(text.encode()).hexdigest()
        if digest[:2] in wanted:
            wanted.remove(digest[:2])
            file = folder / f"in_{digest[:2]}" / "a.py"
            file.parent.mkdir(parents=True)
            file.write_text(text)
            sums[f"in_{digest[:2]}/a.py"] = digest
    return folder, sums


def test_one_in_twenty_is_held_out_and_never_copied(library, tmp_path):
    folder, sums = library
    (folder / "in_ff" / "more.py").write_text("not of the text")
    known, held_out = cpu_text.write_text(folder, tmp_path / "out", sums)
    assert sorted(x.parent.name for x in known.rglob("*.py")) == ["in_0d", "in_ff"]
    assert held_out == [(folder / x / "a.py").read_text() for x in sums_held(sums)]
    stamp = (known / "in_ff" / "a.py").stat().st_mtime_ns
    assert cpu_text.write_text(folder, tmp_path / "out", sums) == (known, held_out)
    assert (known / "in_ff" / "a.py").stat().st_mtime_ns == stamp  # what was prepared is found


def sums_held(sums):
    return [x.split("/")[0] for x in sums if x.startswith(("in_00", "in_0c"))]


def test_another_library_is_refused_with_its_files(library, tmp_path):
    folder, sums = library
    (folder / "in_00" / "a.py").unlink()
    with pytest.raises(WrongInputError, match=r"of its 4 files 1 are missing \(in_00/a.py\) in"):
        cpu_text.write_text(folder, tmp_path / "out", sums)
    (folder / "in_ff" / "a.py").write_text("x")
    words = (
        r"library of CPython 3.11.7; of its 4 files 1 are missing \(in_00/a.py\) and 1 are others "
        r"\(in_ff/a.py\) in .*lib; name that library by --text"
    )
    with pytest.raises(WrongInputError, match=words):
        cpu_text.write_text(folder, tmp_path / "out", sums)
    assert not (tmp_path / "out").exists()


def test_a_copy_that_was_changed_is_refused(library, tmp_path):
    known, _ = cpu_text.write_text(*library[:1], tmp_path, library[1])
    (known / "more.py").write_text("a hint")
    with pytest.raises(WrongInputError, match=r"holds more than the text \(more.py\); delete it"):
        cpu_text.write_text(library[0], tmp_path, library[1])
    (known / "in_ff" / "a.py").write_text("a hint")
    with pytest.raises(WrongInputError, match=r"a\.py was changed; delete"):
        cpu_text.write_text(library[0], tmp_path, library[1])


def test_the_text_of_protocol_1_is_frozen():
    """With other sums, entries no longer compare: raise the version, and add a file of sums."""
    content = cpu_text.SUMS.read_bytes()
    digest = "621b09d87f30570153613edfdc81ee9f6113e3bc905d64070783dd1883afd996"
    assert (cpu_entries.PROTOCOL, hashlib.sha256(content).hexdigest()) == (1, digest)
    sums = cpu_text.read_sums()
    held_out = [x for x in sums.values() if cpu_text.is_held_out(x)]
    assert (len(sums), len(held_out)) == (610, 28)
    assert sum(n for n, _ in cpu_text.SPLIT.values()) == 610 - 28 - 3  # three are empty


def test_a_split_that_moved_is_refused():
    def manifest(bytes_of_val):
        train, val = cpu_text.SPLIT.values()
        return SimpleNamespace(splits={
            "train": [Shard("", 1, train[0] - 1, train[1] - 5, ""), Shard("", 1, 1, 5, "")],
            "val": [Shard("", 1, val[0], bytes_of_val, "")],
        })  # fmt: skip

    cpu_text.check_split(manifest(606_304))
    with pytest.raises(WrongInputError, match="raise the version of the protocol"):
        cpu_text.check_split(manifest(606_305))


# Settings, cores and clock.


def test_settings_that_differ_from_the_preset_are_named():
    config, said = asked("small", OWN, ("--learning-rate", "8e-3", "--tokenizer", "characters"))
    assert config.length.max_minutes == 3.0
    assert said == ["schedule.learning_rate: 0.017, now 0.008", "tokenizer: None, now characters"]
    assert asked("small", OWN, ())[1] == []
    assert any(
        x.startswith("model.n_layers: 3, now 2") for x in asked("small", OWN, ("--depth", "2"))[1]
    )


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--data", "x.txt"), "the protocol sets this, leave it out: data: None, now x.txt"),
        (("--seed", "3"), "seed: 1, now 3"),
        (("--threads", "4"), "threads: 2, now 4"),
        (("--max-minutes", "4"), "length.max_minutes: 3.0, now 4.0"),
        (("--max-steps", "9"), "exclude each other; drop one"),
        (("--save-every", "7"), "saving.save_every"),
        (("--tokenizer", "x.json"), "tokenizer: x.json, of another text"),
        (("--out", "x"), "out: None, now x"),
        (("--nonsense", "1"), "there is no --nonsense"),
        (("small",), "flags of train.py behind two dashes, .* got small"),
    ],
)
def test_what_the_protocol_sets_stays(flags, words):
    with pytest.raises((WrongInputError, ConfigError), match=words):
        asked("small", OWN, flags)


def topology(folder, cores):
    for cpu, core in enumerate(cores):
        place = folder / f"cpu{cpu}" / "topology"
        place.mkdir(parents=True)
        (place / "core_id").write_text(f"{core}\n")
        (place / "physical_package_id").write_text("0\n")
    return folder


def test_two_threads_of_a_core_are_one_core(tmp_path, monkeypatch):
    monkeypatch.setattr(cpu_record, "usable_cores", lambda: 4)
    system = topology(tmp_path, [0, 0, 1, 1])
    assert two_cores({0, 1, 2, 3}, system) == [0, 2]
    assert two_cores({1, 3}, system) == [1, 3]
    assert two_cores({5, 4}, tmp_path / "nothing") == [4, 5]
    with pytest.raises(WrongInputError, match="needs 2 cores, and this process may use 1"):
        two_cores({0, 1}, system)
    monkeypatch.setattr(cpu_record, "usable_cores", lambda: 1)  # a container's quota
    with pytest.raises(WrongInputError, match="may use 1"):
        two_cores({0, 2}, system)


def test_a_processor_is_named_with_its_family(tmp_path):
    (tmp_path / "x").write_text(
        "model name\t: EPYC\ncpu family\t: 25\nmodel\t\t: 17\n\nmodel\t: 9\n"
    )
    assert cpu_name(tmp_path / "x") == "EPYC (family 25, model 17)"


def test_the_share_is_of_the_time_in_which_threads_wanted_a_core(tmp_path):
    def count(thread, ran, waited):
        file = tmp_path / "7" / "task" / thread / "schedstat"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{int(ran * 1e9)} {int(waited * 1e9)} 5\n")
        return file

    waits = Waits([0, 3], tmp_path)
    ended = count("8", 1.0, 0.5)
    count("9", 2.0, 0.0)
    waits.look(7)
    ended.unlink()
    count("9", 7.0, 1.5)
    waits.look(7)
    assert waits.share() == pytest.approx(8 / 10)
    ticks = os.sysconf("SC_CLK_TCK")

    def stolen(*seconds):
        lines = [f"cpu{i} 1 2 3 4 5 6 7 {int(x * ticks)} 0 0" for i, x in enumerate(seconds)]
        (tmp_path / "stat").write_text("\n".join(["cpu 1 2 3 4 5 6 7 99 0 0", *lines, "intr 1"]))

    stolen(1, 50, 50, 2)
    process = SimpleNamespace(pid=7, wait=lambda _: stolen(2, 90, 90, 3))
    waits.watch(process)  # 2 s of the cores 0 and 3
    assert waits.share() == pytest.approx(6 / 10)


def test_a_process_is_watched_to_its_end_and_without_counts_nothing_is_claimed(tmp_path):
    (tmp_path / "stat").write_text("cpu0 1 2 3 4 5 6 7 8 9\n")
    waits = Waits([0], tmp_path)
    with subprocess.Popen(["sleep", "0.1"]) as process:
        waits.watch(process)
        assert process.returncode == 0
    with pytest.raises(TrialError, match="does not count how long threads wait"):
        waits.share()


def test_the_loss_is_that_of_each_document_alone_in_bits_per_byte(monkeypatch):
    """Each token is worth log2 of the vocabulary to a model that knows nothing."""
    documents = ["abc abc abc", "añb" * 30]
    tokenizer = Tokenizer.train(documents, 300, characters=True)
    model = Transformer(
        ModelConfig(
            vocab_size=tokenizer.vocab_size, n_layers=1, d_model=16, n_heads=1, max_seq_len=8
        )
    ).eval()
    for p in model.parameters():
        p.data.zero_()
    monkeypatch.setattr(cpu_record, "read", lambda *_, checkpoint: (model, tokenizer))
    tokens = sum(len(tokenizer.encode(x)) for x in documents)
    expected = tokens * log2(tokenizer.vocab_size) / sum(len(x.encode()) for x in documents)
    assert cpu_record.measured(Path("run"), documents) == pytest.approx(expected, rel=1e-5)


# The verb.


@pytest.fixture
def protocol(library, tmp_path, monkeypatch):
    """The protocol on another text, with runs that are not made; returns their commands."""
    folder, sums = library
    page = tmp_path / "docs" / "cpu.md"
    (page.parent / "cpu").mkdir(parents=True)
    page.write_text(f"Rules.\n{cpu_entries.MARKER}")
    made = []

    def train(trial, run, environment, wait):
        made.append((trial, environment))
        return [{"val_loss": 2.0, "val_bits_per_byte": 1.4, "step": 700, "tokens": 700 * 2048,
                 "tokens_per_s_overall": 8000}, {"step": 700}]  # fmt: skip

    monkeypatch.setenv("TRITIUM_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(cpu_text, "read_sums", lambda: sums)
    monkeypatch.setattr(cpu_text, "check_split", lambda _: None)
    monkeypatch.setattr(cpu_record, "DOCS", page.parent)
    monkeypatch.setattr(cpu_record, "two_cores", lambda _: [0, 1])
    monkeypatch.setattr(cpu_record.os, "sched_setaffinity", lambda *_: None)
    monkeypatch.setattr(cpu_record.torch, "set_num_threads", lambda _: None)
    monkeypatch.setattr(cpu_record, "matrix_rate", lambda *_: 1e11)
    monkeypatch.setattr(cpu_record, "_commit", lambda: ("abcdef0123", False))
    monkeypatch.setattr(cpu_record, "train_by_script", train)
    monkeypatch.setattr(cpu_record, "measured", lambda run, held_out: (
        made[-1][0].seed / 100 + 1.5 - 0.1 * ("7e-3" in made[-1][0].arguments)
        + (len(held_out) != 2)
    ))  # fmt: skip
    monkeypatch.setattr(cpu_record.Waits, "share", lambda _: 0.95)

    def call(*flags, date, **options):
        monkeypatch.setattr(cpu_record.time, "strftime", lambda *_: date)
        cpu_record.main(flags, preset="characters", text=folder, out=tmp_path / "out", **options)

    return SimpleNamespace(call=call, made=made, page=page)


def test_one_command_runs_every_seed_and_writes_entry_and_table(protocol, capsys):
    protocol.call(date="2026-01-01T00:00:00Z", write=True)
    assert [x.seed for x, _ in protocol.made] == [0, 1, 2]
    trial, environment = protocol.made[0]
    config, *_ = cpu_record.parse([*trial.arguments])
    assert (config.threads, config.device, config.length.max_minutes) == (2, "cpu", 3.0)
    assert config.data.endswith("/text-1/known")
    assert "OMP_NUM_THREADS" not in environment
    assert environment["TRITIUM_HOME"]
    said = capsys.readouterr().out
    assert "1.5100 ± 0.0248 bits per byte; first on this CPU" in said
    protocol.call("--learning-rate", "7e-3", date="2026-01-02T00:00:00Z", write=True, name="fast")
    assert "better: -0.1000 ± 0.0227 beside that of 2026-01-01" in capsys.readouterr().out
    older, newer = cpu_entries.load_all(protocol.page.parent / "cpu")
    assert newer.command.endswith(
        "--name fast --preset characters --seeds 3 -- --learning-rate 7e-3"
    )
    assert newer.settings == ("schedule.learning_rate: 0.008, now 0.007",)
    assert older.runs[2].seconds == pytest.approx(700 * 2048 / 8000)
    page = protocol.page.read_text()
    assert page.startswith("Rules.\n")
    assert page == cpu_entries.page(page, [older, newer])
    assert page.index("1.4100") < page.index("1.5100")


def test_what_ended_is_not_run_again_and_nothing_is_kept_unasked(protocol):
    before = protocol.page.read_text()
    protocol.call(date="2026-01-01T00:00:00Z")
    protocol.call(date="2026-01-02T00:00:00Z")
    assert len(protocol.made) == 3
    assert protocol.page.read_text() == before
    assert not [*(protocol.page.parent / "cpu").iterdir()]


def test_two_seeds_are_refused_and_a_run_that_diverged_is_no_entry(protocol, monkeypatch):
    with pytest.raises(WrongInputError, match=r"^--seeds must be at least 3, got 2"):
        protocol.call(date="", seeds=2)
    monkeypatch.setattr(cpu_record, "train_by_script", lambda *_: None)
    with pytest.raises(TrialError, match=r"^characters, seed 0: diverged; see"):
        protocol.call(date="", write=True)
    assert not [*(protocol.page.parent / "cpu").iterdir()]


def test_the_commit_is_the_checkouts_and_changed_code_is_noticed(tmp_path, monkeypatch):
    def git(*words):
        author = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
        done = subprocess.run(
            ["git", *author, *words], cwd=tmp_path, capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    monkeypatch.setattr(cpu_record, "SCRIPT", tmp_path / SCRIPT.name)
    with pytest.raises(WrongInputError, match="an entry names its commit, and git does not say it"):
        cpu_record._commit()
    git("init", "--quiet")
    (tmp_path / "bench").mkdir()  # each a file here, a folder there
    for name in (*cpu_record.CODE, "notes.md"):
        (tmp_path / name).write_text("as it is")
    git("add", ".")
    git("commit", "--quiet", "--message", "First")
    assert cpu_record._commit() == (git("rev-parse", "HEAD"), False)
    (tmp_path / "notes.md").write_text("changed")
    assert cpu_record._commit()[1] is False
    (tmp_path / cpu_record.CODE[0]).write_text("changed")
    assert cpu_record._commit()[1] is True

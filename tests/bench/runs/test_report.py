"""Prove that the page of runs holds what the runs left, and nothing that needs a network."""

import base64
import json
import re
from math import inf, nan

import pytest

from tritium.bench.ends import WrongInputError
from tritium.bench.runs import report
from tritium.bench.runs.report import RunError, render

MACHINE = {"device": "CPU", "threads": 1, "dtype": "torch.float32"}
EVIL = '</script><script>alert(1)</script> <!-- "\u2028'


def make_run(folder, *, steps=1200, lr=1e-3, text="def f():"):
    folder.mkdir(parents=True)
    config = {"batch_size": 4, "out": str(folder), "schedule": {"learning_rate": lr}}
    record = {"preset": "tiny", "config": config, "fingerprint": {"machine": MACHINE}}
    (folder / "config.json").write_text(json.dumps(record))
    log = [
        {"step": i, "tokens": 256 * i, "loss": 9 - i / steps, "lr": lr, "grad_norm": 1.0,
         "tokens_per_s": 1000 + i}
        for i in range(1, steps + 1)
    ]  # fmt: skip
    for entry in log:
        if entry["step"] in (5, 6, 40):
            entry["grad_norm"] = inf
        if entry["step"] == 200:
            entry |= {"loss": nan, "skipped": "loss not finite"}  # which is in events.jsonl
        if entry["step"] == 100:
            entry["loss"] = nan
    for i in (600, 1200):
        log[min(i, steps) - 1] |= {"val_loss": 5 - i / 1200, "val_bits_per_byte": 2.0}
    samples = [{"step": i, "prompt": "def", "text": f"{text} {i}"} for i in range(0, 100, 10)]
    samples.insert(3, {**samples[2], "text": "of a step that is done again"})
    samples[2], samples[3] = samples[3], samples[2]
    events = [{"step": 30, "kind": "resume", "time": "now", "text": "Resumed."}]
    for name, entries in (("log", log), ("samples", samples), ("events", events)):
        lines = "".join(json.dumps(entry) + "\n" for entry in entries)
        (folder / f"{name}.jsonl").write_text(lines)
    return folder


def data_of(page):
    found = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert len(found) == 1
    return json.loads(found[0])


def test_the_page_holds_the_runs(tmp_path):
    runs = make_run(tmp_path / "a"), make_run(tmp_path / "b", lr=2e-3, text=EVIL)
    layers = {"embedding": [1.0, 0.1, 5.0], "norm": [0.0, 0.1, 5.0]}
    (runs[0] / "layers.jsonl").write_text(json.dumps({"step": 1, "layers": layers}) + "\n")
    page = render(runs)
    assert page.count("</script>") == 2  # those of the template: a sample does not end its element
    assert not re.search(r"""(src|href)\s*=\s*["']?http|url\((?!#)|@import""", page)
    data = data_of(page)
    first, second = data["runs"]
    assert [first["name"], second["name"]] == ["a", "b"]
    assert data["differences"] == [["schedule.learning_rate", "0.001", "0.002"]]
    assert second["samples"][-1] == {"step": 90, "prompt": "def", "text": f"{EVIL} 90"}
    assert [sample["step"] for sample in first["samples"]] == [0, 20, 40, 50, 70, 90]
    assert first["samples"][1]["text"] == "def f(): 20"
    assert base64.b64decode(first["layers"]).startswith(b"\x89PNG")
    assert second["layers"] is None
    assert [(x["step"], x["kind"]) for x in first["events"]] == [
        (5, "skipped"), (30, "resume"), (40, "skipped"), (100, "skipped")
    ]  # fmt: skip
    assert [x.get("until") for x in first["events"]] == [6, None, None, None]
    assert first["facts"]["steps"] == "1,200"
    assert first["facts"]["best validation"] == "4.0000 nats/token, 2.0000 bits/byte"
    assert first["facts"]["at step"] == "1,200"
    assert "mfu" not in first["curves"]


def test_curves_are_thinned_without_losing_their_range(tmp_path):
    curves = data_of(render((make_run(tmp_path / "a"),)))["runs"][0]["curves"]
    assert all(len(points) <= report.POINTS for points in curves.values())
    loss = curves["loss"]
    assert loss[0][:2] == [3, 768]
    assert loss[0][2:] == pytest.approx([9 - 2 / 1200, 9 - 3 / 1200, 9 - 1 / 1200], rel=1e-5)
    assert loss[-1][0] == 1200
    assert [point[0] for point in curves["val_loss"]] == [600, 1200]


def test_a_run_that_goes_on_and_one_without_a_log(tmp_path):
    run = make_run(tmp_path / "a", steps=20)
    with (run / "log.jsonl").open("a") as file:
        file.write('{"step": 21, "lo')
    (run / "samples.jsonl").unlink()
    data = data_of(render((run, run)))
    assert [x["name"] for x in data["runs"]] == [str(run), str(run)]
    assert data["runs"][0]["samples"] == data["differences"] == []
    (run / "log.jsonl").write_text("")
    with pytest.raises(RunError, match=r"has no step in its log\.jsonl"):
        render((run,))
    with pytest.raises(RunError, match="holds no run of train"):
        render((tmp_path,))


def test_a_run_that_is_damaged_is_one_sentence(tmp_path):
    run = make_run(tmp_path / "a", steps=5)
    (run / "checkpoints" / "step-00000005").mkdir(parents=True)
    (run / "checkpoints" / "step-00000005" / "state.json").write_text("{")
    with pytest.raises(RunError, match=r"state.json is not JSON: the checkpoint is damaged"):
        render((run,))
    for content in ("[]", "{}", '{"config": 3, "fingerprint": {"machine": {}}}', "{", b"\xff"):
        (run / "config.json").write_bytes(
            content if isinstance(content, bytes) else content.encode()
        )
        with pytest.raises(RunError, match=r"a holds no run of train.py \(config.json cannot be"):
            render((run,))


def test_the_command_writes_a_page_or_says_why_not(tmp_path, capsys):
    report.main((make_run(tmp_path / "a", steps=5),), out=tmp_path / "page.html")
    assert data_of((tmp_path / "page.html").read_text())["runs"][0]["name"] == "a"
    with pytest.raises(WrongInputError, match=r".* holds no run"):
        report.main((tmp_path,), out=tmp_path / "none.html")
    with pytest.raises(WrongInputError, match="name the folder of a run"):
        report.main((), out=tmp_path / "none.html")
    with pytest.raises(WrongInputError, match=r"--out .* cannot be written \(Is a directory\)"):
        report.main((tmp_path / "a",), out=tmp_path)
    assert not (tmp_path / "none.html").exists()

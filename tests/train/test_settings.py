"""Prove that every setting is checked in one line, and a run resumed by its folder alone."""

import ast
import json
import re
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from train_runs import CrashError, crash, log, losses

from tritium.model.config import ModelConfig
from tritium.model.shapes import SHAPES
from tritium.training import settings as presets
from tritium.training.command_line import ALIASES, ANSWERS, parse
from tritium.training.help import GROUPS, USUAL, show_help
from tritium.training.schedule import Length
from tritium.training.validation import RANGES, ConfigError, check, settings

ROOT = Path(__file__).parents[2]
NUMBERS = [x for x in settings().values() if x.range]
ODD = ["nan", "inf", "-inf", "-1", "0", "1" + "0" * 40, "1e300", "many", "", "1.5", "True"]


def answer(*arguments: str) -> str | None:
    """The refusal, or None."""
    try:
        parse(["tiny", *arguments])
    except ConfigError as error:
        return str(error)
    return None


@pytest.mark.parametrize("setting", NUMBERS, ids=lambda x: x.flag)
def test_a_number_is_in_its_range_or_refused_in_one_line(setting):
    for odd in ODD:
        said = answer(f"--{setting.flag}={odd}")
        if said is not None:
            assert "\n" not in said
            # Of a legal number the complaint may be that it does not fit the others.
            assert odd in ("0", "1.5", "True") or setting.name in said, (odd, said)
    for never in ("nan", "inf", "-inf", "-1", "many", "", "True"):
        assert f"{setting.name} must" in (answer(f"--{setting.flag}={never}") or ""), never


@pytest.mark.parametrize("setting", NUMBERS, ids=lambda x: x.flag)
def test_a_number_of_another_type_is_refused_in_a_file_too(setting):
    usual = presets.PRESETS["tiny"]
    if setting.path[0] == "model":
        return  # which its own class refuses
    for odd in (float("nan"), float("inf"), -1, True, "2", *([1.5] if setting.range.whole else [])):
        part = usual
        if len(setting.path) == 2:
            part = replace(getattr(usual, setting.path[0]), **{setting.path[1]: odd})
        changed = replace(usual, **{setting.path[0]: part if len(setting.path) == 2 else odd})
        with pytest.raises(ConfigError, match=f"{setting.name} must"):
            check(changed, usual)


@pytest.mark.parametrize(
    ("flag", "legal", "illegal"),
    [
        ("dropout", "0", "1"),
        ("beta2", "0.99999", "1"),
        ("final-lr", "1", "1.001"),
        ("decay-fraction", "1", "0"),
        ("lower-lr", "0.999", "1"),
        ("seed", str(2**64 - 1), str(2**64)),
        ("max-steps", "1", "0"),
        ("max-minutes", "0.001", "0"),
        ("spike-window", "2", "1"),
        ("sample-tokens", "0", "-1"),
        ("weight-decay", "0", "-0.001"),
        ("threads", "1024", "1025"),
        ("model.rope-theta", "1", "0.99"),
        ("model.softcap", "0.5", "0"),
        ("max-epochs", "3e38", "4e38"),
    ],
)
def test_the_ends_of_ranges(flag, legal, illegal):
    assert answer(f"--{flag}={legal}") is None
    assert "must" in (answer(f"--{flag}={illegal}") or "")


@pytest.mark.parametrize(
    "setting",
    [x for x in settings().values() if x.choices or x.kinds == (bool,)],
    ids=lambda x: x.flag,
)
def test_words_are_among_the_choices(setting):
    assert answer(f"--{setting.flag}", "nonsense")
    if setting.path[0] == "model":
        return  # which its own class refuses
    usual = presets.PRESETS["tiny"]
    odd = ("nonsense",) if tuple in setting.kinds else "nonsense"
    part = odd
    if len(setting.path) == 2:
        part = replace(getattr(usual, setting.path[0]), **{setting.path[1]: odd})
    with pytest.raises(ConfigError, match=f"{setting.name} must be"):
        check(replace(usual, **{setting.path[0]: part}), usual)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["7"], "'7' belongs to no flag"),
        (["--seed"], "--seed takes one value, got none"),
        (["--seed", "1", "2"], "--seed takes one value, got 1 2; quote it"),
        (["--learning-rat", "1"], "there is no --learning-rat; did you mean --learning-rate"),
        (["--fp16"], "there is no --fp16: say --precision"),
        (["--resume", "a", "b"], "--resume takes one folder, got a b"),
        (["--resume", "a", "--out", "b"], "--resume a and --out b name two folders"),
        (["--resume", "no-such-run"], "--resume no-such-run: there is no run"),
        (["--resume"], "--resume needs the folder of a run"),
        (["--resume-anyway", "9"], "--resume-anyway takes no value, got 9"),
        (["--no-seed", "3"], "there is no --no-seed"),
    ],
)
def test_what_no_flag_takes_is_answered(arguments, message):
    assert message in (answer(*arguments) or "")


def test_the_last_of_equal_flags_counts_and_a_switch_is_turned_off():
    config, preset, _ = parse(["tiny", "--seed", "1", "--resume-anyway", "--seed=2",
                               "--no-resume-anyway"])  # fmt: skip
    assert (config.seed, config.resume_anyway, preset) == (2, False, "tiny")


SWITCHES = [x for x in settings().values() if bool in x.kinds and x.flag != "resume"]

OF_OTHERS = {
    "nesterov": ("--optimizer", "sgd", "--momentum", "0.9"),
    "centered": ("--optimizer", "rmsprop"),
}


@pytest.mark.parametrize("switch", SWITCHES, ids=lambda x: x.flag)
def test_every_switch_is_turned_on_and_off(switch):
    group, dot, last = switch.flag.rpartition(".")
    forms = {
        True: [[f"--{switch.flag}"], [f"--{last}"], [f"--{switch.flag}=true"]],
        False: [
            [f"--no-{switch.flag}"], [f"--no-{last}"], [f"--{group}{dot}no-{last}"],
            [f"--{switch.flag}", "false"], [f"--no-{last.replace('-', '_')}"],
        ],
    }  # fmt: skip
    for value, ways in forms.items():
        for way in ways:
            config, *_ = parse(["tiny", *way, *OF_OTHERS.get(switch.flag, ())])
            for name in switch.path:
                config = getattr(config, name)
            assert config is value, way


def test_runs_that_begin_in_one_second_have_a_folder_each(monkeypatch):
    monkeypatch.setattr("time.strftime", lambda *_: "20260101-000000")
    folders = {parse(["tiny", "--seed", "1"])[2] for _ in range(50)}
    assert len(folders) == 50


def test_there_is_a_range_for_every_number_and_no_other():
    assert {x.path[-1] for x in NUMBERS} == RANGES.keys()


def test_the_presets_are_legal():
    for config in presets.PRESETS.values():
        check(config, config)
    assert presets.PRESETS.keys() == presets.ABOUT_PRESETS.keys()


def test_a_shape_by_name_has_the_vocabulary_and_context_of_the_preset():
    tiny = presets.PRESETS["tiny"].model
    assert tiny == ModelConfig.named("qwen3-tiny")
    for name in SHAPES:
        model, kept = parse(["tiny", "--shape", name])[0].model, {}
        for field in ("vocab_size", "max_seq_len"):
            kept[field] = getattr(tiny, field)
        assert model == replace(ModelConfig.named(name), **kept)
    wider = ["--vocab-size", "50257", "--context", "1024"]
    assert parse(["tiny", *wider, "--shape", "gpt2"])[0].model == ModelConfig.named("gpt2")
    assert parse(["tiny", "--shape", "None"])[0].model == tiny
    assert "shape must be one of gpt2, gpt2-medium" in (answer("--shape", "gpt-2") or "")
    assert "n_heads must divide d_model" in (answer("--shape", "gpt2", "--n-heads", "7") or "")
    assert "--shape is that of the model which --init-from names; drop one" in (
        answer("--shape", "gpt2", "--init-from", "x") or ""
    )


def test_what_people_type_is_a_flag_or_answered():
    assert set(ALIASES.values()) <= settings().keys()
    assert not {*ALIASES, *ANSWERS} & settings().keys()
    given = ["--lr", "3e-3", "--epochs", "2", "--context", "32", "--n_layers=1", "--seed", "7"]
    config, _, _ = parse(["tiny", *given])
    assert config.schedule.learning_rate == 3e-3
    assert config.length == Length(max_epochs=2)
    assert (config.model.max_seq_len, config.model.n_layers, config.seed) == (32, 1, 7)


def test_the_help_fits_two_screens_and_leaves_no_flag_out(capsys):
    members = [name for group in GROUPS.values() for name in group]
    assert sorted(members) == sorted({x.path[0] for x in settings().values()})
    assert settings().keys() >= USUAL
    show_help("small", everything=False)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 90
    assert max(map(len, lines)) <= 100
    for preset in presets.PRESETS:
        show_help(preset, everything=True)
        shown = re.findall(r"^  --([\w.-]+)", capsys.readouterr().out, re.MULTILINE)
        assert sorted(shown) == sorted(settings())


def test_messages_name_flags_that_exist():
    known = {*settings(), *(f"no-{flag}" for flag in settings()), "help", "help-all", "flag", "no"}
    known |= {"logdir"}  # of TensorBoard
    known |= {"standalone", "nproc-per-node", "max-restarts"}  # of torchrun
    files = [ROOT / "train.py", *(ROOT / "training").rglob("*.py")]
    assert len(files) > 30
    for file in files:
        if file.name in (
            "generate.py",
            "evaluate.py",
            "inspect.py",
            "shapes.py",
        ):  # which have flags of their own
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                for flag in re.findall(r"(?<![\w-])--([a-z][a-z0-9.-]*[a-z0-9])", node.value):
                    assert flag in known, f"{file.name}: --{flag}"


def test_a_run_is_resumed_by_its_folder_alone(run, tmp_path, corpus, monkeypatch, capsys):
    import train

    flags = ("--max-steps", "8", "--save-every", "2", "--lr", "3e-3", "--dropout", "0.1")
    assert run(tmp_path / "whole", *flags) == 0
    run.at_step(6, crash)
    with pytest.raises(CrashError):
        run(tmp_path / "stopped", *flags)

    def resume(*more):
        monkeypatch.setattr("sys.argv", ["train.py", "--resume", str(tmp_path / "stopped"), *more])
        try:
            train.main()
        except SystemExit as stop:
            return stop.code
        return 0

    record = json.loads((tmp_path / "stopped" / "config.json").read_text())
    assert record["folder"] == str(Path.cwd())
    assert resume("--lr", "1e-3") == 2
    assert "config.schedule.learning_rate: 0.003, now 0.001" in capsys.readouterr().err
    assert resume() == 0
    assert losses(tmp_path / "stopped") == losses(tmp_path / "whole")
    assert resume("--max-steps", "10", "--eval-every", "3") == 0
    assert "10 steps instead of 8 steps" in run.output()
    assert len(log(tmp_path / "stopped")) == 10


def test_data_is_found_from_where_the_run_began(tmp_path, monkeypatch):
    began, here, run = (tmp_path / name for name in ("began", "here", "run"))
    for folder in (began, here, run):
        folder.mkdir()
    config = asdict(replace(presets.PRESETS["tiny"], data="notes.txt"))
    record = {"preset": "tiny", "config": config, "folder": str(began)}
    (run / "config.json").write_text(json.dumps(record))
    monkeypatch.chdir(here)

    def data():
        return parse(["--resume", str(run)])[0].data

    assert data() == "notes.txt"  # to be named in the message
    (began / "notes.txt").touch()
    assert data() == str(began / "notes.txt")
    (here / "notes.txt").touch()
    assert data() == "notes.txt"
    (run / "config.json").write_text(json.dumps(record | {"folder": None}))
    assert data() == "notes.txt"


def test_little_data_shortens_a_run_whose_length_nobody_chose(run, tmp_path, monkeypatch):
    monkeypatch.setattr(presets, "EPOCHS", 20)
    many = ("--batch-size", "400", "--eval-tokens", "64", "--model.max-seq-len", "32")
    monkeypatch.setitem(
        presets.PRESETS, "tiny",
        replace(presets.PRESETS["tiny"], length=Length(max_steps=20, max_epochs=0.5)),
    )  # fmt: skip
    assert run(tmp_path / "fitted", *many) == 0
    out = run.output()
    assert out.count("Little data") == 1
    steps = json.loads((tmp_path / "fitted" / "config.json").read_text())["config"]["length"]
    assert 1 <= steps["max_steps"] < 20
    assert len(log(tmp_path / "fitted")) == steps["max_steps"]
    assert run(tmp_path / "asked", *many, "--max-steps", "3") == 0
    assert "instead of" not in run.output()
    assert len(log(tmp_path / "asked")) == 3


def test_importing_train_leaves_garbage_collection_on():
    """Garbage is not collected while train.py imports, and is afterwards."""
    code = "import gc, train; assert gc.isenabled() and gc.get_freeze_count() > 100_000"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])

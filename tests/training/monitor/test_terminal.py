"""Prove that nothing which is shown ends a run: no name, no terminal, no encoding, no reader."""

import errno
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from torch import nn

from tritium.training.monitor import display
from tritium.training.monitor.display import Display, group_table, show_end
from tritium.training.monitor.terminal import TolerantStream, printable, tolerant_output
from tritium.training.optim import OptimizerConfig
from tritium.training.schedule import Budget

ROOT = Path(__file__).resolve().parents[3]
TEXTS = st.text(st.characters(exclude_categories=())) | st.sampled_from(
    ["[/b]", "[red]a[/red]", ":smile:", "лиса", "a\x1b[2Jb", "\udce9", "\x00", "$\\frac{", "a\nb"]
)
ENCODINGS = st.sampled_from(["utf-8", "ascii", "latin-1", "cp1252", "koi8-r", "shift_jis"])
ENTRY = {
    "step": 2, "loss": float("nan"), "lr": 1e-3, "grad_norm": float("inf"), "tokens_per_s": 12,
    "val_loss": 4.0, "val_bits_per_byte": 1.5,
}  # fmt: skip


class Broken(io.TextIOWrapper):
    """A stream that fails."""

    def __init__(self, error: Exception):
        super().__init__(io.BytesIO(), encoding="utf-8")
        self._error = error

    def write(self, text):
        raise self._error

    def flush(self):
        if not self.closed:
            raise self._error

    def isatty(self):
        raise self._error


@given(text=TEXTS, encoding=ENCODINGS)
def test_what_an_encoding_does_not_know_is_escaped(text, encoding):
    raw = io.BytesIO()
    stream = TolerantStream(io.TextIOWrapper(raw, encoding=encoding, newline=""))
    assert stream.write(text) == len(text)
    stream.flush()
    assert raw.getvalue() == text.encode(encoding, "backslashreplace")


@pytest.mark.parametrize("error", [
    BrokenPipeError(errno.EPIPE, "x"), OSError(errno.ENOSPC, "x"), OSError(errno.EIO, "x"),
    BlockingIOError(errno.EAGAIN, "x"), ValueError("I/O operation on closed file"),
    RuntimeError("reentrant call inside <_io.BufferedWriter>"),
])  # fmt: skip
def test_a_stream_that_fails_is_dropped(error, monkeypatch):
    monkeypatch.setattr(sys, "stdout", Broken(error))
    with tolerant_output():
        print("hello")
        sys.stdout.flush()
        assert not sys.stdout.isatty()
        Console().print("hello")
    assert isinstance(sys.stdout, Broken)


@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_a_process_without_a_stream_is_left_without_one(name, monkeypatch):
    monkeypatch.setattr(sys, name, None)
    with tolerant_output():
        assert getattr(sys, name) is None
        print("hello")
        Console().print("hello")


@settings(max_examples=60)
@given(
    name=TEXTS, sample=TEXTS, encoding=ENCODINGS, terminal=st.booleans(),
    width=st.sampled_from([1, 2, 17, 80, 300]), term=st.sampled_from(["dumb", "xterm", "", "?"]),
)  # fmt: skip
def test_all_that_a_run_shows_can_be_shown(name, sample, encoding, terminal, width, term):
    raw = io.BytesIO()
    stream = TolerantStream(io.TextIOWrapper(raw, encoding=encoding))
    to = Console(
        file=stream, width=width, force_terminal=terminal, soft_wrap=True, highlight=False,
        markup=display.console._markup, emoji=display.console._emoji, _environ={"TERM": term},
    )  # fmt: skip
    model = nn.ModuleDict({"embedding": nn.Embedding(3, 4)})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(display, "console", to)
        with Display(Budget(steps=8), 1, 0.0, name, [ENTRY], to=to) as shown:
            shown.show([ENTRY], 3.0)
            to.print(shown)
        to.print(group_table(OptimizerConfig().make(model)))
        show_end(Path("runs", name.replace("\0", "")), [ENTRY], sample, 3.0)
    stream.flush()
    if width == 300 and sample.isascii() and sample.isprintable():
        assert sample in raw.getvalue().decode(encoding)  # markup is no markup


@given(text=TEXTS)
def test_a_printable_text_is_one_line_and_can_be_encoded(text):
    shown = printable(text)
    assert len(shown.splitlines()) <= 1
    assert "\x1b" not in shown
    shown.encode()
    assert shown == text or not text.isprintable()


# Everything at once: no HOME, no locale, an odd terminal, a folder that cannot be matplotlib's.
HOSTILE = {
    "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "TERM": "dumb", "COLUMNS": "1",
    "MPLCONFIGDIR": "/dev/null/matplotlib", "MPLBACKEND": "nonsense", "OMP_NUM_THREADS": "1",
}  # fmt: skip
NAME = b"[/b] $x_ \\frac{ :smile: \xd0\xbb\x1b[2J\n\x01"


@pytest.mark.parametrize("streams", ["", "<&- >&- 2>&-", "| true"])
def test_a_run_ends_well_wherever_it_prints(streams, tmp_path):
    (tmp_path / "notes [b].txt").write_text("\n\n".join(f"line {i} of a text" for i in range(400)))
    environment = {k: x for k, x in os.environ.items() if k not in ("HOME", "TRITON_INTERPRET")}
    environment |= {"TRITIUM_HOME": str(tmp_path / "home"), "PYTHONPATH": str(ROOT)} | HOSTILE
    command = f'set -o pipefail; "$@" {streams}'
    run = [
        sys.executable, str(ROOT / "train.py"), "tiny", "--max-steps", "2", "--data",
        "notes [b].txt", "--out", NAME, "--sample-tokens", "3", "--device", "cpu",
    ]  # fmt: skip
    done = subprocess.run(
        ["bash", "-c", command, "bash", *run], cwd=tmp_path, env=environment, capture_output=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    left = {name.split(b".")[0] for name in os.listdir(os.path.join(os.fsencode(tmp_path), NAME))}
    assert {b"checkpoints", b"log", b"config"} <= left
    assert b"Traceback" not in done.stdout + done.stderr
    if not streams:
        assert b"notes [b].txt" in done.stdout

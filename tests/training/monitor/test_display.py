"""Prove what the display shows, in a terminal and without one."""

import io
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from tritium.model import ModelConfig, Transformer
from tritium.training.monitor import display
from tritium.training.monitor.display import Display
from tritium.training.schedule import Budget
from tritium.training.settings import PRESETS


def entry(step, **more):
    return {
        "step": step, "loss": 8.0 - step, "lr": 1e-3, "grad_norm": 1.5, "tokens_per_s": 12_345,
    } | more  # fmt: skip


VALIDATED = {"val_loss": 4.0, "val_bits_per_byte": 1.5}


def console(width=100, *, terminal):
    return Console(file=io.StringIO(), width=width, force_terminal=terminal, soft_wrap=True,
                   color_system=None, highlight=False)  # fmt: skip


def text_of(to, what=None):
    if what is not None:
        to.file = io.StringIO()
        to.print(what)
    return to.file.getvalue()


def test_without_a_terminal_lines_appear_and_nothing_moves():
    to = console(terminal=False)
    with Display(Budget(steps=8), 0, 10.0, "run", to=to) as display:
        display.show([entry(1)], 12.0)
        display.show([entry(2)], 14.0)  # too soon after the last line
        display.show([entry(3), entry(4, mfu=0.41, **VALIDATED)], 18.0)
    lines = text_of(to).splitlines()
    assert lines[0] == (
        "step 1/8  loss 7.000 nats/token  smoothed 7.000 nats/token  lr 1.00e-03  grad norm 1.50"
        "  speed 12,345 tokens/s  0 min 14 s left"
    )
    assert len(lines) == 2
    assert lines[1].startswith("step 4/8  loss 4.000 nats/token  smoothed 5.4")
    assert lines[1].endswith(
        "MFU 41.0%  validation 4.000 nats/token, 1.500 bits/byte  0 min 08 s left"
    )
    assert "\x1b" not in text_of(to)


@pytest.mark.parametrize("width", [40, 80, 200])
def test_the_panel_holds_every_figure_at_any_width(width):
    to = console(width, terminal=True)
    display = Display(Budget(steps=8), 0, 0.0, "my-run", to=to)
    assert "first step" in text_of(to, display)
    display.show([entry(2, mfu=0.41, memory_gib=3.1, **VALIDATED)], 10.0)
    assert text_of(to).count("bits/byte") == 1  # a line that stays, above the panel
    shown = text_of(to, display)
    assert all(len(line) <= width for line in shown.splitlines())
    for part in ("my-run", "25%", "step 2/8", "30 s left", "6.000 nats/token", "1.00e-03", "1.50",
                 "12,345 tokens/s", "41.0%", "3.10 GiB", "4.000 nats/token"):  # fmt: skip
        assert part in shown.replace("\n", " "), part


def test_a_terminal_is_left_as_it_was():
    to = console(terminal=True)
    with pytest.raises(ValueError, match="wrong"), Display(Budget(steps=8), 0, 0.0, to=to):
        raise ValueError("wrong")
    assert text_of(to).rfind("\x1b[?25h") > text_of(to).rfind("\x1b[?25l") >= 0  # the cursor


def test_the_mean_fades_and_leaves_out_what_is_not_finite():
    to = console(terminal=False)
    display = Display(Budget(seconds=60.0), 0, 0.0, to=to)
    display.show([entry(1, loss=float("nan"))], 1.0)
    assert "loss nan nats/token  smoothed –" in text_of(to)
    display.show([entry(i, loss=3.0) for i in range(2, 5)], 2.0)
    display.show([entry(i, loss=7.0, **VALIDATED) for i in range(5, 400)], 30.0)
    last = text_of(to).splitlines()[-1]
    assert last.startswith("step 399  loss 7.000 nats/token  smoothed 7.000 nats/token")
    assert last.endswith("0 min 30 s left")


def test_the_panel_of_a_resumed_run_has_the_validation_and_the_mean_of_before():
    to = console(200, terminal=True)
    log = [entry(1, loss=6.0), entry(2, loss=6.0, **VALIDATED), entry(3, loss=6.0)]
    resumed = Display(Budget(steps=8), 3, 0.0, "run", log, to=to)
    assert "last validation 4.000 nats/token, 1.500 bits/byte" in text_of(to, resumed)
    resumed.show([entry(4, loss=6.0)], 1.0)
    shown = text_of(to, resumed)
    assert "last validation 4.000" in shown
    assert shown.count("6.000 nats/token") == 2


def test_the_head_of_a_run_has_one_thread_and_not_one_threads(monkeypatch):
    to = console(width=200, terminal=False)
    monkeypatch.setattr(display, "console", to)
    shape = ModelConfig(vocab_size=8, n_layers=1, d_model=4, n_heads=1, max_seq_len=4)
    config, model = replace(PRESETS["tiny"], batch_size=2, model=shape), Transformer(shape)
    optimizer = config.optimizer.make(model, learning_rate=1e-3)
    loader: Any = SimpleNamespace(n_windows=2, n_tokens=9, vocab_size=8, epoch=0.0)
    for threads, budget in ((1, Budget(steps=1)), (2, Budget(steps=2)), (2, Budget(seconds=60))):
        machine = {"device": "a CPU", "threads": threads, "dtype": "torch.float32"}
        length = replace(config.length, max_minutes=1.0, max_steps=None)
        display.print_start(
            replace(config, length=length), "tiny", Path("a-run"), model, optimizer, loader,
            machine, 0, budget,
        )  # fmt: skip
    said = text_of(to)
    assert "1 layer of width 4, on a CPU, 1 thread, in float32" in said
    assert "a CPU, 2 threads, in" in said
    assert "Length: 1 step of 8 tokens, 1.00 epochs" in said
    assert "Length: 2 steps of 8 tokens, 2.00 epochs" in said
    assert "Length: 1 minute, steps of 8 tokens" in said
    assert [str(Budget(steps=1)), str(Budget(seconds=90))] == ["1 step", "1.5 minutes"]

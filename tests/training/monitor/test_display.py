"""Prove what the display shows, in a terminal and without one."""

import io

import pytest
from rich.console import Console

from tritium.training.monitor.display import Display
from tritium.training.schedule import Budget


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

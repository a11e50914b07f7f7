"""Stopping at the end of a step when a signal asks for it."""

from __future__ import annotations

import os
import signal

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopRequest:
    """Inside the block, the first of SIGTERM, SIGINT and SIGUSR1 is noted; a second one kills.

    The second gets the system's own default, so it works even where Python runs no code, and the
    process ends with the status of that signal.

    Attributes:
        name: of the signal that came, such as "SIGTERM"; None before.
    """

    def __init__(self):
        self.name: str | None = None
        self._before = {}

    def __enter__(self) -> StopRequest:
        self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _) -> None:
        self.name = signal.Signals(number).name
        for each in SIGNALS:
            signal.signal(each, signal.SIG_DFL)
        message = f"\n{self.name}: finishing the step and saving; once more stops at once\n"
        cursor = "\x1b[?25h" if os.isatty(2) else ""  # which a progress bar hides
        os.write(2, (cursor + message).encode())  # print might interrupt itself

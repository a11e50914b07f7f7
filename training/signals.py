"""Stop requests by signals, honoured at the end of a step."""

from __future__ import annotations

import _thread
import os
import signal
import sys
from contextlib import suppress

from tritium.training.run.ranks import SINGLE, Ranks

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopRequest:
    """Inside the block, the first of SIGTERM, SIGINT and SIGUSR1 is noted; a second one kills.

    The second meets the system's default handler, so it works even while Python runs no code, and
    the process ends with the status of that signal.

    Args:
        ranks: the processes of the run, all of which stop if one of them is to.

    Attributes:
        name: name of the signal received, such as "SIGTERM"; None before.
    """

    def __init__(self, ranks: Ranks = SINGLE):
        self.name: str | None = None
        self._number, self._ranks = 0, ranks
        self._before = {}

    def __enter__(self) -> StopRequest:
        self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def requested(self) -> bool:
        """Whether a signal has come, to any of the ranks, which must all ask."""
        number = int(self._ranks.most(self._number))
        if number:
            self.name = signal.Signals(number).name
        return number > 0

    def _note(self, number: int, _) -> None:
        self._number, self.name = number, signal.Signals(number).name
        self._ranks.stopped_by = self.name
        for each in SIGNALS:
            signal.signal(each, signal.SIG_DFL)
        if os.isatty(2):
            with suppress(OSError):
                os.write(2, b"\x1b[?25h")  # the cursor, which a progress bar hides
        # From a thread, because here print might interrupt itself; print, because a panel that is
        # shown makes room for it. Not a Thread: starting one waits for a lock.
        if self._ranks.first:
            _thread.start_new_thread(self._say, ())

    def _say(self) -> None:
        with suppress(Exception):
            print(
                f"{self.name}: finishing the step and saving; once more stops at once",
                file=sys.stderr, flush=True,
            )  # fmt: skip

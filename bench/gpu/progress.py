"""Progress of a session: a line that changes on a terminal, a line each case elsewhere."""

from pathlib import Path

from rich.console import Console
from rich.status import Status

from tritium.bench.gpu.suite import RESULTS
from tritium.bench.gpu.tasks import Task


class Progress:
    """Shows what runs, and how much time is left.

    Args:
        console: where.
        folder: of the session.
    """

    def __init__(self, console: Console, folder: Path) -> None:
        self.console, self.folder = console, folder
        self.status: Status | None = None
        self.shown: object = None

    def __enter__(self) -> "Progress":
        if self.console.is_terminal:
            self.status = self.console.status("").__enter__()
        return self

    def __exit__(self, *problem: object) -> None:
        if self.status is not None:
            self.status.stop()

    def tests(self, left: float, compilations: int | None) -> None:
        """Show how many tests ran, and how many compilations wait."""
        path = self.folder / RESULTS
        lines = path.read_bytes().splitlines() if path.exists() else []
        ran = sum(b'"seconds": ' in line for line in lines)
        failed = sum(b'"outcome": "failed"' in line for line in lines)
        text = f"tests: {ran} ran, {failed} failed"
        if compilations:
            text += f"; {compilations} compilations wait"
        self._show(text, left, every=int(left) // 15)

    def task(self, task: Task, done: int, total: int, left: float) -> None:
        """Show what is measured."""
        text = f"{done} of {total}: {task.name}, {task.shape}" if task.shape else task.kind
        detail = f" {task.implementation} {task.part}" if self.status is not None else ""
        self._show(text + detail, left, every=task.group)

    def _show(self, text: str, left: float, every: object) -> None:
        line = f"{text} ({int(left) // 60}:{int(left) % 60:02} left)"
        if self.status is not None:
            self.status.update(line)
        elif every != self.shown:
            self.shown = every
            self.console.print(line, markup=False, highlight=False)

"""Measurements that are not begun, by what happened to others of the same implementation."""

from tritium.bench.gpu.tasks import Task

FATAL_SHAPES = 2  # after so many at which it ended its process, an implementation has no more


class Blocked:
    """Reasons in a session's journal against beginning a measurement."""

    def __init__(self) -> None:
        self.begun: dict[str, int] = {}
        self.missing: set[tuple[str, str]] = set()
        self.problems: set[str] = set()
        self.fatal: dict[tuple[str, str, str], set[str]] = {}

    def learn(self, entry: dict) -> None:
        """Note an entry of the journal, if it is about a measurement."""
        if entry["kind"] in ("begin", "cut"):
            times = 1 if entry["kind"] == "begin" else -1
            self.begun[entry["key"]] = self.begun.get(entry["key"], 0) + times
        elif entry["kind"] == "row":
            self._learn_row(Task(**entry["task"]), entry)

    def _learn_row(self, task: Task, entry: dict) -> None:
        problem = problem_of(entry)
        if problem.startswith("ModuleNotFoundError"):
            self.missing.add((task.kind, task.implementation))
        if problem:
            self.problems.add(task.each)
        if entry.get("fatal"):
            who = (task.kind, task.name, task.implementation)
            self.fatal.setdefault(who, set()).add(task.shape)

    def by(self, task: Task) -> str:
        """The reason not to begin a measurement, "" if there is none."""
        if (task.kind, task.implementation) in self.missing:
            return "not installed"
        if task.each in self.problems:
            return "failed in its first turn"
        shapes = self.fatal.get((task.kind, task.name, task.implementation), set())
        if task.shape in shapes or len(shapes) >= FATAL_SHAPES:
            return "ended its process"
        # A measurement that was begun and has no row: the session was killed while it ran.
        return "the session ended twice while it ran" if self.begun.get(task.key, 0) >= 2 else ""


def problem_of(entry: dict) -> str:
    """The reason why a row has no numbers, "" if it has."""
    return entry.get("problem") or (entry.get("row") or {}).get("problem") or ""

"""Faults of a session on a GPU: it ends late, forgets, repeats, or dies of a measurement."""

from functools import partial

from tests.mutants import Mutant

_session = partial(Mutant, file="bench/gpu/session.py")
_blocked = partial(Mutant, file="bench/gpu/blocked.py")
_process = partial(Mutant, file="bench/gpu/process.py")

MUTANTS = [
    _session(
        what="a second call measures everything again",
        original="return [task for task in self.tasks if task.key not in done]",
        replacement="return list(self.tasks)",
    ),
    _session(
        what="measurements begin after the end",
        original="if self.left < LEAST:",
        replacement="if self.left < -60:",
    ),
    _session(
        what="what the end cut is a peer that takes too long",
        original="if self.left <= 0:",
        replacement="if False:",
    ),
    _session(
        what="a crash ends the session",
        original="except Died as problem:",
        replacement="except ZeroDivisionError as problem:",
    ),
    _session(
        what="devices are mixed",
        original="if different := [name for name in now if before[name] != now[name]]:",
        replacement="if different := []:",
    ),
    _session(
        what="two sessions write one folder",
        original="fcntl.LOCK_EX | fcntl.LOCK_NB",
        replacement="fcntl.LOCK_SH | fcntl.LOCK_NB",
    ),
    _session(
        what="tests have no time where pytest was slow to collect them",
        original="until = min(max(until, time.monotonic() + share / 2), latest)",
        replacement="until = min(until, latest)",
    ),
    _session(
        what="a pytest that never collects has all the time",
        original="until = min(max(until, time.monotonic() + share / 2), latest)",
        replacement="until = max(until, time.monotonic() + share / 2)",
    ),
    _session(
        what="what was begun is not noted",
        original='self.journal.append(kind="begin", key=task.key)',
        replacement="pass",
    ),
    _blocked(
        what="what killed the session is begun once more",
        original=">= 2 else",
        replacement=">= 20 else",
    ),
    _blocked(
        what="a peer that ended its process is asked for its other passes",
        original="if task.shape in shapes or",
        replacement="if",
    ),
    _blocked(
        what="a peer that ended its process costs the others",
        original="who = (task.kind, task.name, task.implementation)\n            self.fatal",
        replacement='who = (task.kind, task.name, "eager")\n            self.fatal',
    ),
    _process(
        what="no limit",
        original="if not selector.select(max(deadline - time.monotonic(), 0)):",
        replacement="if not selector.select():",
    ),
    _process(
        what="a process outlives its session",
        original="ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)",
        replacement="pass",
    ),
    _process(
        what="the cache of kernels is nobody's",
        original='"TRITON_CACHE_DIR": os.environ.get("TRITON_CACHE_DIR", f"{home}/.triton/cache"),',
        replacement="",
    ),
]

"""Worker processes: a measurement that crashes, hangs or runs out of memory costs one of them."""

import ctypes
import json
import math
import os
import selectors
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import IO

ROOT = Path(__file__).parents[2]
WORKER = (sys.executable, "-m", "tritium.bench.gpu.worker")
START_LIMIT = 180.0  # seconds until a process has imported everything


def die_with_parent() -> None:
    """Ask Linux to kill this process when the one that started it ends, however it ends."""
    PR_SET_PDEATHSIG = 1
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def environment() -> dict[str, str]:
    """Variables of every process of a session.

    One cache of compiled kernels for all: where none is named, torch.compile moves Triton's.
    """
    home = os.environ.get("TRITON_HOME", str(Path.home()))
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {
        "TRITON_CACHE_DIR": os.environ.get("TRITON_CACHE_DIR", f"{home}/.triton/cache"),
        "PYTHONPATH": os.pathsep.join(paths),
    }


def end(process: subprocess.Popen) -> None:
    """Kill a process, and those that it started, and wait for it."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def cause(status: int) -> str:
    """The end of a process in words."""
    if status >= 0:
        return f"ended with status {status}"
    name = signal.Signals(-status).name
    return f"killed: {name}, out of memory?" if name == "SIGKILL" else f"crashed: {name}"


class Late(Exception):  # noqa: N818 (no error of the process, whose time is over)
    """No answer within the limit."""


class Died(Exception):  # noqa: N818 (the process's own end, whatever its reason)
    """The process ended before it answered."""


class Worker:
    """A process that answers one order after the other.

    Args:
        log: a file that gets what the process and its libraries print.
        command: the process; it reads orders from its input and prints answers, in lines of JSON.
    """

    def __init__(self, log: IO, command: tuple[str, ...] = WORKER) -> None:
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
            env=environment(), cwd=ROOT, start_new_session=True, bufsize=0,
        )  # fmt: skip
        self._unread = b""
        self._ready = False

    @property
    def alive(self) -> bool:
        """Whether the process runs."""
        return self.process.poll() is None

    def ask(self, order: dict, limit: float, until: float = math.inf) -> dict:
        """Return the answer to `order`.

        Args:
            order: what `tritium.bench.gpu.worker` takes.
            limit: seconds for it, from when the process is ready.
            until: when nobody waits any more, by `time.monotonic`.

        Raises:
            Late: no answer came in time. The process is killed.
            Died: the process crashed, or was killed; the message says how.
        """
        try:
            if not self._ready:
                self._answer(min(START_LIMIT, until - time.monotonic()))
                self._ready = True
            self._pipe(self.process.stdin).write(json.dumps(order).encode() + b"\n")
            return self._answer(min(limit, until - time.monotonic()))
        except BrokenPipeError:
            raise Died(cause(self.process.wait())) from None
        except Late:
            self.kill()
            raise

    def _answer(self, limit: float) -> dict:
        deadline = time.monotonic() + limit
        pipe = self._pipe(self.process.stdout)
        with selectors.DefaultSelector() as selector:
            selector.register(pipe, selectors.EVENT_READ)
            while b"\n" not in self._unread:
                if not selector.select(max(deadline - time.monotonic(), 0)):
                    raise Late(f"no result within {max(limit, 0):.0f} s")
                found = os.read(pipe.fileno(), 1 << 16)
                if not found:
                    raise Died(cause(self.process.wait()))
                self._unread += found
        line, _, self._unread = self._unread.partition(b"\n")
        return json.loads(line)

    def kill(self) -> None:
        """Kill the process and those that it started; whoever waits for an answer gets none."""
        end(self.process)

    def end(self) -> None:
        """Kill the process, and close its pipes."""
        self.kill()
        for pipe in (self.process.stdin, self.process.stdout):
            self._pipe(pipe).close()

    @staticmethod
    def _pipe(pipe: IO[bytes] | None) -> IO[bytes]:
        assert pipe is not None
        return pipe

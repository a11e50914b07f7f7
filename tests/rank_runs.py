"""Runs of train.py on several ranks, one run after another in the same processes.

`python tests/rank_runs.py JOBS` is one rank, with torchrun's variables in its environment. JOBS is
a JSON file, a list of runs: each has its `name`, `arguments` and `port`, and may end at a step by a
`crash` of all ranks, or have a `signal` sent to one of them. Results are written beside it: exit
status, output, and how often each collective was called in the last step but one.
"""

import io
import json
import os
import signal
import socket
import subprocess
import sys
from collections import Counter
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
COLLECTIVES = {
    "all_reduce": "reduce",
    "reduce_scatter_tensor": "scatter", "reduce_scatter_single": "scatter",
    "all_gather_into_tensor": "gather", "all_gather_single": "gather",
    "all_to_all_single": "exchange",
}  # fmt: skip
"""Functions of torch.distributed, by the names of two versions."""


class CrashError(Exception):
    """The process ends here."""


class RankRuns:
    """Runs of train.py on `ranks` processes.

    Args:
        folder: where runs and results go; each run is in the folder of its name.
        corpus: data of the runs.
        home: cache of prepared data.
        ranks: number of processes.
    """

    def __init__(self, folder: Path, corpus: Path, home: Path, ranks: int = 2):
        self._folder, self._corpus, self._home, self._ranks = folder, corpus, home, ranks
        self.jobs: list[dict[str, Any]] = []

    def add(self, name: str, *arguments: str, out: str | None = None, **events: Any) -> None:
        """Add a run, in the folder of its name or in `out`; `events` are `crash` or `signal`."""
        run = ["tiny", "--data", str(self._corpus), "--out", str(self._folder / (out or name))]
        run += ["--sample-tokens", "0", *arguments]
        self.jobs.append({"name": name, "arguments": run, "port": _free_port(), **events})

    def __call__(self) -> dict[str, list[dict]]:
        """Run them all; return exit status and output of every rank, by name of the run."""
        file = self._folder / "jobs.json"
        file.write_text(json.dumps(self.jobs))
        processes = [self._start(file, rank) for rank in range(self._ranks)]
        errors = [process.communicate(timeout=400)[1] for process in processes]
        assert not any(process.returncode for process in processes), "\n".join(errors)
        return {
            job["name"]: [
                json.loads((self._folder / f"{job['name']}-{rank}.json").read_text())
                for rank in range(self._ranks)
            ]
            for job in self.jobs
        }

    def _start(self, file: Path, rank: int) -> subprocess.Popen:
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        environment |= {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(self._ranks),
            "LOCAL_WORLD_SIZE": str(self._ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0",
            "TMPDIR": str(self._folder), "TRITIUM_HOME": str(self._home), "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
        }  # fmt: skip
        return subprocess.Popen(
            [sys.executable, __file__, str(file)], cwd=ROOT, env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def counted(dist, calls: Counter) -> None:
    """Count the calls of collectives."""
    for name, kind in COLLECTIVES.items():
        if not hasattr(dist, name):
            continue
        collective = getattr(dist, name)
        collective = getattr(collective, "uncounted", collective)

        def call(*arguments, kind=kind, collective=collective, **options):
            calls[kind] += 1
            return collective(*arguments, **options)

        call.uncounted = collective
        setattr(dist, name, call)


def main(file: Path) -> None:
    """Run the jobs as the rank that the environment names."""
    import torch.distributed as dist

    import train
    from tritium.training.monitor import plot

    plot.plot_losses = plot.plot_layers = lambda *_: None  # half of a run's time
    rank, accumulate = int(os.environ["RANK"]), train.accumulate_gradients
    for job in json.loads(file.read_text()):
        os.environ["MASTER_PORT"] = str(job["port"])
        sys.argv = ["train.py", *job["arguments"]]
        steps, calls, complete = 0, Counter(), {}

        def at_step(*arguments, job=job, calls=calls, complete=complete):
            nonlocal steps
            steps += 1
            complete.clear()
            complete.update(calls)
            calls.clear()
            if job.get("crash") == steps:
                raise CrashError
            if job.get("signal") == [steps, rank]:
                os.kill(os.getpid(), signal.SIGTERM)
            return accumulate(*arguments)

        train.accumulate_gradients = at_step
        counted(dist, calls)
        status, out, err = 0, io.StringIO(), io.StringIO()
        try:
            with redirect_stdout(out), redirect_stderr(err):
                train.main()
        except SystemExit as stop:
            status = int(stop.code or 0)
        except CrashError:
            status = -9
        if dist.is_initialized():
            dist.destroy_process_group()
        result = {"status": status, "out": out.getvalue(), "err": err.getvalue()}
        result["calls"] = complete
        file.with_name(f"{job['name']}-{rank}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]))

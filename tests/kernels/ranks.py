"""Pool of gloo processes that run one check after another, since starting them takes seconds.

On the CPU always: kernels run in the strict interpreter, wherever the tests themselves run.
"""

import os
import traceback
from datetime import timedelta
from multiprocessing.connection import wait
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

IMPORTS = [
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel",
]


class Ranks:
    """`size` processes, the ranks of one process group, from the first check to `close`."""

    def __init__(self, size: int, folder: Path):
        self._size, self._folder = size, folder
        self._running, self._started = [], 0

    def __call__(self, check, *args) -> None:
        """Call `check`, a function of a module, on all ranks; raise what one of them raises."""
        if not self._running:
            self._start()
        for _, pipe in self._running:
            pipe.send((check, args))
        waiting = [pipe for _, pipe in self._running]
        while waiting:
            for pipe in wait(waiting):
                waiting.remove(pipe)
                try:
                    failed = pipe.recv()
                except EOFError:
                    failed = "a rank died"
                if failed:
                    self.close()  # the others may wait for this one
                    raise AssertionError(failed)

    def close(self) -> None:
        """End the processes; the next check starts others."""
        for process, pipe in self._running:
            process.kill()
            process.join()
            pipe.close()
        self._running = []

    def _start(self) -> None:
        store = f"file://{self._folder}/store{self._started}"
        self._started += 1
        # One process imports, and the ranks are forked from it: seconds saved on each.
        context = mp.get_context("forkserver")
        context.set_forkserver_preload(IMPORTS)
        for rank in range(self._size):
            actual, expected = context.Pipe()
            process = context.Process(target=_serve, args=(expected, rank, self._size, store))
            process.daemon = True
            process.start()
            expected.close()
            self._running.append((process, actual))


def _serve(pipe, rank: int, size: int, store: str) -> None:
    os.environ |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    import strict_interpreter

    strict_interpreter.install()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)  # fresh memory is NaN
    dist.init_process_group(
        "gloo", store, rank=rank, world_size=size, timeout=timedelta(seconds=30)
    )
    while True:
        try:
            check, args = pipe.recv()  # imports the module of the check, and with it the kernels
            torch.manual_seed(0)
            check(*args)
        except EOFError:
            return
        except Exception:  # whatever it is, the test on the other side raises it
            pipe.send(f"rank {rank}:\n{traceback.format_exc()}")
        else:
            pipe.send(None)

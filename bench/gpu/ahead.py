"""Compilation ahead of the measurements, in parallel processes, while the tests run."""

import os
import threading
from collections.abc import Callable, Iterable, Iterator
from queue import Empty, Queue

from tritium.bench.gpu.process import Died, Late, Worker
from tritium.bench.gpu.tasks import OPERATION, OPTIMIZER, STEP, Task

LIMIT = 90.0  # seconds of one compilation


def compilations(tasks: Iterable[Task]) -> Iterator[Task]:
    """One task for each implementation of a case: its passes are compiled together."""
    seen = set()
    for task in tasks:
        if task.kind in (STEP, OPTIMIZER, OPERATION):
            what = (*task.group, task.implementation)
            if what not in seen:
                seen.add(what)
                yield task


class Ahead:
    """Threads that each hand tasks to a process of their own, until there is none or `end`.

    Args:
        tasks: to compile, in order.
        processes: how many; each holds inputs of one case on the GPU.
        start: starts a process.
        order: makes a worker's order of a task.
        done: is called with each task and its problem, "" without one.
    """

    def __init__(
        self,
        tasks: Iterable[Task],
        processes: int,
        start: Callable[[], Worker],
        order: Callable[[Task], dict],
        done: Callable[[Task, str], object],
    ) -> None:
        self.tasks: Queue[Task] = Queue()
        for task in tasks:
            self.tasks.put(task)
        self.start, self.order, self.done = start, order, done
        self.workers: list[Worker] = []
        self.lock = threading.Lock()
        self.ended = False
        self.threads = [
            threading.Thread(target=self._run, daemon=True)
            for _ in range(min(processes, self.tasks.qsize()))
        ]
        for thread in self.threads:
            thread.start()

    @property
    def running(self) -> bool:
        """Whether something is compiled."""
        return any(thread.is_alive() for thread in self.threads)

    def end(self) -> None:
        """End all processes."""
        with self.lock:
            self.ended = True
            for worker in self.workers:
                worker.kill()
        for thread in self.threads:
            thread.join()
        for worker in self.workers:
            worker.end()

    def _run(self) -> None:
        worker = None
        while True:
            try:
                task = self.tasks.get_nowait()
            except Empty:
                break
            if worker is None or not worker.alive:
                worker = self._worker()
                if worker is None:
                    return
            try:
                answer = worker.ask(self.order(task), LIMIT)
                problem = answer.get("problem") or ""
            except (Late, Died) as error:
                problem = str(error)
            if self.ended:
                return
            self.done(task, problem)
        if worker is not None:
            worker.kill()  # and its memory on the GPU is free

    def _worker(self) -> Worker | None:
        with self.lock:
            if self.ended:
                return None
            worker = self.start()
            self.workers.append(worker)
            return worker


def processes_here() -> int:
    """Processes that compile: few, because each holds the inputs of a case."""
    return max(1, min(3, len(os.sched_getaffinity(0)) // 4))

"""A run on two hosts, beside the same run on one: `python -m tritium.bench two_hosts`.

The hosts are two network namespaces of this machine, joined by a pair of virtual interfaces, so
whatever goes from one to the other crosses an address, a port and a counter of bytes. Each starts
its own torchrun, with two ranks of gloo. It needs root, and iproute2. By hand:

    ip netns add tritium-0; ip netns add tritium-1
    ip link add tritium-0 netns tritium-0 type veth peer name tritium-1 netns tritium-1
    for i in 0 1; do
        ip -n tritium-$i address add 10.77.0.$((i + 1))/24 dev tritium-$i
        ip -n tritium-$i link set lo up; ip -n tritium-$i link set tritium-$i up
    done
    for i in 0 1; do    # at the same time
        GLOO_SOCKET_IFNAME=tritium-$i ip netns exec tritium-$i \\
            torchrun --nnodes 2 --nproc-per-node 2 --rdzv-backend c10d \\
            --rdzv-endpoint 10.77.0.1:29400 --rdzv-conf is_host=$((1 - i)) \\
            --local-addr 10.77.0.$((i + 1)) train.py tiny --out RUN &
    done; wait
    ip netns del tritium-0; ip netns del tritium-1

On real hosts, whose names resolve, only torchrun is left, without --rdzv-conf and --local-addr.
"""

import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from rich.table import Table

from tritium.bench import tables
from tritium.bench.ends import FailedError
from tritium.bench.harness import device_name
from tritium.bench.runs.parallel_faults import TEXT, end_of
from tritium.training.run.run_folder import read_lines

ROOT = Path(__file__).parents[2]
RESULTS = "two_hosts.md"  # in the folder of results
WIDTH = 110
HOSTS = "tritium-0", "tritium-1"
ADDRESSES = "10.77.0.1", "10.77.0.2"
PORT = 29400
STEPS, FIRST, LAST = 40, 8, 36  # bytes are counted between the steps FIRST and LAST
ARGUMENTS = (
    "tiny", "--data", str(TEXT), "--max-steps", str(STEPS), "--save-every", "100", "--dropout",
    "0.1", "--eval-every", "100", "--eval-tokens", "512", "--sample-tokens", "0",
)  # fmt: skip
MODES = "ddp", "fsdp"
LAUNCH = sys.executable, "-m", "torch.distributed.run", "--nproc-per-node"


class Compared(NamedTuple):
    """A mode on two hosts, beside one."""

    mode: str
    largest: float
    """The largest difference of a step's loss, in nats."""
    identical: bool
    """Whether weights, optimizer and curves are the same bits."""
    sent: tuple[float, float]
    """Bytes that each host sent to the other in a step."""


class HostsError(FailedError):
    """No two hosts can be made here."""


@contextmanager
def two_hosts() -> Iterator[None]:
    """Make two network namespaces that reach one another, and remove them in the end.

    Raises:
        HostsError: the machine does not permit it; the message is that of `ip`.
    """
    a, b = HOSTS
    made = []
    try:
        for host in HOSTS:
            _ip("netns", "add", host)
            made.append(host)
        _ip("link", "add", a, "netns", a, "type", "veth", "peer", "name", b, "netns", b)
        for host, address in zip(HOSTS, ADDRESSES, strict=True):
            _ip("-n", host, "address", "add", f"{address}/24", "dev", host)
            _ip("-n", host, "link", "set", "lo", "up")
            _ip("-n", host, "link", "set", host, "up")
        yield
    finally:
        for host in made:
            _ip("netns", "del", host)


def _ip(*arguments: str) -> None:
    try:
        done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    except FileNotFoundError:
        raise HostsError("two_hosts: the command ip must be installed; install iproute2") from None
    if done.returncode:
        raise HostsError(
            f"two_hosts: `ip {' '.join(arguments)}` must succeed, got {done.stderr.strip()!r}; run "
            "it as root, in a container with the capability NET_ADMIN"
        )


def _environment(home: Path, **more: str) -> dict[str, str]:
    own = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    common = {"TRITIUM_HOME": str(home), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return own | common | more


def _command(run: Path, mode: str) -> list[str]:
    return ["train.py", *ARGUMENTS, "--parallel", mode, "--out", str(run)]


def on_one(run: Path, home: Path, mode: str) -> None:
    """Train on four ranks of this machine."""
    subprocess.run(
        [*LAUNCH, "4", "--standalone", *_command(run, mode)], cwd=ROOT, env=_environment(home),
        check=True, capture_output=True, timeout=240,
    )  # fmt: skip


def on_two(run: Path, home: Path, mode: str) -> tuple[float, float]:
    """Train on two ranks of each host; return the bytes that each sent in a step."""
    processes = []
    for i, (host, address) in enumerate(zip(HOSTS, ADDRESSES, strict=True)):
        launch = [
            *LAUNCH, "2", "--nnodes", "2", "--rdzv-backend", "c10d", "--rdzv-id", mode,
            "--rdzv-endpoint", f"{ADDRESSES[0]}:{PORT}", "--rdzv-conf", f"is_host={1 - i}",
            "--local-addr", address,
        ]  # fmt: skip
        processes.append(
            subprocess.Popen(
                ["ip", "netns", "exec", host, *launch, *_command(run, mode)],
                cwd=ROOT,
                env=_environment(home, GLOO_SOCKET_IFNAME=host),
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
        )
    counted = [(step, _sent()) for step in _reached(run, processes, (FIRST, LAST))]
    for host, process in zip(HOSTS, processes, strict=True):
        output, _ = process.communicate(timeout=240)
        if process.returncode:
            raise FailedError(f"{host}: torchrun ended with {process.returncode}:\n{output}")
    (first, before), (last, after) = counted
    a, b = ((y - x) / (last - first) for x, y in zip(before, after, strict=True))
    return a, b


def _reached(
    run: Path, processes: list[subprocess.Popen], wanted: tuple[int, ...]
) -> Iterator[int]:
    """Yield the step of the log as soon as it is at least each of `wanted`."""
    log = run / "log.jsonl"
    for step in wanted:
        while (done := log.read_bytes().count(b"\n") if log.exists() else 0) < step:
            if any(process.poll() is not None for process in processes):
                break
            time.sleep(0.001)
        yield done


def _sent() -> tuple[int, ...]:
    """Return the bytes that each host has sent, frames and headers included."""
    sent = []
    for host in HOSTS:
        shown = subprocess.run(
            ["ip", "netns", "exec", host, "cat", "/proc/net/dev"], capture_output=True, text=True,
            check=True,
        ).stdout  # fmt: skip
        (line,) = re.findall(rf"{host}:(.*)", shown)
        sent.append(int(line.split()[8]))
    return tuple(sent)


def main(write: bool = False) -> None:
    """Train on two hosts of two ranks and on one of four, and compare losses and weights.

    Args:
        write: keep the table in two_hosts.md, in the folder of results.
    """
    compared = []
    with tempfile.TemporaryDirectory() as folder, two_hosts():
        home = Path(folder) / "home"
        for mode in MODES:
            one, two = Path(folder) / f"one-{mode}", Path(folder) / f"two-{mode}"
            on_one(one, home, mode)
            sent = on_two(two, home, mode)
            logs = (read_lines(run / "log.jsonl") for run in (one, two))
            losses = ((x["loss"], y["loss"]) for x, y in zip(*logs, strict=True))
            largest = max(abs(x - y) for x, y in losses)
            compared.append(Compared(mode, largest, end_of(one) == end_of(two), sent))
    table = Table("mode", "largest difference of a loss, nats", "weights, optimizer and curves",
                  "first host sends, kB/step", "second host sends, kB/step")  # fmt: skip
    for x in compared:
        same = "the same bits" if x.identical else "DIFFERENT"
        table.add_row(x.mode, f"{x.largest:.1e}", same, *(f"{y / 1e3:,.0f}" for y in x.sent))
    head = (
        f"`python -m tritium.bench two_hosts --write`, torch {torch.__version__}, "
        f"{device_name(torch.device('cpu'))}",
        f"`torchrun --nnodes 2 --nproc-per-node 2` across two network namespaces, beside "
        f"`--standalone --nproc-per-node 4`; {STEPS} steps of `tiny` in float32, on gloo. Bytes "
        "are those of the virtual interface, TCP and frames included.",
    )
    path = tables.results() / RESULTS
    tables.present(head, table, width=WIDTH, write_to=path if write else None)
    if not all(x.identical for x in compared):
        raise SystemExit(1)

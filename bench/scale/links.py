"""Links between GPUs, and the time of a collective on them.

A ring of n ranks, each of whose tensors is B bytes when it is whole, moves through every rank

    all-gather, reduce-scatter   B · (n - 1) / n
    all-reduce                   B · 2 (n - 1) / n

bytes in each direction (nccl-tests, doc/PERFORMANCE.md; Patarasuk & Yuan, "Bandwidth optimal
all-reduce algorithms for clusters of workstations", 2009). Its time is those bytes over the rate of
the slowest link, and a latency for each of its n - 1 or 2 (n - 1) steps, as NCCL's own model has it
(NVIDIA/nccl, src/graph/tuning.cc). NCCL lays one ring for each network adapter of a node, so a ring
across nodes runs at the rate of all of them together, if that is less than the links' within.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from tritium.kernels.roofline import Device, find_device

REACHED = 235 / 300
"""Reachable share of a link's rate: NCCL counts on 235 of an A100's 300 GB/s (tuning.cc, busBw of
compute capability 8.0). The other links are assumed to reach the same share."""
LATENCY, WITHIN, ACROSS = 8.4e-6, 3.4e-6, 9.6e-6
"""Seconds of a ring, of each step within a node, and of each step across the network (tuning.cc,
baseLat and hwLat of ring and protocol Simple)."""

KINDS = "all-reduce", "all-gather", "reduce-scatter"


@dataclass(frozen=True)
class Links:
    """Links of a GPU in a machine of several; bytes per second in one direction."""

    device: str
    """Name in `kernels.roofline`."""
    within: float
    """Bytes per second to the other GPUs of its node."""
    network: float
    """Bytes per second of a GPU's own network adapter."""
    memory: float
    """Bytes of the device's memory."""
    source: str


LINKS = (
    Links(
        "A100 80GB SXM", 300e9, 25e9, 80e9,
        "NVIDIA A100 datasheet: NVLink 600 GB/s both ways, 80 GB; DGX A100: 8 x 200 Gb/s",
    ),
    Links(
        "H100 SXM", 450e9, 50e9, 80e9,
        "NVIDIA H100 datasheet: NVLink 900 GB/s both ways, 80 GB; DGX H100: 8 x 400 Gb/s",
    ),
    Links(
        "H200", 450e9, 50e9, 141e9,
        "NVIDIA H200 datasheet: NVLink 900 GB/s both ways, 141 GB; DGX H200: 8 x 400 Gb/s",
    ),
    Links(
        "B200", 900e9, 50e9, 180e9,
        "NVIDIA DGX B200 datasheet: NVLink 14.4 TB/s and 1,440 GB for 8 GPUs; 8 x 400 Gb/s",
    ),
    Links(
        "MI300X", 448e9, 50e9, 192e9,
        "AMD MI300X datasheet: 7 links of 128 GB/s both ways, 192 GB; 8 x 400 Gb/s assumed",
    ),
)  # fmt: skip


class Group(NamedTuple):
    """Ranks that communicate with one another."""

    size: int
    per_node: int
    """Number of them that share a node."""

    @property
    def nodes(self) -> int:
        """Number of nodes over which they are spread."""
        return -(-self.size // self.per_node)


class Collective(NamedTuple):
    """A collective operation of a step, as each rank takes part in it."""

    kind: str
    """One of `KINDS`."""
    bytes: int
    """Bytes of the whole tensor: what is reduced, what is gathered, what is scattered."""
    group: Group
    times: int = 1
    """Calls in a step."""

    @property
    def moved(self) -> float:
        """Bytes that each rank sends, and receives, in a step."""
        n = self.group.size
        return self.times * self.bytes * (2 if self.kind == "all-reduce" else 1) * (n - 1) / n


def find_links(name: str) -> tuple[Device, Links]:
    """Return a device's rates and links.

    Args:
        name: part of a name in `kernels.roofline`.

    Raises:
        ValueError: there is no such device, or its links are not known.
    """
    device = find_device(name)
    for links in LINKS:
        if links.device == device.name:
            return device, links
    known = ", ".join(x.device for x in LINKS)
    raise ValueError(f"scale: device must be one whose links are known, {known}; got {name!r}")


def seconds(collective: Collective, links: Links) -> float:
    """Return the time of one call of a collective."""
    n, per_node = collective.group
    if n == 1 or not collective.times:
        return 0.0
    nodes = collective.group.nodes
    turns = 2 if collective.kind == "all-reduce" else 1
    rate = links.within if per_node > 1 else links.network
    if nodes > 1:
        rate = min(rate, per_node * links.network)
    latency = LATENCY + turns * ((n - nodes) * WITHIN + (nodes - 1) * ACROSS)
    return latency + collective.moved / collective.times / (REACHED * rate)

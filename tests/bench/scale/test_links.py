"""Prove that a ring's bytes are those that a simulated ring sends, and that its time is sane."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tritium.bench.scale.links import (
    ACROSS,
    KINDS,
    LATENCY,
    LINKS,
    REACHED,
    WITHIN,
    Collective,
    Group,
    find_links,
    seconds,
)
from tritium.kernels.roofline import DEVICES

H200 = find_links("h200")[1]


def ring(kind: str, n: int, chunk: int) -> tuple[list[list[set]], int]:
    """Pass chunks from rank to rank; return whose chunks each rank ends with, and bytes sent."""
    # held[rank][i]: the ranks whose data are summed into the rank's copy of chunk i
    reducing = kind != "all-gather"
    held = [[{r} if reducing or r == i else set() for i in range(n)] for r in range(n)]
    sent = 0
    turns = {"all-reduce": ("sum", "copy"), "all-gather": ("copy",), "reduce-scatter": ("sum",)}
    for turn in turns[kind]:
        own = 1 if turn == "copy" and kind == "all-reduce" else 0
        for step in range(n - 1):
            passed = [(r, (r - step + own) % n) for r in range(n)]
            arrived = [(r, i, set(held[r][i])) for r, i in passed]
            for r, i, x in arrived:
                there = held[(r + 1) % n]
                there[i] = there[i] | x if turn == "sum" else x
            sent += chunk
    return held, sent


@pytest.mark.parametrize("kind", KINDS)
@given(n=st.integers(1, 9), chunk=st.integers(1, 100))
def test_bytes_are_those_of_a_ring(kind, n, chunk):
    held, sent = ring(kind, n, chunk)
    assert Collective(kind, n * chunk, Group(n, n)).moved == pytest.approx(sent)
    everyone = set(range(n))
    for rank, chunks in enumerate(held):
        if kind == "all-reduce":
            assert chunks == [everyone] * n
        elif kind == "all-gather":
            assert chunks == [{i} for i in range(n)]
        else:
            assert chunks[(rank + 1) % n] == everyone


@given(
    kind=st.sampled_from(KINDS), nodes=st.integers(1, 64), per_node=st.integers(1, 8),
    nbytes=st.integers(1 << 20, 1 << 34),
)  # fmt: skip
def test_a_collective_takes_its_bytes_at_the_slowest_link_and_its_steps(
    kind, nodes, per_node, nbytes
):
    n = nodes * per_node
    one = Collective(kind, nbytes, Group(n, per_node), times=3)
    taken = seconds(one, H200)
    if n == 1:
        assert taken == 0
        return
    rate = H200.within if nodes == 1 else min(H200.within, per_node * H200.network)
    if per_node == 1:
        rate = H200.network
    steps = (2 if kind == "all-reduce" else 1) * (n - 1)
    least, most = (LATENCY + steps * x + one.moved / 3 / (REACHED * rate) for x in (WITHIN, ACROSS))
    if nodes == 1:
        assert taken == pytest.approx(least, rel=1e-9)
    elif per_node == 1:
        assert taken == pytest.approx(most, rel=1e-9)
    else:  # of each ring's steps, as many as there are nodes cross the network
        assert least < taken < most
    assert seconds(one._replace(times=0), H200) == 0
    # Twice the bytes take longer, but not twice as long: the steps are as many.
    twice = seconds(one._replace(bytes=2 * nbytes), H200)
    assert taken < twice < 2 * taken
    # An all-reduce is a reduce-scatter and an all-gather.
    halves = (seconds(one._replace(kind=x), H200) for x in ("reduce-scatter", "all-gather"))
    whole = seconds(one._replace(kind="all-reduce"), H200)
    assert sum(halves) == pytest.approx(whole + LATENCY)


def test_links_are_of_known_devices_and_cite_a_source():
    assert {x.device for x in LINKS} <= {x.name for x in DEVICES}
    assert all("datasheet" in x.source for x in LINKS)
    assert find_links("H200")[0].name == "H200"
    with pytest.raises(ValueError, match="scale: device must be one whose links are known"):
        find_links("4090")
    with pytest.raises(ValueError, match="device must be one of"):
        find_links("h300")

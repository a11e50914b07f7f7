"""Prove that garbage is collected when asked, never meanwhile, and as before afterwards."""

import gc
import weakref

import pytest

from tritium.training.gc_pause import collected_on_request


class Ring:
    def __init__(self):
        self.self = self


@pytest.fixture
def often():
    before = gc.get_threshold()
    gc.set_threshold(1, 1, 1)
    yield
    gc.set_threshold(*before)


def test_collects_on_request_only(often):
    with collected_on_request() as collect:
        rings = [weakref.ref(Ring()) for _ in range(100)]
        assert all(ring() is not None for ring in rings)
        collect()
        assert not any(ring() for ring in rings)
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0
    rings = [weakref.ref(Ring()) for _ in range(100)]
    assert not all(ring() for ring in rings)


def test_a_collector_that_was_off_stays_off():
    gc.disable()
    try:
        with collected_on_request():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()

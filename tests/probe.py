"""Tests of the strict interpreter that pass, and that fail without the mend they are about."""

from collections.abc import Callable

import pytest
from strict_arithmetic import MENDS, RIGHT
from triton.runtime.interpreter import InterpretedFunction


def probe(mend: str) -> Callable:
    """Make a test of the decorated function: it passes, and fails when `mend` is taken away.

    Where this version of Triton is right without the mend, it passes both times.
    """
    ((owner, original),) = [(o, was) for (o, name), (was, _) in MENDS.items() if name == mend]

    def declare(function: Callable[[], None]) -> Callable:
        def test(monkeypatch):
            function()
            monkeypatch.setattr(InterpretedFunction, "rewritten_fn", {})
            if original is None:
                monkeypatch.delattr(owner, mend)
            else:
                monkeypatch.setattr(owner, mend, original)
            if mend in RIGHT:
                function()
                return
            with pytest.raises(BaseException):  # noqa: B017, PT011 (a wrong answer shows in many ways)
                function()

        return test

    return declare

"""Session on a GPU that is at hand for some minutes: tests, step, optimizers, operations."""

import time

START = time.monotonic()
"""When the command began: what it imports takes seconds of its minutes."""

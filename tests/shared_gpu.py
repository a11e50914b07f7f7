"""Number of test processes that share a GPU."""

BYTES = 5 << 30  # of a process: its context, and a tensor with offsets beyond 2^31
MOST = 16


def processes_on_a_gpu(cores: int, memory: int) -> int:
    """Return how many processes share a GPU of `memory` bytes; 14 were seen to share 80 GB."""
    return max(1, min(cores, MOST, memory // BYTES))

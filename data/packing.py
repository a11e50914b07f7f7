"""Packing of documents into windows: best-fit decreasing, the same for the same lengths everywhere.

Each piece goes, the longest first, into the fullest window that still has room for it. Pieces of
one length are placed together, so the work grows with the number of different lengths.

Ding et al., "Fewer Truncations Improve Language Modeling", 2024. https://arxiv.org/abs/2404.10830
"""

import numpy as np


def cut(ends: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """Cut documents into pieces of at most `capacity` tokens; return where each begins and ends.

    Args:
        ends: where each document ends, ascending; the first begins at 0.
        capacity: tokens of a window.
    """
    starts = np.concatenate([[0], ends[:-1]])
    counts = -(-(ends - starts) // capacity)
    nth = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    piece_starts = np.repeat(starts, counts) + nth * capacity
    return piece_starts, np.minimum(piece_starts + capacity, np.repeat(ends, counts))


def pack(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """Return the window of each piece, numbered by the first piece that a window holds.

    Args:
        lengths: of the pieces, in [1, capacity].
        capacity: of a window.
    """
    windows = np.empty(len(lengths), dtype=np.int64)
    with_room: list[list[np.ndarray]] = [[] for _ in range(capacity + 1)]
    has_room = np.zeros(capacity + 1, dtype=bool)
    n_windows = 0
    order = np.argsort(-lengths, kind="stable")
    changes = np.flatnonzero(np.diff(lengths[order])) + 1
    for pieces in np.split(order, changes) if len(order) else []:
        length = int(lengths[pieces[0]])
        while len(pieces):
            fits = np.flatnonzero(has_room[length:])
            if len(fits):
                room = length + int(fits[0])
                candidates = np.concatenate(with_room[room])
            else:
                room = capacity
                new = -(-len(pieces) // (capacity // length))
                candidates = np.arange(n_windows, n_windows + new)
                n_windows += new
            each = room // length
            used, rest = np.split(candidates, [-(-len(pieces) // each)])
            placed = pieces[: len(used) * each]
            windows[placed] = np.repeat(used, each)[: len(placed)]
            pieces = pieces[len(placed) :]
            with_room[room], has_room[room] = ([rest], True) if len(rest) else ([], False)
            full = len(placed) // each  # windows that took all they can
            for filled, left in (
                (used[:full], room - each * length),
                (used[full:], room - len(placed) % each * length),
            ):
                if len(filled):
                    with_room[left].append(filled)
                    has_room[left] = left > 0
    return _by_first_piece(windows, n_windows)


def _by_first_piece(windows: np.ndarray, n_windows: int) -> np.ndarray:
    _, first = np.unique(windows, return_index=True)
    renamed = np.empty(n_windows, dtype=np.int64)
    renamed[np.argsort(first, kind="stable")] = np.arange(n_windows)
    return renamed[windows]

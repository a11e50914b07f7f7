"""Faults of the edges of rows that begin anywhere, in _cross_entropy_rows.py and its launch."""

from functools import partial

from tests.mutants import Mutant

_kernel = partial(Mutant, file="kernels/_cross_entropy_rows.py")
_launch = partial(Mutant, file="kernels/_cross_entropy_launch.py")

MUTANTS = [
    _kernel(
        what="edges left out of the sums",
        original="            if EDGES:\n                m, s, dot",
        replacement="            if EDGES and LEAD > 16:\n                m, s, dot",
    ),
    _kernel(
        what="edges left out of the gradient",
        original="            if EDGES:\n                _store_gradient(",
        replacement="            if EDGES and LEAD > 16:\n                _store_gradient(",
    ),
    _kernel(
        what="edges of an ignored row left unwritten",
        original="                tl.store(dx_ptr + edge_V, zero_E, mask=on_edge_V)\n",
        replacement="                pass\n",
    ),
    _kernel(
        what="the end of the row before in this one's edge",
        original="(edge_V >= h) & (edge_V < h + V)",
        replacement="(edge_V < h + V)",
    ),
    _kernel(
        what="the start of the next row in this one's edge",
        original="(edge_V >= h) & (edge_V < h + V)",
        replacement="(edge_V >= h)",
    ),
    _kernel(
        what="the last column missing",
        original="(edge_V < h + V)",
        replacement="(edge_V < h + V - 1)",
    ),
    _kernel(
        what="the target not counted from the row's first column",
        original="local = target - first + h",
        replacement="local = target - first",
    ),
    _kernel(
        what="class weights not counted from the row's first column",
        original="        w_ptr += first - h\n",
        replacement="        w_ptr += first\n",
    ),
    _kernel(
        what="argmax of an edge counted from the origin",
        original="edge_V, on_edge_V, -h, hit",
        replacement="edge_V, on_edge_V, 0, hit",
    ),
    _kernel(
        what="the tail stops 16 columns early",
        original="left = (cut - full) // 16 * 16 if EDGES",
        replacement="left = (cut - full) // 16 * 16 - 16 if EDGES",
    ),
    _launch(
        what="what begins elsewhere read as if alike",
        original="alike = starts != {0} and len(starts) == 1",
        replacement="alike = starts != {0}",
    ),
    _launch(
        what="no edges at all",
        original="edges = block // lanes >= 32 and (V % 16 != 0 or alike)",
        replacement="edges = False",
    ),
]

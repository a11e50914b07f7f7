"""Faults of the edges of rows that begin anywhere, in _cross_entropy_rows.py and its launch."""

from functools import partial

from tests.mutants import Mutant

_kernel = partial(Mutant, file="kernels/_cross_entropy_rows.py")
_launch = partial(Mutant, file="kernels/_cross_entropy_launch.py")

_packed = partial(Mutant, file="kernels/_packed_rows.py")

MUTANTS = [
    _kernel(
        what="edges left out of the sums",
        original="            if EDGES:\n"
        "                x_edge_V = _read(x_ptr, edge_V, on_edge_V, True, KEEP)",
        replacement="            if EDGES and LEAD > 16:\n"
        "                x_edge_V = _read(x_ptr, edge_V, on_edge_V, True, KEEP)",
    ),
    _kernel(
        what="edges left out of the gradient",
        original="            if EDGES:\n"
        '                x_edge_V = _read(x_ptr, edge_V, on_edge_V, True, "evict_first")',
        replacement="            if EDGES and LEAD > 16:\n"
        '                x_edge_V = _read(x_ptr, edge_V, on_edge_V, True, "evict_first")',
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
    _kernel(
        what="the blocks in registers start at the row's second",
        original="word_P = packed_load(x_ptr, LEAD + i * BLOCK_V, offs_P, None)",
        replacement="word_P = packed_load(x_ptr, LEAD + BLOCK_V, offs_P, None)",
    ),
    _kernel(
        what="every block's gradient from the first in registers",
        original="unpacked(kept[i], hidden_0, x_ptr)",
        replacement="unpacked(kept[0], hidden_0, x_ptr)",
    ),
    _kernel(
        what="the last block in registers changed by the number that hides it",
        original="dx_ptr + full, unpacked(tail, hidden_0, x_ptr)",
        replacement="dx_ptr + full, unpacked(tail, hidden_0 + 1, x_ptr)",
    ),
    _kernel(
        what="the blocks read again written at their mirror image",
        original="                        dx_ptr + v, x_V, q_ptr + v",
        replacement="                        dx_ptr + back, x_V, q_ptr + v",
    ),
    _kernel(
        what="blocks in registers of an ignored row left unwritten",
        original="                tl.store(dx_ptr + LEAD + i * BLOCK_V + offs_V, zero_V)\n",
        replacement="                pass\n",
    ),
    _kernel(
        what="the blocks in registers summed once more from memory",
        original="for v in range(LEAD + KEPT * BLOCK_V, full, BLOCK_V):\n                    x_V",
        replacement="for v in range(LEAD, full, BLOCK_V):\n                    x_V",
    ),
    _packed(
        what="halves of a word exchanged",
        original="tl.interleave(low_P, high_P)",
        replacement="tl.interleave(high_P, low_P)",
    ),
    _packed(
        what="the last words of a row cut off",
        original="mask=offs_P < left // 2",
        replacement="mask=offs_P < left // 2 - 1",
    ),
    _packed(
        what="rows that begin at any address read by words",
        original=" or x_MN.data_ptr() % 16",
        replacement="",
    ),
    _packed(
        what="float32 read as two numbers",
        original="x_MN.element_size() != 2 or ",
        replacement="",
    ),
    _packed(
        what="one block too few for a row that starts late",
        original="cdiv(N, 16) * 16 - 16 if lead",
        replacement="cdiv(N, 16) * 16 - 32 if lead",
    ),
    _packed(
        what="all blocks full where the last is cut short",
        original="min(blocks, BLOCKS) - 1",
        replacement="min(blocks, BLOCKS)",
    ),
]

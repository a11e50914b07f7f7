"""Faults of the gradient norm and of clipping to it: sums, the factor, races, dtypes, layers."""

from functools import partial

from tests.mutants import Mutant

_mutant = partial(Mutant, file="kernels/optimizers/grad_norm.py")
_clip = partial(Mutant, file="kernels/optimizers/clip_grad_norm.py")

MUTANTS = [
    _mutant(
        what="a factor above one for nan",
        original="tl.where(coef > 1.0, 1.0, coef)",
        replacement="tl.where(coef < 1.0, coef, 1.0)",
    ),
    _clip(
        what="never scales",
        original="if coef == 1.0:",
        replacement="if coef <= 1.0:",
    ),
    _clip(
        what="every program writes the norm",
        original="    if p == 0:\n        tl.store(norm_ptr, norm)",
        replacement="    tl.store(norm_ptr, norm)",
    ),
    _mutant(
        what="float16 read as bfloat16",
        original="elif dtype == FLOAT16:\n            squares",
        replacement="elif dtype == FLOAT32:\n            squares",
    ),
    _mutant(
        what="the last element of a tail left out",
        original="for first in range(full, end, BLOCK):\n        g = load(address, first",
        replacement="for first in range(full, end - 1, BLOCK):\n        g = load(address, first",
    ),
    _clip(
        what="the change not counted",
        original="    torch.autograd.graph.increment_version(held)\n    return norm\n",
        replacement="    return norm\n",
    ),
    _clip(
        what="a layer's change not counted",
        original="    torch.autograd.graph.increment_version(held)\n    return norm_G\n",
        replacement="    return norm_G\n",
    ),
    _clip(
        what="float16 scaled as bfloat16",
        original="elif dtype == FLOAT16:\n        _scale",
        replacement="elif dtype == FLOAT32:\n        _scale",
    ),
    _clip(
        what="the tail not scaled",
        original="for first in range(full, end, THREADS):",
        replacement="for first in range(full, end - THREADS, THREADS):",
    ),
    _clip(
        what="one factor for all layers",
        original="tl.load(squares_ptr + tl.load(row_ptr + GROUP))",
        replacement="tl.load(squares_ptr + 5)",
    ),
    _clip(
        what="a layer without its last chunk",
        original="mask_K = offs_K < end",
        replacement="mask_K = offs_K < end - 1",
    ),
    _clip(
        what="a layer with the first tensor of the next",
        original="tl.load(layers_ptr + layer + 1)",
        replacement="tl.load(layers_ptr + layer + 1) + 1",
    ),
    _clip(
        what="only the first layers' norms returned",
        original="for start in range(0, n_layers, BLOCK_G):",
        replacement="for start in range(0, BLOCK_G, BLOCK_G):",
    ),
    _clip(
        what="small layers scaled up",
        original="        coef = clip_coefficient(norm, max_norm)\n        if coef != 1.0:",
        replacement="        coef = max_norm / (norm + 1e-6)\n        if coef != 1.0:",
    ),
    _clip(
        what="layers numbered without those that are empty",
        original="for layer, size in enumerate(sizes))",
        replacement="for layer, size in enumerate(filter(None, sizes)))",
    ),
    _clip(
        what="factors of the reference in the order of tensors",
        original="coef_G.repeat_interleave(torch.tensor(sizes, device=coef_G.device))",
        replacement="coef_G.repeat(len(grads))[: len(grads)]",
    ),
    _clip(
        what="one gradient scaled twice",
        original="    check_distinct(op, [g.data_ptr() for g in grads if g.numel()])\n",
        replacement="",
    ),
]

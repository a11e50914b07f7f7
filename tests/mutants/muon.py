"""Faults of Muon: momentum, the three products of a step, rows, layout, what is AdamW's."""

from functools import partial

from tests.mutants import Mutant

_kernel = partial(Mutant, file="kernels/optimizers/_muon_kernels.py")
_launch = partial(Mutant, file="kernels/optimizers/_muon_launch.py")
_reference = partial(Mutant, file="kernels/optimizers/_orthogonalize.py")
_matrices = partial(Mutant, file="kernels/optimizers/_matrices.py")
_muon = partial(Mutant, file="kernels/optimizers/muon.py")

MUTANTS = [
    _kernel(
        what="the gradient taken before the mean counts it",
        original="    u = (m + tl.load(coef_ptr + BEHIND) * (g - m)).to(tl.bfloat16)",
        replacement="    u = (g + tl.load(coef_ptr + BEHIND) * (m - g)).to(tl.bfloat16)",
    ),
    _kernel(
        what="gradients not clipped",
        original="    g *= tl.load(coef_ptr)\n",
        replacement="",
    ),
    _kernel(
        what="momentum of a step that is not finite",
        original="""    if norm_ptr is not None:
        apply = is_finite(tl.load(norm_ptr))
    if offset >= 0:""",
        replacement="    if offset >= 0:",
    ),
    _kernel(
        what="the last elements of a tail left out",
        original="        tl.store(to_ptr + offs, u, mask=offs < end)",
        replacement="        tl.store(to_ptr + offs, u, mask=offs < end - 1)",
    ),
    _kernel(
        what="least norm ignored",
        original="    return 1 / tl.maximum(tl.sqrt_rn(squares), tl.load(numbers_ptr))",
        replacement="    return 1 / tl.sqrt_rn(squares)",
    ),
    _kernel(
        what="the trace without its last tile",
        original="    for i in range(0, count):\n",
        replacement="    for i in range(0, tl.maximum(count - 1, 1)):\n",
    ),
    _kernel(
        what="tiles below the diagonal not stored",
        original="    if i != j:\n        ptrs, mask = _tile_ptrs(a_ptr",
        replacement="    if i > j:\n        ptrs, mask = _tile_ptrs(a_ptr",
    ),
    _kernel(
        what="tiles below the diagonal not transposed",
        original="tl.store(ptrs, tl.trans(tile), mask=mask)",
        replacement="tl.store(ptrs, tile, mask=mask)",
    ),
    _kernel(
        what="square scaled by the norm's square, not its fourth power",
        original="c * inverse * inverse * inverse * inverse",
        replacement="c * inverse * inverse",
    ),
    _kernel(
        what="the first product not divided by the norm",
        original="        factor = _inverse_norm(",
        replacement="        factor = 0 * _inverse_norm(",
    ),
    _kernel(
        what="clipped twice",
        original="        tl.store(coefs_ptr + tensor * (BASE + COEFS), 1.0, mask=",
        replacement="        tl.store(coefs_ptr + tensor * (BASE + COEFS), 0.5, mask=",
    ),
    _kernel(
        what="coefficients of the first step in every step",
        original="    weight = tl.load(numbers_ptr + 3 + 3 * step)",
        replacement="    weight = tl.load(numbers_ptr + 3)",
    ),
    _kernel(
        what="second moment of rows moved the wrong way",
        original="(mean_R - v_R)",
        replacement="(v_R - mean_R)",
    ),
    _kernel(
        what="mean of a row over the rows",
        original="    mean_R = square_R / n_columns",
        replacement="    mean_R = square_R / n_rows",
    ),
    _kernel(
        what="rows beyond the last counted",
        original="tl.sum(tl.where(rows < n_rows, after_R, 0.0))",
        replacement="tl.sum(tl.where(rows <= n_rows, after_R + 1.0, 0.0))",
    ),
    _launch(
        what="the result not scaled by the shape",
        original="        triples[-1] = [scale * x for x in triples[-1]]",
        replacement="        triples[-1] = [*triples[-1]]",
    ),
    _launch(
        what="buffers of one parity",
        original="        x, y = xs[left % 2], xs[(left - 1) % 2]",
        replacement="        x, y = xs[0], xs[1]",
    ),
    _launch(
        what="weight of the mean for that of the news",
        original="    weight = 0.0 if recipe.beta2 is None else 1 - recipe.beta2",
        replacement="    weight = 0.0 if recipe.beta2 is None else recipe.beta2",
    ),
    _reference(
        what="last coefficients of a list start again",
        original="found[min(i, len(found) - 1)]",
        replacement="found[i % len(found)]",
    ),
    _reference(
        what="a digit of the coefficients",
        original="(3.3184196573706015, -2.488488024314874, 0.51004894012372)",
        replacement="(3.3184196573706015, -2.488488024314874, 0.51104894012372)",
    ),
    _reference(
        what="the norm after rows are divided not restored",
        original="    return y_NRC * (before_N11 / after_N11.clamp(min=SMALLEST_SQUARE))",
        replacement="    return y_NRC",
    ),
    _matrices(
        what="second moments not kept",
        original="                row.copy_(v_R1)",
        replacement="                row.clone().copy_(v_R1)",
    ),
    _matrices(
        what="norms of gradients are those of the result",
        original="        if squares is not None:\n            squares[GRADS",
        replacement="        if squares is None:\n            squares[GRADS",
    ),
    _muon(
        what="half of the momentum ahead",
        original='        behind = 1 - group["momentum"] if group["nesterov"] else 0.0',
        replacement='        behind = 1 - group["momentum"]',
    ),
    _muon(
        what="own options lost with another's state",
        original="{name: own[name] for name in self.optional_keys} | group for group",
        replacement="group for group",
    ),
    _muon(
        what="norms of gradients from the last launch",
        original="            sums[:, GRADS.value] = squares_K",
        replacement="            sums[:, GRADS.value] += 0 * squares_K",
    ),
    _muon(
        what="AdamW's epsilon is Muon's",
        original="""        groups = [group | {"eps": group["adamw_eps"]} for group in groups]""",
        replacement="        groups = [group | {} for group in groups]",
    ),
    _matrices(
        what="a sum of splits too short",
        original="(sum(splits) != len(p) or min(splits, default=0) < 1)",
        replacement="(sum(splits) > len(p) or min(splits, default=0) < 1)",
    ),
]

"""Faults of linear_cross_entropy.py that cost time or memory, or make chunks show."""

from functools import partial

from tests.mutants import Mutant

_scaling = partial(Mutant, file="kernels/_scale_gradient.py")
_mutant = partial(Mutant, file="kernels/_linear_cross_entropy.py")

MUTANTS = [
    _mutant(
        what="dweight of a frozen head",
        original="        if want_weight:\n",
        replacement="        if want_weight or want_hidden:\n",
    ),
    _mutant(
        what="dhidden of a frozen hidden state",
        original="        if want_hidden:\n",
        replacement="        if want_hidden or want_weight:\n",
    ),
    _mutant(
        what="all logits of a frozen head at once",
        original="torch.bfloat16 and wants[1] and weight_grad is None",
        replacement="torch.bfloat16 and weight_grad is None",
    ),
    _scaling(
        what="a float32 copy of the sum",
        original="        scale_gradient_(g, factor)\n        return g\n",
        replacement="        return g * factor\n",
    ),
    _scaling(
        what="a float32 copy before the sum is rounded",
        original="    return scale_gradient(g, factor, dtype)\n",
        replacement="    return (g * factor).to(dtype)\n",
    ),
    _scaling(
        what="a kept graph's gradients scaled in place",
        original="g.dtype == dtype and not _get_current_graph_task_keep_graph()",
        replacement="g.dtype == dtype",
    ),
    _mutant(
        what="rows scaled by the mean in one chunk only",
        original="        first, rest = scale, None\n",
        replacement="        one = torch.ones_like(scale)\n"
        "        first, rest = (scale, None) if plan.single_bf16_chunk else (one, scale)\n",
    ),
]

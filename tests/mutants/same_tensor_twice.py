"""Faults of what Dynamo is given of a tensor that comes twice, in runtime.py."""

from functools import partial

from tests.mutants import Mutant

_runtime = partial(Mutant, file="kernels/runtime.py")

MUTANTS = [
    _runtime(
        what="a tensor given twice",
        original="function.apply(*_distinct(args))",
        replacement="function.apply(*args)",
    ),
    _runtime(
        what="only a tensor right behind itself seen",
        original="            tensors.append(x)\n",
        replacement="            tensors[:] = [x]\n",
    ),
    _runtime(
        what="only the first tensor looked for",
        original="            tensors.append(x)\n",
        replacement="            tensors = tensors or [x]\n",
    ),
    _runtime(
        what="a tensor cut off from its gradient",
        original="x.view_as(x) if any(x is y for y in tensors) else x",
        replacement="x.detach() if any(x is y for y in tensors) else x",
    ),
    _runtime(
        what="a tensor's own gradient cut off",
        original="x.view_as(x) if any(x is y for y in tensors) else x",
        replacement="x.view_as(x) if any(x is y for y in tensors) else x.detach()",
    ),
    _runtime(
        what="what is no tensor left out",
        original="        found.append(x)\n",
        replacement="            found.append(x)\n",
    ),
    Mutant(
        what="the rows of linear_kl_div applied by PyTorch",
        file="kernels/_linear_kl_div.py",
        original="apply(_LinearKLDivRows, plan, options, *tensors)",
        replacement="_LinearKLDivRows.apply(plan, options, *tensors)",
    ),
    Mutant(
        what="linear_kl_div applied by PyTorch",
        file="kernels/_linear_kl_div.py",
        original="apply(_LinearKLDiv, scale, plan, options, *tensors)",
        replacement="_LinearKLDiv.apply(scale, plan, options, *tensors)",
    ),
    Mutant(
        what="qk_norm_rope applied by PyTorch",
        file="kernels/qk_norm_rope.py",
        original="apply(_QkNormRope, qkv",
        replacement="_QkNormRope.apply(qkv",
    ),
    Mutant(
        what="add_rms_norm applied by PyTorch",
        file="kernels/_norm_launch.py",
        original="apply(_AddNorm, x",
        replacement="_AddNorm.apply(x",
    ),
    Mutant(
        what="swiglu applied by PyTorch",
        file="kernels/_activation.py",
        original="apply(_Activation, x, up, activation)",
        replacement="_Activation.apply(x, up, activation)",
    ),
]

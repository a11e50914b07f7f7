"""Faults of losses whose classes are split over ranks: statistics, targets, offsets."""

from functools import partial

from tests.mutants import Mutant

_combine = partial(Mutant, file="kernels/_cross_entropy_options.py")
_ranks = partial(Mutant, file="kernels/_cross_entropy_ranks.py")
_kernel = partial(Mutant, file="kernels/_cross_entropy_rows.py")

MUTANTS = [
    _combine(
        what="sums added at different maxima",
        original="combined_RT[[Row.SUM, Row.SPREAD]] *= gap_T.exp()",
        replacement="combined_RT[[Row.SUM, Row.SPREAD]] *= 1",
    ),
    _combine(
        what="entropy at the wrong maximum",
        original="combined_RT[Row.SPREAD] += values_RT[Row.SUM] * gap_T",
        replacement="combined_RT[Row.SPREAD] += 0 * gap_T",
    ),
    _combine(
        what="the mass of hard targets counted by every rank",
        original="*([Row.MASS] if soft else [])]",
        replacement="Row.MASS]",
    ),
    _combine(
        what="the target's logit of one rank only",
        original="summed = [Row.SUM, Row.DOT, Row.TARGET, Row.SPREAD,",
        replacement="summed = [Row.SUM, Row.DOT, Row.SPREAD,",
    ),
    _combine(
        what="argmax of a rank that has not the maximum",
        original="found_T = (gap_T == 0) & (argmax_T >= 0)",
        replacement="found_T = argmax_T >= 0",
    ),
    _ranks(
        what="classes of the other rank",
        original="return Classes(dist.get_rank(group) * V,",
        replacement="return Classes((1 - dist.get_rank(group)) * V,",
    ),
    _ranks(
        what="DTensors: classes of the other rank",
        original="Classes(mesh.get_local_rank(dim) * rows,",
        replacement="Classes((1 - mesh.get_local_rank(dim)) * rows,",
    ),
    _ranks(
        what="DTensors: the first class as if ranks had equally many",
        original="mesh.get_local_rank(dim) * rows, V,",
        replacement="mesh.get_local_rank(dim) * (V // ranks), V,",
    ),
    _ranks(
        what="DTensors: classes of one rank alone",
        original="* rows, V, name)",
        replacement="* rows, V, '')",
    ),
    _ranks(
        what="DTensors: gradients added over the ranks",
        original="if part.requires_grad and ranks > 1:",
        replacement="if False:",
    ),
    _ranks(
        what="DTensors: gradients of this rank's tokens",
        original="placed[dim], returned[dim] = Replicate(), Partial()",
        replacement="placed[dim] = returned[dim] = Replicate()",
    ),
    _ranks(
        what="DTensors: a group that splits no classes",
        original="_dim_of_group(op, weight, group)\n        tokens",
        replacement="None\n        tokens",
    ),
    _ranks(
        what="DTensors: classes gathered over their own dimension",
        original="for d in range(mesh.ndim) if d != dim]",
        replacement="for d in range(mesh.ndim)]",
    ),
    _ranks(
        what="DTensors: a rank without classes",
        original="if rows * (ranks - 1) >= V:",
        replacement="if False:",
    ),
    _ranks(
        what="DTensors: an input that is sharded",
        original="if input.device_mesh != mesh or not replicated or",
        replacement="if input.device_mesh != mesh or",
    ),
    _ranks(
        what="DTensors: columns taken for classes",
        original="if placement.is_shard(0):",
        replacement="if True:",
    ),
    _combine(
        what="ignored rows summed over the ranks",
        original="    values_RT[Row.SUM].masked_fill_(ignored_T, 1)\n",
        replacement="",
    ),
    _combine(
        what="reference: gradient at this rank's own maximum",
        original="rate_T = (m_T - values_RT[Row.MAXIMUM]).exp() / values_RT[Row.SUM]",
        replacement="rate_T = 1 / values_RT[Row.SUM]",
    ),
    _kernel(
        what="target not counted from the rank's first class",
        original="local = target - first",
        replacement="local = target - 0 * first",
    ),
    _kernel(
        what="class weights not counted from the rank's first class",
        original="        w_ptr += first - h\n",
        replacement="        w_ptr -= h\n",
    ),
    _kernel(
        what="smoothing over this rank's classes",
        original="uniform = label_smoothing / n_classes",
        replacement="uniform = label_smoothing / V",
    ),
    _kernel(
        what="a class that no rank has is 0",
        original='own_z_t = tl.where(owned, z_t, tl.where(known, 0.0, float("nan")))',
        replacement="own_z_t = tl.where(owned, z_t, 0.0)",
    ),
    Mutant(
        what="the hidden states' gradient of one rank only",
        file="kernels/_linear_cross_entropy.py",
        original="    if options.group and want_hidden:",
        replacement="    if options.group and want_hidden and False:",
    ),
]

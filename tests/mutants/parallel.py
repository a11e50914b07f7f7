"""Faults of runs on several ranks: their shares, sums, seeds, signals and checkpoints."""

from functools import partial

from tests.mutants import Mutant

_parallel = partial(Mutant, file="training/parallel.py")
_ranks = partial(Mutant, file="training/run/ranks.py")
_saver = partial(Mutant, file="training/run/saver.py")
_train = partial(Mutant, file="train.py")

MUTANTS = [
    _parallel(
        what="gradients averaged over ranks instead of added",
        original="(loss if self.data.size == 1 else loss * self.data.size).backward()",
        replacement="loss.backward()",
    ),
    _parallel(
        what="ddp reduces every micro-batch",
        original="with nullcontext() if last else self._wrapped.no_sync():",
        replacement="with nullcontext():",
    ),
    _parallel(
        what="ddp reduces no micro-batch",
        original="with nullcontext() if last else self._wrapped.no_sync():",
        replacement="with self._wrapped.no_sync():",
    ),
    _parallel(
        what="fsdp reduces every micro-batch",
        original=".set_requires_gradient_sync(last)",
        replacement=".set_requires_gradient_sync(True)",
    ),
    _parallel(
        what="a batch that the ranks do not divide",
        original="if config.batch_size % sharing:",
        replacement="if False:",
    ),
    _parallel(
        what="a reversible model in parts",
        original="    if config.model.reversible:",
        replacement="    if False:",
    ),
    _parallel(
        what="adapters split with their layers",
        original='    if mode == "tp" and config.lora_rank is not None:',
        replacement="    if False:",
    ),
    _parallel(
        what="groups that do not divide the processes",
        original="    if size % own:",
        replacement="    if False:",
    ),
    _parallel(
        what="groups of one process",
        original="    if own == 1:",
        replacement="    if False:",
    ),
    _parallel(
        what="hsdp of one group",
        original='    if mode == "hsdp" and own == size:',
        replacement="    if False:",
    ),
    _parallel(
        what="heads that a group does not divide",
        original='    if mode == "tp" and (why :=',
        replacement="    if False and (why :=",
    ),
    _parallel(
        what="a group size that nothing reads",
        original="    if config.group_size and mode not in MESHES and not config.resume:",
        replacement="    if False:",
    ),
    _parallel(
        what="no other mode for a run in groups",
        original="mode not in MESHES and not config.resume:",
        replacement="mode not in MESHES:",
    ),
    _parallel(
        what="tp: a batch for every process",
        original='size // group_size_of(config, size) if mode == "tp" else size',
        replacement="size",
    ),
    _parallel(
        what="auto: memory of one process counted for all",
        original="free_memory(device) // each",
        replacement="free_memory(device)",
    ),
    _parallel(
        what="auto: fsdp of what it refuses",
        original='(why := _obstacle(config, "fsdp", ranks.size)) is not None',
        replacement='(why := _obstacle(config, "ddp", ranks.size)) is not None',
    ),
    _parallel(
        what="auto: always ddp",
        original="if not ranks.most(2 * needed > free):",
        replacement="if True:",
    ),
    _parallel(
        what="tp: the groups of hsdp",
        original='"tp": ("data", tensor_parallel.DIMENSION)',
        replacement='"tp": (tensor_parallel.DIMENSION, "data")',
    ),
    _parallel(
        what="a restart that finds no run",
        original="if not config.out:",
        replacement="if False:",
    ),
    _parallel(
        what="a restart that begins anew",
        original='return [*given, "--resume"]',
        replacement="return given",
    ),
    _parallel(
        what="every rank tracks",
        original="config.observing.track if self.ranks.first else ()",
        replacement="config.observing.track",
    ),
    _ranks(
        what="sums of one rank",
        original="dist.all_reduce(x, group=self.group)",
        replacement="pass",
    ),
    _ranks(
        what="a signal that one rank notes",
        original="dist.all_reduce(largest, dist.ReduceOp.MAX, group=self.group)",
        replacement="pass",
    ),
    _ranks(
        what="every rank prints",
        original="console.quiet = rank > 0",
        replacement="console.quiet = False",
    ),
    _ranks(
        what="errors without the rank",
        original="f\"train.py: rank {os.environ['RANK']}\"",
        replacement='"train.py"',
    ),
    _ranks(
        what="a temporary folder left",
        original='with TemporaryDirectory(prefix="tritium-rank-") as own:',
        replacement='for own in [__import__("tempfile").mkdtemp(prefix="tritium-rank-")]:',
    ),
    _saver(
        what="of a sharded model only the first part saved",
        original="if not self._ranks.first and not parts:",
        replacement="if not self._ranks.first:",
    ),
    _train(
        what="the same share of the batch on every rank",
        original="seed=config.seed, **share.place",
        replacement="seed=config.seed, **share.place | {'rank': 0}",
    ),
    _train(
        what="the mean of a rank's own targets",
        original="counted / parallel.data.sum(counted.sum()).clamp(min=1)",
        replacement="counted / (counted.sum() * parallel.data.size).clamp(min=1)",
    ),
    _train(
        what="the loss of one rank",
        original="return parallel.data.sum(total)",
        replacement="return total * parallel.data.size",
    ),
    _train(
        what="no seed for a step",
        original="        share.seed_step(config.seed, step)\n",
        replacement="",
    ),
    Mutant(
        what="validation of one rank",
        file="training/evaluation.py",
        original="loss = total(nats).item() / n_tokens",
        replacement="loss = nats.item() / n_tokens * 2",
    ),
]

"""Faults of sharded checkpoints: parts are not read as they were written, or damage is accepted."""

from functools import partial

from tests.mutants import Mutant

_sharded = partial(Mutant, file="training/run/sharded.py")
_saved = partial(Mutant, file="model/saved.py")
_written = partial(Mutant, file="training/run/checkpoint.py")
_whole = partial(Mutant, file="training/consolidate.py")

MUTANTS = [
    _sharded(
        what="a copy that follows training",
        original='part = x.to_local().to("cpu", copy=True)',
        replacement="part = x.to_local()",
    ),
    _sharded(
        what="parts not compared with their checksums",
        original="if dist.get_rank() == 0:",
        replacement="if False:",
    ),
    _sharded(
        what="what one process wrote not sharded",
        original="if p is not None and p.shape == x.shape and is_distributed(p):",
        replacement="if False:",
    ),
    _sharded(
        what="states in the dtype of the parameter",
        original="torch.empty_like(p, dtype=dtype, requires_grad=False)",
        replacement="torch.empty_like(p, requires_grad=False)",
    ),
    _sharded(
        what="a failed write accepted",
        original='raise OSError(f"{draft}: {causes}") from None',
        replacement="pass",
    ),
    _saved(
        what="parts not compared in one process",
        original="        check_files(checkpoint, record)\n        return",
        replacement="        return",
    ),
    _saved(
        what="weights read as moments",
        original="if key.startswith(begin) and",
        replacement="if",
    ),
    _saved(
        what="the folder of the shards to be moved, not the checkpoint",
        original="path.parent.parent if path.parent.name == SHARDS else path.parent",
        replacement="path.parent",
    ),
    _written(
        what="a sharded draft left",
        original="    except OSError:\n        if ranks.first:",
        replacement="    except OSError:\n        if False:",
    ),
    _written(
        what="files in folders without a checksum",
        original='draft.rglob("*")',
        replacement='draft.glob("*")',
    ),
    _whole(
        what="a run in use made whole",
        original="with lock_folder(found.parent.parent, resume=True):",
        replacement="if True:",
    ),
    _whole(
        what="a whole checkpoint written anew",
        original="if FILES[0] in files:",
        replacement="if False:",
    ),
]

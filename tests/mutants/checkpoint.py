"""Faults of checkpoints: what is damaged or of another model is read, what is kept is not whole."""

from functools import partial

from tests.mutants import Mutant

_read = partial(Mutant, file="model/saved.py")
_write = partial(Mutant, file="training/run/checkpoint.py")

MUTANTS = [
    _read(
        what="the record's checksum not compared",
        original='if record.pop("sha256", None) != record_digest(record):',
        replacement='if record.pop("sha256", None) is None:',
    ),
    _read(
        what="a file's checksum not compared",
        original="if file_digest(path) != expected:",
        replacement="if False:",
    ),
    _read(
        what="a file's size not compared",
        original='if path.stat().st_size != expected["bytes"]:',
        replacement="if False:",
    ),
    _read(
        what="another format read",
        original='if record["format"] != FORMAT:',
        replacement="if False:",
    ),
    _read(
        what="more or fewer tensors accepted",
        original="if tensors.keys() != parameters.keys():",
        replacement="if not tensors.keys() & parameters.keys():",
    ),
    _read(
        what="another shape accepted",
        original="if saved.shape != p.shape:",
        replacement="if saved.dim() != p.dim():",
    ),
    _read(
        what="another precision accepted",
        original="if saved.dtype != p.dtype:",
        replacement="if False:",
    ),
    _read(
        what="another precision called damage",
        original='f"{checkpoint} is of another precision: weights in',
        replacement='f"{checkpoint} is damaged: weights in',
    ),
    Mutant(
        what="a copy that follows training",
        file="training/run/sharded.py",
        original='        return x.to("cpu", copy=True)',
        replacement='        return x.to("cpu")',
    ),
    _write(
        what="a state that follows training",
        original="return Snapshot(step, tensors, json.loads(json.dumps(record)), parts)",
        replacement="return Snapshot(step, tensors, record, parts)",
    ),
    _write(
        what="a draft left where the disk was full",
        original="shutil.rmtree(draft, ignore_errors=True)\n        raise",
        replacement="raise",
    ),
    _write(
        what="a replaced checkpoint not put back",
        original="if not final.exists():",
        replacement="if False:",
    ),
    _write(
        what="deleted checkpoints left",
        original='(".step-*.tmp", ".step-*.replaced", ".step-*.old")',
        replacement='(".step-*.tmp", ".step-*.replaced")',
    ),
    _write(
        what="another model of the same shapes accepted",
        original="    if same_model:\n        _check_config",
        replacement="    if False:\n        _check_config",
    ),
    _write(
        what="weights not restored",
        original="p.copy_(weights[name])",
        replacement="weights[name]",
    ),
]

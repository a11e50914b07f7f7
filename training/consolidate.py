"""Turn a sharded checkpoint into one of two safetensors files, as a run in one process writes it.

    python -m tritium.training.consolidate RUN

The newest checkpoint of the run is replaced, or the one that is named. Nothing needs this to read a
checkpoint: it makes files for other programs, and without torch's pickled index.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import tyro

import tritium
from tritium.model.saved import FILES, CheckpointError, newest, read_record, read_tensors
from tritium.training.monitor.terminal import tolerant_output
from tritium.training.run import checkpoint
from tritium.training.run.run_folder import RunFolderError, lock_folder


def consolidate(source: Path) -> Path:
    """Replace a sharded checkpoint by a whole one; return its folder, unchanged if it is whole.

    Args:
        source: folder of a run, or of one of its checkpoints.

    Raises:
        CheckpointError: there is none, or it is damaged.
        RunFolderError: the run is in use.
        OSError: it could not be written; the sharded one stays.
    """
    found = newest(source)
    with lock_folder(found.parent.parent, resume=True):
        record = read_record(found)
        files = record.pop("files")
        if FILES[0] in files:
            return found
        tensors = {name: read_tensors(found, name, record | {"files": files}) for name in FILES}
        whole = checkpoint.Snapshot(record["step"], tensors, record)
        return checkpoint.write(found.parent, whole)


def main(source: Annotated[Path, tyro.conf.Positional]) -> None:
    """Make the newest checkpoint of a run one of two safetensors files.

    Args:
        source: folder of a run of train.py, or of one of its checkpoints.
    """
    print(consolidate(source) / FILES[0])


if __name__ == "__main__":
    try:
        with tritium.interruptible(), tolerant_output():
            tyro.cli(main, prog="python -m tritium.training.consolidate")
    except (CheckpointError, RunFolderError, OSError) as error:
        print(f"tritium.training.consolidate: {error}", file=sys.stderr)
        sys.exit(2)

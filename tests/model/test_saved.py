"""Prove that a run can be read while it trains, and deletes what was to be read."""

import pytest

from tritium.model import saved
from tritium.model.saved import CheckpointError, best, newest, read_chosen


def folders(tmp_path, *steps):
    made = [tmp_path / "checkpoints" / f"step-{step:08}" for step in steps]
    for folder in made:
        folder.mkdir(parents=True)
    return made


def deleting(folder, error, last, result):
    """A reader that finds `folder` gone, and a newer one in its place."""

    def read(checkpoint, *_):
        if checkpoint == folder:
            last.mkdir()
            folder.rmdir()
            raise error("gone")
        return result

    return read


@pytest.mark.parametrize("error", [CheckpointError, FileNotFoundError, RuntimeError])
def test_a_checkpoint_that_is_deleted_gives_way_to_the_newest(error, tmp_path, monkeypatch):
    (first,) = folders(tmp_path, 2)
    last = first.with_name("step-00000004")
    monkeypatch.setattr(saved, "read_model", deleting(first, error, last, "model"))
    assert read_chosen(tmp_path, newest, object) == "model"


def test_the_record_of_one_that_is_deleted_gives_way_too(tmp_path, monkeypatch):
    third, first = folders(tmp_path, 3, 4)
    last = first.with_name("step-00000005")
    record = {"state": {"best": {"step": 3}}}
    monkeypatch.setattr(saved, "read_record", deleting(first, CheckpointError, last, record))
    assert best(tmp_path) == third


def test_one_that_is_there_and_damaged_is_an_error(tmp_path):
    folders(tmp_path, 2)
    for choose in (newest, best):
        with pytest.raises(CheckpointError, match=r"state\.json does not exist"):
            read_chosen(tmp_path, choose, object)


def test_the_last_one_that_is_deleted_ends_in_a_sentence(tmp_path, monkeypatch):
    (only,) = folders(tmp_path, 2)

    def read(checkpoint, _):
        only.rmdir()
        raise FileNotFoundError

    monkeypatch.setattr(saved, "read_model", read)
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        read_chosen(tmp_path, newest, object)

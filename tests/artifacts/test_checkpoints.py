"""Checkpoints of jobs: written whole, found damaged, bounded."""

import os
from pathlib import Path

import pytest
import torch

from patchclamp_server.artifacts.blobs import BlobStore
from patchclamp_server.artifacts.checkpoints import Checkpoints, DamagedCheckpoint

TENSORS = {"counts": torch.arange(4), "sum": torch.tensor([0.5], dtype=torch.float64)}


def file(root: Path, key: str) -> Path:
    return root / "checkpoints" / key


def test_a_checkpoint_comes_back_as_it_was_written_and_the_last_one_counts(tmp_path: Path) -> None:
    checkpoints = Checkpoints(BlobStore(tmp_path))
    assert checkpoints.load("k") is None
    checkpoints.save("k", {}, {"tokens": 1})
    checkpoints.save("k", TENSORS, {"tokens": 7, "cut": {"start": 2}})
    saved = Checkpoints(BlobStore(tmp_path)).load("k")
    assert saved is not None
    assert saved.about == {"tokens": 7, "cut": {"start": 2}}
    assert saved.tensors.keys() == TENSORS.keys()
    assert all(torch.equal(saved.tensors[name], tensor) for name, tensor in TENSORS.items())
    checkpoints.remove("k")
    checkpoints.remove("k")
    assert checkpoints.load("k") is None


def test_every_change_of_a_byte_and_every_end_is_found(tmp_path: Path) -> None:
    checkpoints = Checkpoints(BlobStore(tmp_path))
    checkpoints.save("k", TENSORS, {"tokens": 7})
    data = file(tmp_path, "k").read_bytes()
    for at in range(0, len(data), 7):
        for damaged in (data[:at], data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :]):
            file(tmp_path, "k").write_bytes(damaged)
            with pytest.raises(DamagedCheckpoint):
                checkpoints.load("k")


@pytest.mark.parametrize(("most", "most_bytes", "kept"), [(2, 1 << 20, "cd"), (9, 1000, "d"), (9, 1, "d")])
def test_the_oldest_go_where_there_are_too_many_or_too_large_and_the_newest_stays(
    tmp_path: Path, most: int, most_bytes: int, kept: str
) -> None:
    checkpoints = Checkpoints(BlobStore(tmp_path), most, most_bytes)
    for age, key in enumerate("abcd"):
        checkpoints.save(key, {"x": torch.zeros(100)}, {})
        os.utime(file(tmp_path, key), (age, age))
    assert "".join(checkpoints.keys()) == kept

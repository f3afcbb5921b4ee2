"""What uploads leave in the temporary directory: nothing, also without room, or when their server was killed."""

import errno
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from live import LiveServer
from seed_requests import artifacts
from statuses import failure

from patchclamp.v1.artifact_pb2_grpc import ArtifactServiceStub

HOUR_SECONDS = 3600.0


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


@pytest.fixture
def stub(live_server: LiveServer) -> Iterator[ArtifactServiceStub]:
    with grpc.insecure_channel(live_server.address) as channel:
        yield ArtifactServiceStub(channel)


@pytest.mark.parametrize("call", ["os.mkdir", "pathlib.Path.open"], ids=["of the directory", "of the file"])
def test_no_room_for_an_upload_is_resource_exhausted_and_leaves_nothing(
    stub: ArtifactServiceStub, temporary: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    upload = artifacts()[0]
    with monkeypatch.context() as patch:
        # A real call of the system, made to raise.
        patch.setattr(call, fail)
        with pytest.raises(grpc.RpcError) as caught:
            stub.Upload(iter(upload))
    assert failure(caught.value).code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "RetryInfo" in failure(caught.value).details
    assert list(temporary.iterdir()) == []
    assert stub.Upload(iter(upload)).artifact.id
    assert list(temporary.iterdir()) == []


def test_a_new_server_removes_what_a_killed_one_left_an_hour_ago(live_server: LiveServer, temporary: Path) -> None:
    old = [temporary / f"patchclamp-{kind}-old" for kind in ("upload", "activations", "gguf")]
    young, others = temporary / "patchclamp-upload-young", temporary / "others"
    for directory in (*old, young, others):
        directory.mkdir()
        (directory / "file").write_bytes(b"half")
    written = young.stat().st_mtime - 1.1 * HOUR_SECONDS
    for path in (*(each / "file" for each in old), *old, young, others / "file", others):
        os.utime(path, (written, written))
    with LiveServer(live_server.model, temporary / "artifacts"):
        assert not any(directory.exists() for directory in old)
        # Its file is still written to.
        assert young.exists()
        assert others.exists()

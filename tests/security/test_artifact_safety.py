"""What clients send as references and files reads no path of the server, opens no URL and runs no code.

Python's audit events (PEP 578) of the whole process tell: every file that is opened, every pickle that is read, every
process that is started and every connection that is made.
"""

import encodings
import io
import os
import pickle
import re
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from live import LiveServer
from safetensors.torch import save

from patchclamp import Client, PatchclampError
from patchclamp.v1 import generation_pb2 as pb
from patchclamp.v1 import program_pb2 as program
from patchclamp.v1 import sparse_policy_pb2 as sparse
from patchclamp.v1.generation_pb2_grpc import GenerationServiceStub
from patchclamp_server.artifacts.store import ArtifactStore
from patchclamp_server.artifacts.types import ArtifactKind
from patchclamp_server.errors import FailedPrecondition
from patchclamp_server.model.sites import Site

WATCHED = (
    "open",
    "os.listdir",
    "os.mkdir",
    "os.scandir",
    "os.system",
    "pickle.find_class",
    "socket.connect",
    "subprocess.Popen",
)
# Every server of this process looks by itself for watches that were started on another.
OF_STARTED_WATCHES = re.compile(r"/watches(/[0-9a-f]{32}(/.*)?)?$")
CODECS = os.path.dirname(encodings.__file__)
EVENTS: list[tuple[str, str]] | None = None
SECRET = Path(__file__)

REFS = [
    "/etc/passwd",
    str(SECRET),
    f"../../../../../..{SECRET}",
    f"file://{SECRET}",
    f"local://{SECRET}",
    f"simplecache::file://{SECRET}",
    f"zip://tag::file://{SECRET}",
    "reference::{}",
    "memory://tags/joy",
    "s3://bucket/key",
    "http://127.0.0.1:9/artifact",
    "github://org:repo@main/key",
    "tags/joy",
    "../tags/joy",
    "..",
    ".",
    "joy/../joy",
    "~root",
    "$HOME",
    "%2e%2e%2fjoy",
    "joy\x00",
    "joy\n",
    "\\\\host\\share",
    "sha256:../../../etc/passwd",
    "sha256:" + "a" * 63 + "/",
    "SHA256:" + "a" * 64,
]


def record(event: str, arguments: tuple[Any, ...]) -> None:
    # A number is a file that is open already; compiled modules are Python's own, and so is the folder of its codecs, in
    # which it looks for the one that JSON of other bytes is read with for the first time.
    if EVENTS is not None and event in WATCHED and not isinstance(arguments[0], int):
        path = str(arguments[0])
        if path.endswith(".pyc") or path == CODECS or OF_STARTED_WATCHES.search(path):
            return
        EVENTS.append((event, path))


sys.addaudithook(record)


@contextmanager
def events() -> Iterator[list[tuple[str, str]]]:
    """What happens in the block, in any thread."""
    global EVENTS
    EVENTS = found = []
    try:
        yield found
    finally:
        EVENTS = None


@pytest.fixture(scope="module")
def server(live_server: LiveServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    with LiveServer(live_server.model, tmp_path_factory.mktemp("safe")) as server:
        with Client(server.address) as client:
            client.put_artifact(save({"layer.1": torch.ones(32)}), tags=["joy"])
        yield server


@pytest.fixture
def client(server: LiveServer) -> Iterator[Client]:
    with Client(server.address) as client:
        yield client


def using(ref: str) -> list[pb.GenerateRequest]:
    """Requests that name an artifact, in every place where one can."""
    vector = program.Vector(artifact=ref)
    place = {"site": program.SITE_RESID_POST, "layers": [1]}
    condition = program.Condition(site=program.SITE_RESID_PRE, layer=0, vector=vector, comparison=1)
    neurons = program.Edit(
        site=program.SITE_MLP_POST, neurons=program.NeuronEdit(neuron_set=ref, scale=program.NeuronValues(values=[0]))
    )
    programs = [
        program.Program(edits=[program.Edit(**place, add=program.AddVector(vector=vector))]),
        program.Program(edits=[neurons]),
        program.Program(readouts=[program.Readout(**place, projection=program.ProjectionReadout(vectors=[vector]))]),
        program.Program(abort_when=[program.AbortCondition(condition=condition)]),
    ]
    prompt = pb.Prompt(text="hello")
    return [
        *(pb.GenerateRequest(prompt=prompt, program=each) for each in programs),
        pb.GenerateRequest(prompt=prompt, sparsity=sparse.Sparsity(profile=ref)),
        pb.GenerateRequest(prompt=prompt, grounding=pb.Grounding(head_set=ref)),
    ]


def test_the_recorder_sees_what_a_good_reference_opens(server: LiveServer, client: Client):
    with events() as found:
        client.get_artifact("joy")
    assert any(event == "open" and path.endswith("tags/joy") for event, path in found)


@pytest.mark.parametrize("ref", REFS, ids=ascii)
def test_a_reference_in_a_program_that_is_no_id_and_no_tag_opens_nothing(server: LiveServer, ref: str):
    with grpc.insecure_channel(server.address) as channel:
        stub = GenerationServiceStub(channel)
        for request in using(ref):
            with events() as found, pytest.raises(grpc.RpcError) as caught:
                list(stub.Generate(request))
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert found == []


@pytest.mark.parametrize("ref", REFS, ids=ascii)
def test_a_reference_to_the_store_that_is_no_id_and_no_tag_opens_nothing(client: Client, ref: str):
    calls = [
        lambda: client.get_artifact(ref),
        lambda: client.download_artifact(ref),
        lambda: client.delete_artifact(ref),
        lambda: client.tag_artifact("joy-2", ref),
        lambda: client.tag_artifact(ref, "joy"),
        lambda: client.compare_head_sets([ref, "joy"]),
    ]
    for call in calls:
        with events() as found, pytest.raises(PatchclampError) as caught:
            call()
        assert caught.value.code == "INVALID_ARGUMENT"
        assert found == []


class Payload:
    """A pickle that makes a directory when it is loaded."""

    def __init__(self, made: Path) -> None:
        self._made = made

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self._made),)


def hostile_files(made: Path) -> dict[str, bytes]:
    pickled = pickle.dumps(Payload(made))
    checkpoint = io.BytesIO()
    torch.save({"layer.1": Payload(made)}, checkpoint)
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("../../data.pkl", pickled)
    header = b'{"layer.1":{"dtype":"F32","shape":[32],"data_offsets":[0,128]}}'
    return {
        "a pickle": pickled,
        "a checkpoint of torch": checkpoint.getvalue(),
        "a zip with a path": archive.getvalue(),
        "safetensors with a pickle behind": len(header).to_bytes(8, "little") + header + bytes(128) + pickled,
        "safetensors with a pickle inside": save({"layer.1": torch.frombuffer(bytearray(pickled), dtype=torch.uint8)}),
        "GGUF with a pickle behind": b"GGUF" + (3).to_bytes(4, "little") + bytes(16) + pickled,
        "YAML that calls": b"!!python/object/apply:os.mkdir ['" + str(made).encode() + b"']",
    }


@pytest.mark.parametrize("format", ["safetensors", "gguf", "head_score_json"])
@pytest.mark.parametrize("name", list(hostile_files(Path("made"))))
def test_a_file_that_would_run_code_is_refused_and_does_not(client: Client, tmp_path: Path, name: str, format: Any):
    made = tmp_path / "made"
    kind: Any = "head_set" if format == "head_score_json" else "vector"
    with events() as found, pytest.raises(PatchclampError) as caught:
        client.put_artifact(hostile_files(made)[name], kind=kind, format=format)
    assert caught.value.code == "INVALID_ARGUMENT"
    assert not made.exists()
    # Nothing but the file's own place for the time of the upload.
    own = f"{tempfile.gettempdir()}/patchclamp-upload-"
    assert [event for event in found if not event[1].startswith(own)] == []


def test_names_in_a_file_are_no_paths(client: Client):
    for name in ("../../layer.1", "/etc/layer.1", "layer.1/../layer.2"):
        with pytest.raises(PatchclampError) as caught:
            client.put_artifact(save({name: torch.ones(32)}))
        assert caught.value.code == "INVALID_ARGUMENT"


def test_a_symbolic_link_among_the_objects_is_not_followed_to_anything_else(tmp_path: Path):
    """Whoever can write into the store's directory cannot make the server show another file."""
    store = ArtifactStore(tmp_path / "store")
    stored = store.put(ArtifactKind.VECTOR, {"layer.0": torch.ones(4)}, model_fingerprint="m", site=Site.RESID_POST)
    [path] = (tmp_path / "store" / "objects").rglob("*.safetensors")
    path.unlink()
    path.symlink_to(SECRET)
    fresh = ArtifactStore(tmp_path / "store")
    for read in (fresh.get, fresh.info):
        with pytest.raises(FailedPrecondition, match="is damaged in the store") as caught:
            read(stored.id)
        assert "PEP 578" not in str(caught.value)


def test_a_symbolic_link_among_the_tags_shows_nothing(tmp_path: Path):
    store = ArtifactStore(tmp_path / "store")
    store.put(
        ArtifactKind.VECTOR, {"layer.0": torch.ones(4)}, model_fingerprint="m", site=Site.RESID_POST, tags=["joy"]
    )
    (tmp_path / "store" / "tags" / "joy").unlink()
    (tmp_path / "store" / "tags" / "joy").symlink_to(SECRET)
    with pytest.raises(FailedPrecondition, match="the stored tag 'joy' is damaged; set it again"):
        store.get("joy")

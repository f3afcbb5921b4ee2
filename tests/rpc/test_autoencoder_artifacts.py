"""Autoencoders over a real channel: uploads of each layout, labels, downloads, refusals, and the memory it takes."""

import json
import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import grpc
import numpy as np
import pytest
import torch
from google.protobuf.struct_pb2 import Struct
from safetensors.torch import load, save
from tests.rpc.statuses import failure

from patchclamp.v1 import artifact_pb2 as pb
from patchclamp.v1 import artifact_pb2_grpc, program_pb2
from patchclamp_server.artifacts.formats.safetensors import layout
from patchclamp_server.artifacts.store import ArtifactStore
from patchclamp_server.model.info import ModelInfo
from patchclamp_server.model.sites import PUBLIC_SITES, Site
from patchclamp_server.rpc.call.interceptors import CallInterceptor, InFlight
from patchclamp_server.rpc.call.upload_space import UploadLimits
from patchclamp_server.rpc.metrics.server import Metrics
from patchclamp_server.rpc.services.artifact import ArtifactService

KIND = pb.ARTIFACT_KIND_AUTOENCODER
SAELENS, GEMMA = pb.ARTIFACT_FORMAT_SAELENS, pb.ARTIFACT_FORMAT_GEMMA_SCOPE_NPZ
F, W = 50, 8
MODEL = ModelInfo(
    name="tiny",
    fingerprint="served-model",
    architecture="llama",
    n_layers=4,
    d_model=W,
    d_ff=24,
    n_heads=2,
    n_kv_heads=2,
    head_dim=4,
    vocab_size=100,
    context_length=64,
    dtype="float32",
    device="cpu",
    sites={site: 24 if site is Site.MLP_POST else W for site in PUBLIC_SITES if site is not Site.RESID_MID},
)
# What the process may grow by while an autoencoder of any size arrives, see docs/user/features.md; the client of the
# test is in it too.
MEMORY_BOUND = 64 << 20
Stub: TypeAlias = "artifact_pb2_grpc.ArtifactServiceAsyncStub"


@pytest.fixture
async def stub(tmp_path: Path) -> AsyncIterator[Stub]:
    server = grpc.aio.server(interceptors=[CallInterceptor(Metrics(), InFlight(), frozenset())])
    # An artifact that is held in memory may be so large; an autoencoder is not held in memory.
    service = ArtifactService(ArtifactStore(tmp_path / "store"), MODEL, UploadLimits(max_bytes=4000))
    artifact_pb2_grpc.add_ArtifactServiceServicer_to_server(service, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield artifact_pb2_grpc.ArtifactServiceStub(channel)
    await server.stop(None)


def requests(data: bytes, **header: object) -> Iterator[pb.UploadRequest]:
    fields = {"kind": KIND, "format": pb.ARTIFACT_FORMAT_SAFETENSORS, "size_bytes": len(data)} | header
    yield pb.UploadRequest(header=pb.UploadHeader(**fields))  # type: ignore[arg-type]
    for start in range(0, len(data), 1000):
        yield pb.UploadRequest(chunk=data[start : start + 1000])


async def upload(stub: Stub, data: bytes, **header: object) -> pb.Artifact:
    return (await stub.Upload(requests(data, **header))).artifact


async def download(stub: Stub, ref: str, format: "pb.ArtifactFormat.ValueType") -> tuple[bytes, str]:
    parts = [part async for part in stub.Download(pb.DownloadRequest(ref=ref, format=format))]
    return b"".join(part.chunk for part in parts), parts[0].config


def weights(width: int = W) -> dict[str, torch.Tensor]:
    torch.manual_seed(2)
    found = {"W_enc": torch.randn(width, F), "W_dec": torch.randn(F, width)}
    return found | {"b_enc": torch.randn(F), "b_dec": torch.randn(width)}


def config(hook: str = "blocks.3.hook_resid_post") -> str:
    return json.dumps({"architecture": "standard", "d_in": W, "d_sae": F, "metadata": {"hook_name": hook}})


def struct(**fields: Any) -> Struct:
    made = Struct()
    made.update(fields)
    return made


async def test_an_autoencoder_of_saelens_says_where_it_reads_and_comes_back(stub: Stub) -> None:
    data = save(weights())
    artifact = await upload(stub, data, format=SAELENS, config=config(), tags=["sae"])
    assert (artifact.site, list(artifact.layers), artifact.width) == (program_pb2.SITE_RESID_POST, [3], W)
    assert dict(artifact.provenance)["function"] == "relu"
    back, second = await download(stub, "sae", SAELENS)
    assert all(torch.equal(tensor, load(data)[name]) for name, tensor in load(back).items())
    assert json.loads(second)["metadata"]["hook_name"] == "blocks.3.hook_resid_post"


async def test_the_stored_file_is_downloaded_and_gets_the_same_id_again(stub: Stub) -> None:
    artifact = await upload(stub, save(weights()), format=SAELENS, config=config(), description="mine")
    stored, second = await download(stub, artifact.id, pb.ARTIFACT_FORMAT_SAFETENSORS)
    assert (len(stored), second) == (artifact.size_bytes, "")
    again = await upload(stub, stored)
    assert (again.id, again.description) == (artifact.id, "mine")


async def test_a_file_made_by_hand_says_in_provenance_what_it_is(stub: Stub) -> None:
    w = weights()
    by_hand = {"encoder": w["W_enc"].T.contiguous(), "encoder_bias": w["b_enc"]}
    by_hand |= {"decoder": w["W_dec"], "decoder_bias": w["b_dec"]}
    artifact = await upload(
        stub,
        save(by_hand),
        site=program_pb2.SITE_MLP_OUT,
        layer=2,
        provenance=struct(function="topk", k=4, subtracted="decoder_bias"),
    )
    assert (artifact.site, list(artifact.layers)) == (program_pb2.SITE_MLP_OUT, [2])


async def test_gemma_scope_has_its_place_in_the_header(stub: Stub, tmp_path: Path) -> None:
    arrays: dict[str, Any] = {name: tensor.numpy() for name, tensor in weights().items()}
    np.savez(tmp_path / "params.npz", **arrays, threshold=np.ones(F, dtype=np.float32))
    data = (tmp_path / "params.npz").read_bytes()
    artifact = await upload(stub, data, format=GEMMA, site=program_pb2.SITE_RESID_POST, layer=1)
    assert (list(artifact.layers), dict(artifact.provenance)["function"]) == ([1], "jumprelu")
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await download(stub, artifact.id, GEMMA)
    assert refused.value.code() is grpc.StatusCode.FAILED_PRECONDITION


@pytest.mark.parametrize(
    ("data", "header", "field"),
    [
        (save(weights()), {"format": SAELENS}, "header.config"),
        (save(weights()), {"format": SAELENS, "config": config("blocks.3.ln2.hook_normalized")}, "header.config"),
        (save(weights()), {"format": SAELENS, "config": config("blocks.3.hook_resid_mid")}, "header.config"),
        (save(weights()), {"format": SAELENS, "config": config("blocks.4.hook_mlp_out")}, "header.provenance.layer"),
        (save(weights(9)), {"format": SAELENS, "config": config()}, "chunk"),
        (b"no file", {"format": SAELENS, "config": config()}, "chunk"),
        (b"no file", {"format": GEMMA, "layer": 1}, "header.site"),
        (b"no file", {"format": pb.ARTIFACT_FORMAT_GGUF_CONTROL_VECTOR}, "header.format"),
        (b"no file", {"config": "{}"}, "header.config"),
        (b"no file", {"kind": pb.ARTIFACT_KIND_VECTOR, "format": SAELENS, "config": config()}, "header.format"),
        (b"no file", {"kind": pb.ARTIFACT_KIND_VECTOR, "layer": 1}, "header.layer"),
        (save(weights()), {}, "chunk"),
    ],
)
async def test_what_is_no_autoencoder_of_the_model_is_refused_with_its_field(
    stub: Stub, data: bytes, header: dict[str, object], field: str
) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await upload(stub, data, **header)
    told = failure(refused.value)
    assert (told.code, told.fields) == (grpc.StatusCode.INVALID_ARGUMENT, [field]), told.message


LABELS_KIND, LABELS = pb.ARTIFACT_KIND_FEATURE_LABELS, pb.ARTIFACT_FORMAT_FEATURE_LABEL_JSON


async def test_labels_are_about_an_autoencoder_and_come_back(stub: Stub) -> None:
    autoencoder = await upload(stub, save(weights()), format=SAELENS, config=config(), tags=["sae"])
    data = json.dumps({"49": "dogs", "3": "Gärten", "5": ""}, ensure_ascii=False).encode()
    artifact = await upload(stub, data, kind=LABELS_KIND, format=LABELS, of="sae")
    assert dict(artifact.provenance)["autoencoder"] == autoencoder.id
    assert artifact.model_fingerprint == "served-model"
    assert json.loads((await download(stub, artifact.id, LABELS))[0]) == {"3": "Gärten", "49": "dogs"}
    stored, _ = await download(stub, artifact.id, pb.ARTIFACT_FORMAT_SAFETENSORS)
    assert (await upload(stub, stored, kind=LABELS_KIND)).id == artifact.id


@pytest.mark.parametrize(
    ("data", "header", "field"),
    [
        (b'{"1": "a"}', {}, "header.of"),
        (b'{"1": "a"}', {"of": "vector"}, "header.of"),
        (b'{"50": "a"}', {"of": "sae"}, "chunk"),
        (b'{"01": "a"}', {"of": "sae"}, "chunk"),
        (b'{"1": 2}', {"of": "sae"}, "chunk"),
        (b'{"1": ""}', {"of": "sae"}, "chunk"),
        (b'{"1": "a", "1": "b"}', {"of": "sae"}, "chunk"),
    ],
)
async def test_labels_of_no_feature_are_refused(stub: Stub, data: bytes, header: dict[str, object], field: str) -> None:
    await upload(stub, save(weights()), format=SAELENS, config=config(), tags=["sae"])
    vector = save({"layer.1": torch.ones(W)})
    await upload(stub, vector, kind=pb.ARTIFACT_KIND_VECTOR, tags=["vector"])
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await upload(stub, data, kind=LABELS_KIND, format=LABELS, **header)
    told = failure(refused.value)
    assert told.fields == [field], told.message


async def test_65536_features_arrive_in_chunks_and_are_sent_within_a_bound_of_memory(stub: Stub) -> None:
    n, width = 65_536, 576
    types: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
        "encoder": (torch.float32, (n, width)),
        "encoder_bias": (torch.float32, (n,)),
        "decoder": (torch.float32, (n, width)),
        "decoder_bias": (torch.float32, (width,)),
    }
    start, _ = layout({}, types)
    size = 4 * (2 * n * width + n + width)
    piece = np.random.default_rng(0).normal(size=1 << 18).astype(np.float32).tobytes()
    said = struct(function="relu", subtracted="decoder_bias", layer=1)
    header = pb.UploadHeader(
        kind=KIND,
        format=pb.ARTIFACT_FORMAT_SAFETENSORS,
        size_bytes=len(start) + size,
        site=program_pb2.SITE_RESID_POST,
        model_fingerprint="a-wider-model",
        provenance=said,
    )

    def chunks() -> Iterator[pb.UploadRequest]:
        yield pb.UploadRequest(header=header)
        yield pb.UploadRequest(chunk=start)
        for sent in range(0, size, len(piece)):
            yield pb.UploadRequest(chunk=piece[: size - sent])

    # What is used once in a process is used before.
    await upload(stub, save(weights()), format=SAELENS, config=config())
    before = start_of_peak()
    artifact = (await stub.Upload(chunks())).artifact
    assert artifact.size_bytes > size > 300_000_000
    assert peak() - before < MEMORY_BOUND
    received = 0
    async for part in stub.Download(pb.DownloadRequest(ref=artifact.id, format=SAELENS)):
        received += len(part.chunk)
    assert received > size
    assert peak() - before < MEMORY_BOUND


def start_of_peak() -> int:
    """Resets the peak of the resident memory of this process, and returns what is resident, in bytes."""
    Path(f"/proc/{os.getpid()}/clear_refs").write_text("5")
    return _status("VmRSS")


def peak() -> int:
    return _status("VmHWM")


def _status(name: str) -> int:
    lines = Path(f"/proc/{os.getpid()}/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))

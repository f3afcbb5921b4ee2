"""ArtifactService over a real channel: uploads, downloads, tags, pages, and what is refused with which field."""

import hashlib
import json
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from typing import TypeAlias

import gguf
import grpc
import numpy as np
import pytest
import torch
from google.protobuf.struct_pb2 import Struct
from safetensors.torch import load, save
from statuses import failure

from patchclamp.v1 import artifact_pb2 as pb
from patchclamp.v1 import artifact_pb2_grpc, program_pb2
from patchclamp_server.artifacts.store import ArtifactStore
from patchclamp_server.artifacts.types import ArtifactKind
from patchclamp_server.model.info import ModelInfo
from patchclamp_server.model.sites import PUBLIC_SITES, Site
from patchclamp_server.rpc.call.interceptors import CallInterceptor, InFlight
from patchclamp_server.rpc.call.upload_space import UploadLimits
from patchclamp_server.rpc.metrics.server import Metrics
from patchclamp_server.rpc.services.artifact import ArtifactService

SAFETENSORS, GGUF = pb.ARTIFACT_FORMAT_SAFETENSORS, pb.ARTIFACT_FORMAT_GGUF_CONTROL_VECTOR
HEAD_SCORES = pb.ARTIFACT_FORMAT_HEAD_SCORE_JSON
CORPUS, JSON_LINES = pb.ARTIFACT_KIND_CORPUS, pb.ARTIFACT_FORMAT_TEXT_JSON_LINES
VECTOR, NEURON_SET = pb.ARTIFACT_KIND_VECTOR, pb.ARTIFACT_KIND_NEURON_SET
SUBSPACE, AFFINE_MAP = pb.ARTIFACT_KIND_SUBSPACE, pb.ARTIFACT_KIND_AFFINE_MAP
PROFILE, HEAD_SET = pb.ARTIFACT_KIND_SPARSITY_PROFILE, pb.ARTIFACT_KIND_HEAD_SET
MODEL = ModelInfo(
    name="tiny",
    fingerprint="served-model",
    architecture="llama",
    n_layers=4,
    d_model=8,
    d_ff=24,
    n_heads=2,
    n_kv_heads=2,
    head_dim=4,
    vocab_size=100,
    context_length=64,
    dtype="float32",
    device="cpu",
    sites={site: 24 if site is Site.MLP_POST else 8 for site in PUBLIC_SITES if site is not Site.RESID_MID},
)
# Large enough for a download of several chunks by a model the server does not know.
MAX_UPLOAD_BYTES = 8 * 1024 * 1024
# The generated module has this class for type checkers only.
Stub: TypeAlias = "artifact_pb2_grpc.ArtifactServiceAsyncStub"


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(tmp_path / "store")


@pytest.fixture
async def stub(store: ArtifactStore) -> AsyncIterator[Stub]:
    server = grpc.aio.server(interceptors=[CallInterceptor(Metrics(), InFlight(), frozenset())])
    artifact_pb2_grpc.add_ArtifactServiceServicer_to_server(
        ArtifactService(store, MODEL, UploadLimits(MAX_UPLOAD_BYTES)), server
    )
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield artifact_pb2_grpc.ArtifactServiceStub(channel)
    await server.stop(None)


def vector_file(layers: Iterable[int] = (1, 2), width: int = 8) -> bytes:
    return save({f"layer.{layer}": torch.arange(width, dtype=torch.float32) + layer for layer in layers})


def requests(data: bytes, chunk_bytes: int = 1024 * 1024, **header: object) -> list[pb.UploadRequest]:
    fields = {"kind": VECTOR, "format": SAFETENSORS, "size_bytes": len(data)} | header
    chunks = [data[i : i + chunk_bytes] for i in range(0, len(data), chunk_bytes)]
    return [
        pb.UploadRequest(header=pb.UploadHeader(**fields)),  # type: ignore[arg-type]
        *(pb.UploadRequest(chunk=chunk) for chunk in chunks),
    ]


def struct(**fields: object) -> Struct:
    made = Struct()
    made.update(fields)
    return made


async def upload(stub: Stub, data: bytes, chunk_bytes: int = 1024 * 1024, **header: object) -> pb.Artifact:
    return (await stub.Upload(iter(requests(data, chunk_bytes, **header)))).artifact


async def download(
    stub: Stub, ref: str, file_format: "pb.ArtifactFormat.ValueType" = SAFETENSORS, layers: Iterable[int] = ()
) -> bytes:
    responses = [r async for r in stub.Download(pb.DownloadRequest(ref=ref, format=file_format, layers=layers))]
    assert [r.HasField("artifact") for r in responses] == [True] + [False] * (len(responses) - 1)
    assert all(len(r.chunk) <= 1024 * 1024 for r in responses)
    return b"".join(r.chunk for r in responses)


def field_of(error: grpc.aio.AioRpcError) -> str:
    """The field path in the google.rpc details of a status."""
    return str(failure(error).details["ErrorInfo"].metadata["field"])


async def test_a_vector_that_was_uploaded_in_many_chunks_can_be_found_and_downloaded(stub: Stub) -> None:
    provenance = Struct()
    provenance.update({"method": "by hand", "seeds": [1, 2]})
    artifact = await upload(stub, vector_file(), 7, description="joy", tags=["joy"], provenance=provenance)
    assert (artifact.kind, artifact.site, artifact.layers, artifact.width) == (
        VECTOR,
        program_pb2.SITE_RESID_POST,
        [1, 2],
        8,
    )
    assert (artifact.model_fingerprint, artifact.description, artifact.tags) == ("served-model", "joy", ["joy"])
    assert artifact.provenance == provenance
    assert artifact.created.seconds > 0
    assert (await stub.GetArtifact(pb.GetArtifactRequest(ref="joy"))).artifact == artifact
    data = await download(stub, "joy")
    assert f"sha256:{hashlib.sha256(data).hexdigest()}" == artifact.id
    assert torch.equal(load(data)["layer.2"], load(vector_file())["layer.2"])


async def test_a_neuron_set_round_trips(stub: Stub) -> None:
    data = save({"layer.3.neurons": torch.tensor([23, 0]), "layer.3.values": torch.tensor([1.0, -2.0])})
    artifact = await upload(stub, data, kind=NEURON_SET)
    assert (artifact.site, artifact.layers, artifact.width) == (program_pb2.SITE_UNSPECIFIED, [3], 0)
    assert load(await download(stub, artifact.id))["layer.3.neurons"].tolist() == [23, 0]


@pytest.mark.parametrize(
    ("kind", "tensors"),
    [(SUBSPACE, {"layer.3.rotation": torch.eye(8)[:2]}), (AFFINE_MAP, {"layer.3.matrix": torch.rand(8, 8)})],
)
async def test_a_linear_map_round_trips_with_its_site(
    stub: Stub, kind: "pb.ArtifactKind.ValueType", tensors: dict[str, torch.Tensor]
) -> None:
    artifact = await upload(stub, save(tensors), kind=kind, site=program_pb2.SITE_RESID_PRE)
    assert (artifact.kind, artifact.site, artifact.layers, artifact.width) == (
        kind,
        program_pb2.SITE_RESID_PRE,
        [3],
        8,
    )
    data = await download(stub, artifact.id)
    ((name, tensor),) = tensors.items()
    assert torch.equal(load(data)[name], tensor)
    assert (await upload(stub, data, kind=kind)).id == artifact.id


async def test_a_sparsity_profile_round_trips(stub: Stub) -> None:
    tensors = {"gate_error.3": torch.rand(4, 24), "up_error.3": torch.rand(4, 24), "damage": torch.rand(4, 21)}
    provenance = struct(policy="fovea", parameters={"bits": 3, "keep_ratio": 1})
    artifact = await upload(stub, save(tensors), kind=PROFILE, provenance=provenance)
    assert (artifact.kind, artifact.site, artifact.layers) == (PROFILE, program_pb2.SITE_UNSPECIFIED, [])
    assert artifact.provenance == provenance
    loaded = load(await download(stub, artifact.id))
    assert loaded.keys() == tensors.keys()
    assert torch.equal(loaded["damage"], tensors["damage"])


async def test_published_head_scores_become_a_head_set_of_all_heads_of_the_model(stub: Stub) -> None:
    runs = {f"{layer}-{head}": [0] for layer in range(4) for head in range(2)}
    published = json.dumps({**runs, "2-1": [0.75, 0.25], "0-0": [0.125]}).encode()
    artifact = await upload(stub, published, kind=HEAD_SET, format=HEAD_SCORES)
    assert (artifact.kind, artifact.layers, artifact.width) == (HEAD_SET, [0, 1, 2, 3], 2)
    assert artifact.provenance["format"] == "head_score_json"
    scores = load(await download(stub, artifact.id))["scores"]
    assert scores.tolist() == [[0.125, 0], [0, 0], [0, 0.5], [0, 0]]
    exported = json.loads(await download(stub, artifact.id, HEAD_SCORES))
    assert len(exported) == 8
    assert (exported["2-1"], exported["1-0"]) == ([0.5], [0.0])


LINES = b'{"text": "one", "label": "a"}\n{"text": "zwei \xc3\xa4", "label": "b"}\n{"text": "three"}\n'


async def test_a_corpus_of_json_lines_is_of_no_model_and_comes_back_as_it_was_sent(stub: Stub) -> None:
    artifact = await upload(stub, LINES, kind=CORPUS, format=JSON_LINES, provenance=struct(source="by hand"))
    assert artifact.model_fingerprint == ""
    assert list(artifact.provenance["labels"]) == ["a", "b"]
    assert artifact.provenance["source"] == "by hand"
    assert await download(stub, artifact.id, JSON_LINES) == LINES
    again = await upload(stub, await download(stub, artifact.id), kind=CORPUS)
    assert again.id == artifact.id


async def test_labels_of_a_corpus_are_named_by_its_file_and_otherwise_by_the_header(stub: Stub) -> None:
    text, ends = torch.tensor([97, 98], dtype=torch.uint8), torch.tensor([1, 2])
    data = save({"text": text, "ends": ends, "labels": torch.tensor([1, -1])})
    artifact = await upload(stub, data, kind=CORPUS, provenance=struct(labels=["x", "y"]))
    lines = b'{"text": "a", "label": "y"}\n{"text": "b"}\n'
    assert await download(stub, artifact.id, JSON_LINES) == lines
    stored = await download(stub, artifact.id)
    renamed = await upload(stub, stored, kind=CORPUS, provenance=struct(labels=["z"], source="elsewhere"))
    assert list(renamed.provenance["labels"]) == ["x", "y"]


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ([(0, 0), (2, 1)], "4 of 6 heads are missing, the first is 0-1"),
        ([(0, 0), (1, 0), (2, 0), (3, 0)], "the first that is missing is 0-1"),
        ([(0, 0), (0, 1), (1, 0), (1, 1)], "the first that is missing is 2-0"),
    ],
)
async def test_head_scores_that_are_not_of_all_heads_are_refused_by_the_first_missing_one(
    stub: Stub, named: list[tuple[int, int]], message: str
) -> None:
    published = json.dumps({f"{layer}-{head}": [1] for layer, head in named}).encode()
    with pytest.raises(grpc.aio.AioRpcError, match=message) as refusal:
        await upload(stub, published, kind=HEAD_SET, format=HEAD_SCORES)
    assert refusal.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert field_of(refusal.value) == "chunk"


async def test_head_scores_of_a_model_that_is_not_served_have_the_heads_that_the_file_names(stub: Stub) -> None:
    published = json.dumps({f"{layer}-{head}": [1] for layer in range(10) for head in range(6)}).encode()
    artifact = await upload(stub, published, kind=HEAD_SET, format=HEAD_SCORES, model_fingerprint="another-model")
    assert (len(artifact.layers), artifact.width) == (10, 6)


async def test_a_repeng_file_goes_in_and_comes_out_with_the_same_directions(stub: Stub, tmp_path: Path) -> None:
    path = tmp_path / "repeng.gguf"
    directions = {layer: np.random.default_rng(layer).normal(size=8).astype(np.float32) for layer in (3, 2, 1)}
    writer = gguf.GGUFWriter(path, "controlvector")
    writer.add_string("controlvector.model_hint", "llama")
    writer.add_uint32("controlvector.layer_count", len(directions))
    for layer, direction in directions.items():
        writer.add_tensor(f"direction.{layer}", direction)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    artifact = await upload(stub, path.read_bytes(), format=GGUF)
    assert artifact.layers == [1, 2, 3]
    assert artifact.provenance["model_hint"] == "llama"
    path.write_bytes(await download(stub, artifact.id, GGUF))
    exported = {tensor.name: tensor.data for tensor in gguf.GGUFReader(path).tensors}
    assert exported.keys() == {"direction.1", "direction.2", "direction.3"}
    assert all(np.array_equal(exported[f"direction.{layer}"], v) for layer, v in directions.items())


async def test_a_download_of_several_chunks_is_whole(stub: Stub) -> None:
    artifact = await upload(stub, vector_file(width=700_000), model_fingerprint="a-wide-model")
    data = await download(stub, artifact.id)
    assert len(data) == artifact.size_bytes > 5 * 1024 * 1024
    assert f"sha256:{hashlib.sha256(data).hexdigest()}" == artifact.id


async def test_a_downloaded_file_uploaded_to_another_store_keeps_its_id_model_and_evidence(
    stub: Stub, tmp_path: Path
) -> None:
    other = ArtifactStore(tmp_path / "other")
    info = other.put(
        ArtifactKind.VECTOR,
        {"layer.90": torch.ones(3)},
        model_fingerprint="another-model",
        site=Site.ATTN_OUT,
        description="from elsewhere",
        provenance={"seed": 3},
        evidence={"heldout_accuracy": [0.5, 1.0]},
    )
    digest = info.id.removeprefix("sha256:")
    data = (tmp_path / "other" / "objects" / digest[:2] / f"{digest[2:]}.safetensors").read_bytes()
    artifact = await upload(stub, data)
    assert artifact.id == info.id
    assert artifact.model_fingerprint == "another-model"
    assert artifact.evidence["heldout_accuracy"][1] == 1.0


async def test_the_header_wins_over_what_the_file_says_of_itself(stub: Stub) -> None:
    first = await upload(stub, vector_file(), description="old")
    second = await upload(stub, await download(stub, first.id), description="new", site=program_pb2.SITE_RESID_PRE)
    assert (second.description, second.site) == ("new", program_pb2.SITE_RESID_PRE)


@pytest.mark.parametrize(
    ("data", "header", "field"),
    [
        (vector_file(), {"kind": pb.ARTIFACT_KIND_UNSPECIFIED}, "header.kind"),
        (vector_file(), {"kind": 77}, "header.kind"),
        (vector_file(), {"format": pb.ARTIFACT_FORMAT_UNSPECIFIED}, "header.format"),
        (vector_file(), {"site": 77}, "header.site"),
        (vector_file(), {"site": program_pb2.SITE_RESID_MID}, "header.site"),
        (vector_file(), {"tags": ["ok", "../up"]}, "header.tags[1]"),
        (vector_file(), {"description": "x" * 300_000}, "header.description"),
        (vector_file(), {"size_bytes": 0}, "header.size_bytes"),
        (vector_file(), {"size_bytes": MAX_UPLOAD_BYTES * 2}, "header.size_bytes"),
        (vector_file(), {"size_bytes": 10}, "chunk"),
        (vector_file(), {"size_bytes": 100_000}, "chunk"),
        (vector_file(), {"kind": NEURON_SET}, "chunk"),
        (vector_file(), {"format": GGUF}, "chunk"),
        (b"\x80\x04\x95 a pickle, perhaps", {}, "chunk"),
        (vector_file(layers=[4]), {}, "chunk"),
        (vector_file(width=9), {}, "chunk"),
        (vector_file(), {"site": program_pb2.SITE_MLP_POST}, "chunk"),
        (save({"layer.1": torch.tensor([float("nan")] * 8)}), {}, "chunk"),
        (save({"layer.1.neurons": torch.tensor([24])}), {"kind": NEURON_SET}, "chunk"),
        (
            save({"layer.1.neurons": torch.tensor([1])}),
            {"kind": NEURON_SET, "site": program_pb2.SITE_RESID_POST},
            "header.site",
        ),
        (save({"damage": torch.rand(4, 21)}), {"kind": PROFILE}, "header.provenance.policy"),
        (save({"damage": torch.rand(4, 20)}), {"kind": PROFILE, "provenance": struct(policy="fovea")}, "chunk"),
        (save({"up_error.3": torch.rand(4, 25)}), {"kind": PROFILE, "provenance": struct(policy="fovea")}, "chunk"),
        (save({"scores": torch.rand(4, 24)}), {"kind": PROFILE, "provenance": struct(policy="cats")}, "chunk"),
        (
            save({"damage": torch.rand(4, 21)}),
            {"kind": PROFILE, "provenance": struct(policy="griffin")},
            "header.provenance.policy",
        ),
        (
            save({"damage": torch.rand(4, 21)}),
            {"kind": PROFILE, "provenance": struct(policy="fovea", parameters={"bits": 5})},
            "header.provenance.parameters.bits",
        ),
        (
            save({"damage": torch.rand(4, 21)}),
            {"kind": PROFILE, "provenance": struct(policy="fovea", parameters=[3])},
            "header.provenance.parameters",
        ),
        (
            save({"bits": torch.ones(1, dtype=torch.int32)}),
            {"kind": PROFILE, "provenance": struct(policy="fovea")},
            "chunk",
        ),
        (save({"a b": torch.ones(1)}), {"kind": PROFILE, "provenance": struct(policy="fovea")}, "chunk"),
        (save({"scores": torch.ones(4, 2)}), {"kind": HEAD_SET, "site": program_pb2.SITE_ATTN_Z}, "header.site"),
        (save({"scores": torch.ones(4, 3)}), {"kind": HEAD_SET}, "chunk"),
        (save({"scores": torch.ones(3, 2)}), {"kind": HEAD_SET}, "chunk"),
        (save({"scores": torch.ones(4, 2)}), {"kind": VECTOR}, "chunk"),
        (save({"layer.1.rotation": torch.eye(7)[:2]}), {"kind": SUBSPACE}, "chunk"),
        (save({"layer.4.matrix": torch.eye(8)}), {"kind": AFFINE_MAP}, "chunk"),
        (save({"layer.1.matrix": torch.eye(8)}), {"kind": AFFINE_MAP, "site": program_pb2.SITE_MLP_POST}, "chunk"),
        (b'{"0-2": [1]}', {"kind": HEAD_SET, "format": HEAD_SCORES}, "chunk"),
        (b'{"4-0": [1]}', {"kind": HEAD_SET, "format": HEAD_SCORES}, "chunk"),
        (b'{"0-0": 1}', {"kind": HEAD_SET, "format": HEAD_SCORES}, "chunk"),
        (b'{"0-0": [1]}', {"kind": NEURON_SET, "format": HEAD_SCORES}, "chunk"),
        (b'{"text": "a"}', {"kind": VECTOR, "format": JSON_LINES}, "chunk"),
        (b'{"text": "a"}\n{}', {"kind": CORPUS, "format": JSON_LINES}, "chunk"),
        (
            b'{"text": "a"}',
            {"kind": CORPUS, "format": JSON_LINES, "model_fingerprint": "m"},
            "header.model_fingerprint",
        ),
        (
            save({"text": torch.ones(1).byte(), "ends": torch.ones(1).long(), "labels": torch.zeros(1).long()}),
            {"kind": CORPUS},
            "header.provenance.labels",
        ),
    ],
)
async def test_a_bad_upload_is_an_invalid_argument_with_its_field_and_stores_nothing(
    stub: Stub, store: ArtifactStore, data: bytes, header: dict[str, object], field: str
) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as refusal:
        await upload(stub, data, **header)
    assert refusal.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert field_of(refusal.value) == field
    assert store.list() == ([], "")


HEADER, *CHUNKS = requests(vector_file())


@pytest.mark.parametrize(
    ("messages", "field"),
    [
        ([], "header"),
        ([pb.UploadRequest()], "header"),
        (CHUNKS, "header"),
        ([HEADER, HEADER, *CHUNKS], "chunk"),
        ([HEADER, pb.UploadRequest(chunk=b""), *CHUNKS], "chunk"),
        (requests(bytes(2 * 1024 * 1024), 1024 * 1024 + 1), "chunk"),
        ([HEADER], "chunk"),
        ([HEADER, *CHUNKS, *CHUNKS], "chunk"),
    ],
)
async def test_messages_out_of_order_or_size_are_refused(
    stub: Stub, messages: list[pb.UploadRequest], field: str
) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as refusal:
        await stub.Upload(iter(messages))
    assert refusal.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert field_of(refusal.value) == field


async def test_provenance_that_is_no_json_is_refused(stub: Stub) -> None:
    provenance = Struct()
    provenance.update({"loss": float("nan")})
    with pytest.raises(grpc.aio.AioRpcError) as refusal:
        await upload(stub, vector_file(), provenance=provenance)
    assert field_of(refusal.value) == "header.provenance"


async def test_a_vector_of_another_model_is_stored_without_the_checks_of_this_one(stub: Stub) -> None:
    artifact = await upload(stub, vector_file(layers=[70], width=5), model_fingerprint="another-model")
    assert (artifact.model_fingerprint, artifact.layers, artifact.width) == ("another-model", [70], 5)


async def test_a_vector_that_gguf_cannot_express_is_a_failed_precondition(stub: Stub) -> None:
    artifact = await upload(stub, vector_file(layers=[0, 1]))
    with pytest.raises(grpc.aio.AioRpcError) as refusal:
        await download(stub, artifact.id, GGUF)
    assert refusal.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert field_of(refusal.value) == "format"


async def test_some_layers_of_it_can_be_exported(stub: Stub) -> None:
    artifact = await upload(stub, vector_file(layers=[0, 1, 3]))
    assert sorted(load(await download(stub, artifact.id, layers=[3, 1]))) == ["layer.1", "layer.3"]
    assert await download(stub, artifact.id, GGUF, layers=[1, 3])
    with pytest.raises(grpc.aio.AioRpcError) as refusal:
        await download(stub, artifact.id, layers=[1, 2])
    assert refusal.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert field_of(refusal.value) == "layers[1]"


@pytest.mark.parametrize("file_format", [SAFETENSORS, GGUF])
async def test_a_layer_is_exported_once(stub: Stub, file_format: "pb.ArtifactFormat.ValueType") -> None:
    artifact = await upload(stub, vector_file(layers=[1, 3]))
    with pytest.raises(grpc.aio.AioRpcError) as refusal:
        await download(stub, artifact.id, file_format, layers=[1, 3, 1])
    assert refusal.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert field_of(refusal.value) == "layers[2]"


async def test_a_head_set_is_exported_whole(stub: Stub) -> None:
    artifact = await upload(stub, save({"scores": torch.ones(4, 2)}), kind=HEAD_SET)
    for layers, file_format in (([1], SAFETENSORS), ([7], HEAD_SCORES)):
        with pytest.raises(grpc.aio.AioRpcError) as refusal:
            await download(stub, artifact.id, file_format, layers)
        assert refusal.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert field_of(refusal.value) == "layers"


async def test_tags_move_and_are_removed_and_delete_takes_them_along(stub: Stub) -> None:
    first, second = await upload(stub, vector_file(), tags=["a"]), await upload(stub, vector_file([3]))
    moved = await stub.TagArtifact(pb.TagArtifactRequest(tag="a", ref=second.id, replace_tag=True))
    assert (moved.artifact.id, moved.artifact.tags) == (second.id, ["a"])
    assert moved.artifact.replaced_tags == {"a": first.id}
    removed = await stub.TagArtifact(pb.TagArtifactRequest(tag="a"))
    assert (removed.artifact.id, removed.artifact.tags) == (second.id, [])
    await stub.TagArtifact(pb.TagArtifactRequest(tag="b", ref=first.id))
    deleted = await stub.DeleteArtifact(pb.DeleteArtifactRequest(ref="b"))
    assert (deleted.id, deleted.tags) == (first.id, ["b"])
    left = await stub.ListArtifacts(pb.ListArtifactsRequest())
    assert [a.id for a in left.artifacts] == [second.id]


async def test_a_taken_tag_is_refused_with_its_path_and_moves_when_asked(stub: Stub) -> None:
    first, second = await upload(stub, vector_file(), tags=["a"]), await upload(stub, vector_file([3]))
    for call, path in (
        (upload(stub, vector_file([2]), tags=["b", "a"]), "header.tags[1]"),
        (stub.TagArtifact(pb.TagArtifactRequest(tag="a", ref=second.id)), "tag"),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call
        assert caught.value.code() is grpc.StatusCode.ALREADY_EXISTS
        assert caught.value.details().startswith(f"{path}: the tag 'a' names {first.id}")
    third = await upload(stub, vector_file([2]), tags=["a"], replace_tags=True)
    assert third.replaced_tags == {"a": first.id}


async def test_an_artifact_of_two_tags_is_deleted_by_its_id(stub: Stub) -> None:
    info = await upload(stub, vector_file(), tags=["a", "b"])
    with pytest.raises(grpc.aio.AioRpcError, match="also tagged 'b'") as caught:
        await stub.DeleteArtifact(pb.DeleteArtifactRequest(ref="a"))
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    deleted = await stub.DeleteArtifact(pb.DeleteArtifactRequest(ref=info.id))
    assert deleted.tags == ["a", "b"]


@pytest.mark.parametrize(
    ("ref", "code"),
    [
        ("", grpc.StatusCode.INVALID_ARGUMENT),
        ("../etc", grpc.StatusCode.INVALID_ARGUMENT),
        ("sha256:12", grpc.StatusCode.INVALID_ARGUMENT),
        ("unknown", grpc.StatusCode.NOT_FOUND),
        ("sha256:" + "0" * 64, grpc.StatusCode.NOT_FOUND),
    ],
)
async def test_a_ref_that_is_bad_or_unknown_is_refused_by_every_method(
    stub: Stub, ref: str, code: grpc.StatusCode
) -> None:
    calls = [
        stub.GetArtifact(pb.GetArtifactRequest(ref=ref)),
        stub.DeleteArtifact(pb.DeleteArtifactRequest(ref=ref)),
        stub.Download(pb.DownloadRequest(ref=ref, format=SAFETENSORS)).read(),
    ]
    if ref:
        calls.append(stub.TagArtifact(pb.TagArtifactRequest(tag="t", ref=ref)))
    for call in calls:
        with pytest.raises(grpc.aio.AioRpcError) as refusal:
            await call
        assert refusal.value.code() is code
        assert field_of(refusal.value) == "ref"


async def test_pages_and_filters_reach_every_artifact(stub: Stub) -> None:
    ids = {(await upload(stub, vector_file([layer]))).id for layer in range(4)}
    await upload(stub, save({"layer.1.neurons": torch.tensor([1])}), kind=NEURON_SET)
    seen, token = [], ""
    while True:
        page = await stub.ListArtifacts(pb.ListArtifactsRequest(kind=VECTOR, page_size=3, page_token=token))
        seen += [artifact.id for artifact in page.artifacts]
        token = page.next_page_token
        if not token:
            break
    assert seen == sorted(ids)
    unknown = await stub.ListArtifacts(pb.ListArtifactsRequest(model_fingerprint="unknown"))
    assert list(unknown.artifacts) == []


@pytest.mark.parametrize(
    ("request_message", "field"),
    [
        (pb.ListArtifactsRequest(page_size=1001), "page_size"),
        (pb.ListArtifactsRequest(page_token="made up"), "page_token"),
        (pb.ListArtifactsRequest(kind=77), "kind"),  # type: ignore[arg-type]
    ],
)
async def test_a_bad_listing_is_refused(stub: Stub, request_message: pb.ListArtifactsRequest, field: str) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as refusal:
        await stub.ListArtifacts(request_message)
    assert refusal.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert field_of(refusal.value) == field


async def test_a_damaged_artifact_is_a_failed_precondition(stub: Stub, tmp_path: Path) -> None:
    artifact = await upload(stub, vector_file())
    (path,) = (tmp_path / "store" / "objects").rglob("*.safetensors")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(grpc.aio.AioRpcError) as refusal:
        await download(stub, artifact.id)
    assert refusal.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert "damaged" in (refusal.value.details() or "")


async def test_the_largest_listing_page_fits_into_a_message(stub: Stub, store: ArtifactStore) -> None:
    # Numbers of one digit grow most on their way from JSON (2 bytes each) to protobuf (11 bytes each).
    for i in range(4):
        evidence = {"scores": [1] * 120_000}
        store.put(
            ArtifactKind.VECTOR,
            {"layer.1": torch.full((8,), float(i))},
            model_fingerprint="m",
            site=Site.RESID_POST,
            evidence=evidence,
        )
    seen, token = 0, ""
    while True:
        page = await stub.ListArtifacts(pb.ListArtifactsRequest(page_token=token))
        seen += len(page.artifacts)
        token = page.next_page_token
        if not token:
            break
    assert seen == 4

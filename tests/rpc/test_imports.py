"""Files of others over a real channel: what each tensor becomes, what the answer says of it, and what is refused."""

import io
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, TypeAlias

import gguf
import grpc
import numpy as np
import pytest
import torch
from google.protobuf import json_format
from google.protobuf.struct_pb2 import Struct
from safetensors.torch import load, save
from statuses import failure

from patchclamp.v1 import artifact_pb2 as pb
from patchclamp.v1 import artifact_pb2_grpc, program_pb2
from patchclamp_server.artifacts.store import ArtifactStore
from patchclamp_server.model.info import ModelInfo
from patchclamp_server.model.sites import PUBLIC_SITES, Site
from patchclamp_server.rpc.call.interceptors import CallInterceptor, InFlight
from patchclamp_server.rpc.metrics.server import Metrics
from patchclamp_server.rpc.services.artifact import ArtifactService

GGUF, SAFETENSORS = pb.ARTIFACT_FORMAT_GGUF_CONTROL_VECTOR, pb.ARTIFACT_FORMAT_SAFETENSORS
DUO, QR = pb.ARTIFACT_FORMAT_DUO_ATTENTION_TSV, pb.ARTIFACT_FORMAT_QR_HEAD_YAML
HEAD_SET, SUBSPACE, AUTOENCODER = pb.ARTIFACT_KIND_HEAD_SET, pb.ARTIFACT_KIND_SUBSPACE, pb.ARTIFACT_KIND_AUTOENCODER
W = 8
MODEL = ModelInfo(
    name="tiny",
    fingerprint="served-model",
    architecture="llama",
    n_layers=4,
    d_model=W,
    d_ff=24,
    n_heads=4,
    n_kv_heads=2,
    head_dim=2,
    vocab_size=100,
    context_length=64,
    dtype="float32",
    device="cpu",
    sites={site: 24 if site is Site.MLP_POST else W for site in PUBLIC_SITES if site is not Site.RESID_MID},
)
FROM_THE_EMBEDDING = (
    "direction.0 is layer 0: this file counts blocks from 0, and llama.cpp would refuse it; if its 0 is the embedding, "
    "give layer_offset -1"
)
# The generated module has this class for type checkers only.
Stub: TypeAlias = "artifact_pb2_grpc.ArtifactServiceAsyncStub"


@pytest.fixture
async def stub(tmp_path: Path) -> AsyncIterator[Stub]:
    server = grpc.aio.server(interceptors=[CallInterceptor(Metrics(), InFlight(), frozenset())])
    service = ArtifactService(ArtifactStore(tmp_path / "store"), MODEL)
    artifact_pb2_grpc.add_ArtifactServiceServicer_to_server(service, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield artifact_pb2_grpc.ArtifactServiceStub(channel)
    await server.stop(None)


async def upload(stub: Stub, data: bytes, **header: Any) -> pb.Artifact:
    fields = {"kind": pb.ARTIFACT_KIND_VECTOR, "format": SAFETENSORS, "size_bytes": len(data)} | header
    messages = [pb.UploadRequest(header=pb.UploadHeader(**fields)), pb.UploadRequest(chunk=data)]
    return (await stub.Upload(iter(messages))).artifact


async def download(stub: Stub, ref: str, format: "pb.ArtifactFormat.ValueType" = SAFETENSORS) -> bytes:
    return b"".join([r.chunk async for r in stub.Download(pb.DownloadRequest(ref=ref, format=format))])


async def refused(stub: Stub, data: bytes, **header: Any) -> tuple[str, str]:
    """Returns the field and the message of a refusal."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await upload(stub, data, **header)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    found = failure(caught.value)
    return found.details["ErrorInfo"].metadata["field"], found.message or ""


def control_vector(path: Path, numbers: range) -> tuple[bytes, dict[int, np.ndarray]]:
    """As EasySteer and repeng write one."""
    directions = {n: np.random.default_rng(n).normal(size=W).astype(np.float32) for n in numbers}
    writer = gguf.GGUFWriter(path / "vector.gguf", "controlvector")
    writer.add_string("controlvector.model_hint", "qwen2")
    writer.add_string("controlvector.method", "diffmean")
    writer.add_uint32("controlvector.layer_count", len(directions))
    for number, direction in directions.items():
        writer.add_tensor(f"direction.{number}", direction)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return (path / "vector.gguf").read_bytes(), directions


def struct(**fields: Any) -> Struct:
    return json_format.ParseDict(fields, Struct())


async def test_a_control_vector_with_direction_0_is_read_whole_and_says_where_each_row_landed(
    stub: Stub, tmp_path: Path
) -> None:
    data, directions = control_vector(tmp_path, range(4))
    artifact = await upload(stub, data, format=GGUF)
    assert (artifact.layers, artifact.site) == ([0, 1, 2, 3], program_pb2.SITE_RESID_POST)
    assert artifact.imported_from == {f"layer.{n}": f"direction.{n}" for n in range(4)}
    assert artifact.import_warnings == [FROM_THE_EMBEDDING]
    tensors = load(await download(stub, artifact.id))
    assert all(np.array_equal(tensors[f"layer.{n}"].numpy(), directions[n]) for n in range(4))


async def test_a_control_vector_of_llama_cpp_lands_where_llama_cpp_adds_it_without_a_warning(
    stub: Stub, tmp_path: Path
) -> None:
    data, directions = control_vector(tmp_path, range(1, 4))
    artifact = await upload(stub, data, format=GGUF)
    assert (artifact.layers, artifact.import_warnings) == ([1, 2, 3], [])
    assert "layer_offset" not in artifact.provenance
    tensors = load(await download(stub, artifact.id))
    assert np.array_equal(tensors["layer.1"].numpy(), directions[1])


async def test_a_layer_offset_moves_every_row_and_is_kept_in_the_provenance(stub: Stub, tmp_path: Path) -> None:
    data, directions = control_vector(tmp_path, range(1, 5))
    artifact = await upload(stub, data, format=GGUF, layer_offset=-1)
    assert artifact.imported_from == {f"layer.{n - 1}": f"direction.{n}" for n in range(1, 5)}
    assert artifact.provenance["layer_offset"] == -1
    assert artifact.import_warnings == []
    tensors = load(await download(stub, artifact.id))
    assert all(np.array_equal(tensors[f"layer.{n - 1}"].numpy(), directions[n]) for n in directions)


async def test_a_row_of_the_embedding_has_no_layer_and_is_named(stub: Stub, tmp_path: Path) -> None:
    data, _ = control_vector(tmp_path, range(5))
    artifact = await upload(stub, data, format=GGUF, layer_offset=-1)
    assert artifact.layers == [0, 1, 2, 3]
    assert artifact.import_warnings == ["direction.0 left out: with layer_offset -1 it lies before layer 0"]


async def test_a_file_with_one_row_too_many_is_refused_with_the_offset_that_it_needs(
    stub: Stub, tmp_path: Path
) -> None:
    data, _ = control_vector(tmp_path, range(5))
    field, message = await refused(stub, data, format=GGUF)
    assert field == "chunk"
    assert "direction.4 would be layer 4" in message
    assert "needs layer_offset -1" in message


async def test_an_offset_that_leaves_no_row_a_layer_is_refused(stub: Stub, tmp_path: Path) -> None:
    data, _ = control_vector(tmp_path, range(2))
    field, message = await refused(stub, data, format=GGUF, layer_offset=-2)
    assert field == "header.layer_offset"
    assert "direction.0, direction.1 would lie before layer 0" in message


async def test_tensors_of_other_names_become_a_vector_and_what_was_left_out_is_named(stub: Stub) -> None:
    rows = torch.randn(4, W)
    data = save({"steering_vector": rows[0].clone(), "stacked": rows, "scale": torch.ones(1)})
    names = {"layer.0": "steering_vector", "layer.3": "stacked[2]"}
    artifact = await upload(stub, data, tensor_names=names)
    assert artifact.layers == [0, 3]
    assert artifact.imported_from == names
    assert artifact.import_warnings == ["left out of the file: 'scale'"]
    assert artifact.provenance["tensor_names"]["layer.3"] == "stacked[2]"
    tensors = load(await download(stub, artifact.id))
    assert torch.equal(tensors["layer.0"], rows[0])
    assert torch.equal(tensors["layer.3"], rows[2])


async def test_a_tensor_whose_own_name_ends_in_a_number_is_taken_whole(stub: Stub) -> None:
    own, stacked = torch.randn(W), torch.randn(4, W)
    data = save({"layers[2]": own, "layers": stacked})
    artifact = await upload(stub, data, tensor_names={"layer.2": "layers[2]"})
    assert torch.equal(load(await download(stub, artifact.id))["layer.2"], own)


async def test_names_are_for_other_kinds_as_well(stub: Stub) -> None:
    rotation = torch.linalg.qr(torch.randn(W, 2))[0].T.contiguous()
    artifact = await upload(stub, save({"basis": rotation}), kind=SUBSPACE, tensor_names={"layer.1.rotation": "basis"})
    assert artifact.layers == [1]
    scores = torch.rand(4, 4)
    heads = await upload(stub, save({"importance": scores}), kind=HEAD_SET, tensor_names={"scores": "importance"})
    assert torch.equal(load(await download(stub, heads.id))["scores"], scores)


async def test_an_autoencoder_of_other_names_is_read_by_rows(stub: Stub) -> None:
    names = {"encoder": "w1", "encoder_bias": "b1", "decoder": "w2", "decoder_bias": "b2"}
    theirs = {"w1": torch.randn(16, W), "b1": torch.randn(16), "w2": torch.randn(16, W), "b2": torch.randn(W)}
    artifact = await upload(
        stub,
        save({**theirs, "step": torch.ones(1)}),
        kind=AUTOENCODER,
        site=program_pb2.SITE_RESID_POST,
        layer=2,
        provenance=struct(function="relu", subtracted="decoder_bias"),
        tensor_names=names,
    )
    assert artifact.imported_from == names
    assert artifact.import_warnings == ["left out of the file: 'step'"]
    tensors = load(await download(stub, artifact.id))
    assert all(torch.equal(tensors[name], theirs[source]) for name, source in names.items())


@pytest.mark.parametrize(
    ("names", "field", "message"),
    [
        ({"layer.1": "lost"}, "header.tensor_names['layer.1']", "the file has no tensor 'lost'; it has 'flat', 'rows'"),
        ({"layer.1": "lost[0]"}, "header.tensor_names['layer.1']", "no tensor 'lost[0]'"),
        ({"layer.1": "rows[3]"}, "header.tensor_names['layer.1']", "'rows' has the shape [3, 8], and no row 3"),
        ({"layer.1": "rows[-1]"}, "header.tensor_names['layer.1']", "no tensor 'rows[-1]'"),
        ({"layer.1": "rows"}, "chunk", "one dimension"),
        ({"first": "flat"}, "chunk", "'first' is not a tensor of a vector"),
        ({"layer.9": "flat"}, "chunk", "layer 9"),
    ],
)
async def test_names_that_do_not_fit_are_refused(stub: Stub, names: dict[str, str], field: str, message: str) -> None:
    found, said = await refused(stub, save({"flat": torch.ones(W), "rows": torch.ones(3, W)}), tensor_names=names)
    assert found == field
    assert message in said


async def test_a_file_that_patchclamp_wrote_takes_no_names(stub: Stub) -> None:
    artifact = await upload(stub, save({"layer.1": torch.ones(W)}))
    data = await download(stub, artifact.id)
    assert (await refused(stub, data, tensor_names={"layer.2": "layer.1"}))[0] == "header.tensor_names"
    rows = {"encoder": torch.ones(4, W), "encoder_bias": torch.ones(4)}
    rows |= {"decoder": torch.ones(4, W), "decoder_bias": torch.ones(W)}
    options = {
        "kind": AUTOENCODER,
        "site": program_pb2.SITE_RESID_POST,
        "layer": 1,
        "provenance": struct(function="relu", subtracted="nothing"),
    }
    own = await download(stub, (await upload(stub, save(rows), **options)).id)
    names = {name: name for name in rows}
    assert (await refused(stub, own, **options, tensor_names=names))[0] == "header.tensor_names"


@pytest.mark.parametrize(
    ("options", "field", "formats"),
    [
        ({"layer_offset": 1}, "header.layer_offset", "gguf_control_vector"),
        ({"format": GGUF, "tensor_names": {"layer.1": "x"}}, "header.tensor_names", "safetensors"),
        ({"config": "{}"}, "header.config", "saelens"),
    ],
)
async def test_options_of_other_formats_are_refused_before_the_file(
    stub: Stub, options: dict[str, Any], field: str, formats: str
) -> None:
    found, message = await refused(stub, b"no file at all", **options)
    assert (found, message.endswith(f"it is for {formats}")) == (field, True)


async def test_gates_of_duo_attention_come_in_as_heads_and_go_out_as_gates(stub: Stub) -> None:
    gates = np.array([[0.25, 1.0], [0.5, 0.0], [0.125, 0.75], [1.0, 1.0]])
    text = io.StringIO()
    np.savetxt(text, gates, delimiter="\t")
    data = text.getvalue().encode()
    artifact = await upload(stub, data, kind=HEAD_SET, format=DUO)
    assert artifact.evidence["threshold"] == 0.5
    assert artifact.import_warnings == ["each of the 2 gates of a layer is the score of 2 query heads"]
    scores = load(await download(stub, artifact.id))["scores"]
    assert np.array_equal(scores.numpy(), np.repeat(gates, 2, axis=1).astype(np.float32))
    assert await download(stub, artifact.id, DUO) == data


async def test_a_list_of_qr_head_comes_in_and_goes_out_in_its_order(stub: Stub) -> None:
    artifact = await upload(stub, b'attn_head_set: "3-1,0-2,3-0"', kind=HEAD_SET, format=QR)
    assert artifact.evidence["threshold"] == pytest.approx(1 / 3)
    assert (await download(stub, artifact.id, QR)).startswith(b'attn_head_set: "3-1,0-2,3-0"\n')


@pytest.mark.parametrize(("format", "data"), [(DUO, b"1\t1\n" * 4), (QR, b"attn_head_set: 0-1")], ids=["gates", "list"])
async def test_heads_of_another_model_are_refused_by_the_field_that_names_it(
    stub: Stub, format: int, data: bytes
) -> None:
    field, _ = await refused(stub, data, kind=HEAD_SET, format=format, model_fingerprint="another")
    assert field == "header.model_fingerprint"


async def test_scores_that_differ_within_a_group_have_no_gates(stub: Stub) -> None:
    artifact = await upload(stub, save({"scores": torch.arange(16.0).view(4, 4) / 16}), kind=HEAD_SET)
    with pytest.raises(grpc.aio.AioRpcError, match="heads 0 to 1 of layer 0 share a KV head") as caught:
        await download(stub, artifact.id, DUO)
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION

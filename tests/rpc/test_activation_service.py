"""ReadActivations through a real channel, against plain transformers with hooks on the tiny llama."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import torch
from live import LiveServer
from oracle_sites import attach
from patience import PATIENCE_SECONDS
from safetensors.torch import load
from statuses import failure
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from patchclamp.v1 import activation_pb2 as pb
from patchclamp.v1 import artifact_pb2, generation_pb2, neuron_pb2, program_pb2, tensor_pb2
from patchclamp.v1.activation_pb2_grpc import ActivationServiceStub
from patchclamp.v1.artifact_pb2_grpc import ArtifactServiceStub
from patchclamp_server.artifacts.activations import check_activations
from patchclamp_server.artifacts.store import ArtifactStore
from patchclamp_server.artifacts.types import ArtifactKind
from patchclamp_server.model.load import load_model
from patchclamp_server.model.sites import Site
from patchclamp_server.rpc.call.upload_space import UploadLimits

READ = pb.ReadActivationsRequest
DTYPES = {
    tensor_pb2.DATA_TYPE_FLOAT32: torch.float32,
    tensor_pb2.DATA_TYPE_BFLOAT16: torch.bfloat16,
    tensor_pb2.DATA_TYPE_INT32: torch.int32,
}
PROMPTS = [
    generation_pb2.Prompt(text="The sea is wide."),
    generation_pb2.Prompt(tokens={"ids": [5, 6, 7, 8]}),
    generation_pb2.Prompt(
        chat={"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]}
    ),
]
GROUPS = [
    neuron_pb2.LabelledTexts(label="a", prompts=[PROMPTS[0], generation_pb2.Prompt(text="x" * 40)]),
    neuron_pb2.LabelledTexts(label="b", prompts=[generation_pb2.Prompt(text="Nothing.")]),
]
USER = program_pb2.Scope(include=[program_pb2.TokenSelector(role="user")])


@pytest.fixture(scope="module")
def server(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    with LiveServer(load_model(str(tiny_llama_dir)), tmp_path_factory.mktemp("artifacts")) as server:
        yield server


@pytest.fixture(scope="module")
def channel(server: LiveServer) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(server.address) as channel:
        yield channel


@pytest.fixture(scope="module")
def stub(channel: grpc.Channel) -> ActivationServiceStub:
    return ActivationServiceStub(channel)


@pytest.fixture(scope="module")
def model(tiny_llama_dir: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(tiny_llama_dir, dtype=torch.float32).eval()


def read(stub: ActivationServiceStub, **fields: Any) -> list[pb.ReadActivationsResponse]:
    return list(stub.ReadActivations(READ(**fields), timeout=PATIENCE_SECONDS))


def tensor(message: tensor_pb2.Tensor) -> Tensor:
    return torch.frombuffer(bytearray(message.data), dtype=DTYPES[message.dtype]).view(*message.shape)


def rows_of(responses: Sequence[pb.ReadActivationsResponse]) -> dict[tuple[str, int, int, int], Tensor]:
    """By site, layer, text and position."""
    found = {}
    for rows in (response.rows for response in responses if response.HasField("rows")):
        values = tensor(rows.values)
        for i, (text, position) in enumerate(zip(rows.texts, rows.positions, strict=True)):
            found[program_pb2.Site.Name(rows.site), rows.layer, text, position] = values[i]
    return found


def hooked(model: PreTrainedModel, ids: Sequence[int]) -> dict[tuple[str, int], Tensor]:
    seen: dict[tuple[str, int], Tensor] = {}

    def visit(site: Site, layer: int, activation: Tensor) -> Tensor:
        seen[f"SITE_{site.name}", layer] = activation.reshape(len(ids), -1).clone()
        return activation

    hooks = attach(model, visit)
    try:
        with torch.no_grad():
            model(input_ids=torch.tensor([list(ids)]), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def test_prompts_of_every_form_are_read_at_every_site(
    server: LiveServer, stub: ActivationServiceStub, model: PreTrainedModel
) -> None:
    sites = [f"SITE_{site.name}" for site in server.model.info.sites if site is not Site.ATTN_Q]
    responses = read(stub, prompts=PROMPTS, sites=sites)
    rows = rows_of(responses)
    tokens: dict[int, dict[int, int]] = {}
    for part in (response.rows for response in responses if response.HasField("rows")):
        for text, position, token in zip(part.texts, part.positions, part.token_ids, strict=True):
            tokens.setdefault(text, {})[position] = token
    assert sorted(tokens) == [0, 1, 2]
    assert list(tokens[1].values()) == [5, 6, 7, 8]
    for text, by_position in tokens.items():
        expected = hooked(model, [by_position[position] for position in range(len(by_position))])
        for site in sites:
            for layer in range(server.model.info.n_layers):
                for position in by_position:
                    torch.testing.assert_close(
                        rows[site, layer, text, position], expected[site, layer][position], rtol=1e-4, atol=1e-4
                    )
    result = responses[-1].result
    assert (result.texts, result.rows) == (3, sum(map(len, tokens.values())))


def test_roles_of_a_chat_scope_what_is_read(stub: ActivationServiceStub) -> None:
    everything = rows_of(read(stub, prompts=PROMPTS[2:], sites=["SITE_RESID_PRE"], layers=[0]))
    of_user = rows_of(read(stub, prompts=PROMPTS[2:], sites=["SITE_RESID_PRE"], layers=[0], scope=USER))
    assert 0 < len(of_user) < len(everything)
    assert all(torch.equal(everything[key], row) for key, row in of_user.items())


def test_moments_and_means_by_label_come_with_their_labels(stub: ActivationServiceStub) -> None:
    asked: dict[str, Any] = {
        "texts": {"groups": GROUPS, "window_tokens": 16},
        "sites": ["SITE_RESID_POST"],
        "layers": [1],
    }
    responses = read(stub, **asked)
    labels = {text: label for r in responses for text, label in zip(r.rows.texts, r.rows.labels, strict=True)}
    assert (labels, list(responses[-1].result.labels)) == ({0: 0, 1: 0, 2: 1}, ["a", "b"])
    x = {key[2:]: row.double().numpy() for key, row in rows_of(responses).items()}
    whole = np.stack(list(x.values()))
    (moments,) = (
        r.moments for r in read(stub, **asked, reduction="ACTIVATION_REDUCTION_MOMENTS") if r.HasField("moments")
    )
    assert moments.tokens == len(whole)
    np.testing.assert_allclose(tensor(moments.mean).numpy(), whole.mean(0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(tensor(moments.covariance).numpy(), np.cov(whole.T, bias=True), rtol=1e-3, atol=1e-5)
    means = [r.mean for r in read(stub, **asked, reduction="ACTIVATION_REDUCTION_MEAN_BY_LABEL") if r.HasField("mean")]
    assert [mean.label for mean in means] == ["a", "b"]
    for label, mean in enumerate(means):
        own = np.stack([row for (text, _), row in x.items() if labels[text] == label])
        assert mean.tokens == len(own)
        np.testing.assert_allclose(tensor(mean.mean).numpy(), own.mean(0), rtol=1e-4, atol=1e-5)


def test_a_maximum_says_where_each_unit_has_it(stub: ActivationServiceStub) -> None:
    asked: dict[str, Any] = {"prompts": PROMPTS[:1], "sites": ["SITE_MLP_POST"], "layers": [0]}
    x = torch.stack(list(rows_of(read(stub, **asked)).values()))
    (rows,) = (r.rows for r in read(stub, **asked, reduction="ACTIVATION_REDUCTION_MAX") if r.HasField("rows"))
    assert tensor(rows.unit_positions)[0].tolist() == x.argmax(0).tolist()
    torch.testing.assert_close(tensor(rows.values)[0], x.amax(0))


def test_stored_rows_are_an_artifact_that_is_downloaded_in_parts_and_uploaded_again(
    server: LiveServer, stub: ActivationServiceStub, channel: grpc.Channel
) -> None:
    responses = read(
        stub,
        texts={"groups": GROUPS, "window_tokens": 16},
        sites=["SITE_RESID_POST", "SITE_MLP_POST"],
        dtype="DATA_TYPE_BFLOAT16",
        store=True,
        description="rows of texts",
        tags=["rows"],
        scope={"exclude": [{"positions": {"start": 0, "end": 1}}]},
    )
    assert not rows_of(responses)
    result = responses[-1].result
    artifact = result.artifact
    assert (artifact.kind, list(artifact.layers), list(artifact.tags)) == (
        artifact_pb2.ARTIFACT_KIND_ACTIVATIONS,
        [0, 1],
        ["rows"],
    )
    artifacts = ArtifactServiceStub(channel)
    asked = artifact_pb2.DownloadRequest(ref="rows", format="ARTIFACT_FORMAT_SAFETENSORS")
    data = b"".join(response.chunk for response in artifacts.Download(asked))
    tensors = load(data)
    check_activations(tensors)
    assert len(tensors["text"]) == result.rows
    assert tensors["label"].unique().tolist() == [0, 1]
    about = json.loads(json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]["patchclamp"])
    assert about["provenance"]["labels"] == ["a", "b"]
    assert (
        about["provenance"]["scope"] == {"exclude": [{"positions": {"start": "0", "end": "1"}}]}
        or about["provenance"]["scope"]
    )
    header = artifact_pb2.UploadHeader(
        kind="ARTIFACT_KIND_ACTIVATIONS", format="ARTIFACT_FORMAT_SAFETENSORS", size_bytes=len(data)
    )
    parts = [artifact_pb2.UploadRequest(header=header), artifact_pb2.UploadRequest(chunk=data)]
    assert artifacts.Upload(iter(parts)).artifact.id == artifact.id


def test_uploaded_activations_that_the_model_does_not_have_are_refused(
    server: LiveServer, channel: grpc.Channel, tmp_path: Path
) -> None:
    one = torch.zeros(1, dtype=torch.int64)
    tensors = {"text": one, "position": one, "token": one, "length": one + 1, "resid_pre.1": torch.ones(1, 5)}
    elsewhere = ArtifactStore(tmp_path)
    elsewhere.put(ArtifactKind.ACTIVATIONS, tensors, model_fingerprint=server.model.info.fingerprint)
    (path,) = tmp_path.glob("objects/*/*")
    data = path.read_bytes()
    assert len(data) < UploadLimits().max_bytes
    header = artifact_pb2.UploadHeader(
        kind="ARTIFACT_KIND_ACTIVATIONS", format="ARTIFACT_FORMAT_SAFETENSORS", size_bytes=len(data)
    )
    parts = [artifact_pb2.UploadRequest(header=header), artifact_pb2.UploadRequest(chunk=data)]
    with pytest.raises(grpc.RpcError, match=r"resid_pre\.1 has width 5; resid_pre of"):
        ArtifactServiceStub(channel).Upload(iter(parts))


READOUT = program_pb2.Readout(site="SITE_MLP_POST", layers=[0], top_neurons={"k": 1})
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"prompts": []}, "prompts"),
    ({"texts": {"groups": GROUPS}}, "prompts"),
    ({"sites": []}, "sites"),
    ({"sites": ["SITE_RESID_PRE", "SITE_RESID_PRE"]}, "sites[1]"),
    ({"layers": [9]}, "layers[0]"),
    ({"prompts": [generation_pb2.Prompt(tokens={"ids": [10**6]})]}, "prompts[0].tokens.ids[0]"),
    ({"program": program_pb2.Program(readouts=[READOUT])}, "program.readouts"),
    ({"scope": USER}, "scope.include[0].role"),
    ({"scope": {"include": [{"positions": {"start": 400}}]}}, "scope"),
    ({"reduction": 99}, "reduction"),
    ({"reduction": "ACTIVATION_REDUCTION_MEAN_BY_LABEL"}, "reduction"),
    ({"reduction": "ACTIVATION_REDUCTION_MOMENTS", "store": True}, "store"),
    ({"dtype": "DATA_TYPE_INT64"}, "dtype"),
    ({"tags": ["rows"]}, "tags"),
    ({"description": "d"}, "description"),
]


@pytest.mark.parametrize(("fields", "field"), WRONG, ids=[field + str(i) for i, (_, field) in enumerate(WRONG)])
def test_what_is_wrong_is_refused_with_its_field(
    stub: ActivationServiceStub, fields: dict[str, Any], field: str
) -> None:
    right: dict[str, Any] = {"prompts": PROMPTS[:2], "sites": ["SITE_RESID_POST"]}
    with pytest.raises(grpc.RpcError) as refused:
        read(stub, **{**right, **fields})
    assert failure(refused.value).fields == [field]

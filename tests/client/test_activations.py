"""Activations that the client reads: numbers as they came, parts joined, and files that the server takes."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from live import LiveServer
from safetensors.torch import load_file

from patchclamp import Client, requests
from patchclamp.cli.app import main
from patchclamp.neurons import TextSource
from patchclamp.programs import add, last, read_activation
from patchclamp.results import Array, ReadActivationsCollector
from patchclamp.v1 import activation_pb2 as pb
from patchclamp.v1 import program_pb2, tensor_pb2
from patchclamp_server.artifacts.activations import check_activations
from patchclamp_server.model.load import load_model

TEXTS = ["The sea is wide.", "Hello"]


@pytest.fixture(scope="module")
def server(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    with LiveServer(load_model(str(tiny_llama_dir)), tmp_path_factory.mktemp("artifacts")) as server:
        yield server


@pytest.fixture
def client(server: LiveServer) -> Iterator[Client]:
    with Client(server.address) as client:
        yield client


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_numbers_are_those_of_their_type_with_and_without_numpy(dtype: torch.dtype) -> None:
    values = torch.tensor([[0.5, -3.25, 1e-3], [700.0, 0.0, -1.0]]).to(dtype)
    data = values.view(torch.uint8).numpy().tobytes()
    found = Array(str(dtype).removeprefix("torch."), (2, 3), data)
    assert found.tolist() == values.float().tolist()
    assert np.asarray(found).astype(np.float32).tolist() == values.float().tolist()


def part(texts: list[int], value: float) -> pb.ReadActivationsResponse:
    data = np.full((len(texts), 2), value, dtype="<f4").tobytes()
    rows = pb.ActivationRows(
        site=program_pb2.SITE_RESID_POST,
        layer=1,
        texts=texts,
        labels=[-1] * len(texts),
        positions=texts,
        token_ids=texts,
        tokens=[1] * len(texts),
        lengths=[9] * len(texts),
        values=tensor_pb2.Tensor(dtype="DATA_TYPE_FLOAT32", shape=[len(texts), 2], data=data),
    )
    return pb.ReadActivationsResponse(rows=rows)


def test_parts_of_a_site_and_layer_are_joined_in_order() -> None:
    collector = ReadActivationsCollector()
    collector.add(part([0, 1], 1.0))
    collector.add(part([2], 2.0))
    assert collector.result() is None
    collector.add(pb.ReadActivationsResponse(result=pb.ReadActivationsResult(texts=3, rows=3)))
    found = collector.result()
    assert found is not None
    rows = found.of("resid_post", 1)
    assert (rows.texts, rows.values.tolist()) == ((0, 1, 2), [[1.0, 1.0], [1.0, 1.0], [2.0, 2.0]])
    json.dumps(found.to_dict())
    with pytest.raises(KeyError, match="no rows of resid_post at layer 0"):
        found.of("resid_post", 0)


def test_a_list_is_read_as_prompts_and_all_else_in_windows() -> None:
    assert len(requests.read_activations(TEXTS, "resid_post").prompts) == 2
    assert requests.read_activations({"a": TEXTS}, "resid_post").texts.groups[0].label == "a"
    assert requests.read_activations("corpus", ["attn_z"]).texts.corpus == "corpus"
    assert requests.read_activations(TextSource(TEXTS, 16), "mlp_out").texts.window_tokens == 16
    with pytest.raises(ValueError, match="texts: give at least one text"):
        requests.read_activations([], "resid_post")
    with pytest.raises(ValueError, match="reduction 'median' is unknown"):
        requests.read_activations(TEXTS, "resid_post", reduction="median")  # type: ignore[arg-type]


def test_what_is_read_is_what_a_readout_of_the_same_prompt_streams(client: Client) -> None:
    direction = np.linspace(-1, 1, 32, dtype=np.float32)
    steered = add(direction, layers=0, strength=2.0)
    read = client.read_activations(TEXTS, ["resid_post", "mlp_up"], layers=[1], program=steered).result()
    for text, prompt in enumerate(TEXTS):
        for site in ("resid_post", "mlp_up"):
            readout = read_activation(site=site, layers=1, scope="prompt", name=site)  # type: ignore[arg-type]
            program = [steered, readout]
            streamed = client.generate(prompt, max_tokens=1, program=program).result().prompt_readouts
            rows = read.of(site, 1)
            own = np.asarray(rows.values)[np.array(rows.texts) == text]
            assert [value.position for value in streamed] == list(range(len(own)))
            np.testing.assert_allclose(np.array([value.values for value in streamed]), own, rtol=1e-4, atol=1e-5)


def test_units_of_a_generated_token_come_with_it(client: Client) -> None:
    program = [read_activation(site="mlp_post", layers=[0, 1], units=[5, 2], scope="generated", name="two")]
    result = client.generate("Hello", max_tokens=3, ignore_eos=True, program=program).result()
    found = [value for token in result.tokens for value in token.readouts]
    assert {(value.layer, tuple(value.ids)) for value in found} == {(0, (5, 2)), (1, (5, 2))}


def test_the_command_writes_a_file_that_the_server_takes(
    server: LiveServer, client: Client, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "rows.safetensors"
    asked = ["activations", "read", *TEXTS, "--site", "mlp_post", "--layers", "1", "--last", "2", "--dtype", "bfloat16"]
    assert main([*asked, "--address", server.address, "--out", str(out)]) == 0
    assert "mlp_post" in capsys.readouterr().out
    tensors = load_file(out)
    check_activations(tensors)
    expected = client.read_activations(TEXTS, "mlp_post", layers=[1], scope=last(2), dtype="bfloat16").result()
    assert tensors["mlp_post.1"].float().tolist() == np.asarray(expected.rows[0].values).tolist()
    assert client.put_artifact(out, kind="activations").kind == "activations"


def test_the_command_prints_moments_as_json(server: LiveServer, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["activations", "read", *TEXTS, "--layers", "1", "--reduction", "moments", "--json"]
    assert main([*asked, "--address", server.address]) == 0
    (moments,) = json.loads(capsys.readouterr().out)["moments"]
    assert np.array(moments["covariance"]).shape == (32, 32)


def test_the_command_stores_rows_under_a_name(
    server: LiveServer, client: Client, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["activations", "read", *TEXTS, "--name", "kept", "--address", server.address]) == 0
    assert "stored as kept" in capsys.readouterr().err
    assert client.get_artifact("kept").kind == "activations"

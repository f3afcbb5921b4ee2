"""Features of a stored autoencoder from the client and the command line, on a whole server of a tiny random llama."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from live import LiveServer

from patchclamp import Client, PatchclampError
from patchclamp.cli import main
from patchclamp.monitoring import watch_autoencoder
from patchclamp.programs import (
    Program,
    abort_when_feature,
    add,
    clamp_features,
    read_features,
    read_top_features,
    set_features,
    when_feature,
)
from patchclamp_server.artifacts.store import ArtifactStore
from patchclamp_server.artifacts.types import ArtifactKind
from patchclamp_server.model.load import load_model
from patchclamp_server.model.sites import Site

WIDTH, N, LAYER = 32, 16, 0


@pytest.fixture(scope="module")
def rows() -> torch.Tensor:
    """Orthonormal rows of encoder and decoder: each feature is a coordinate of h where that is above 0."""
    return torch.linalg.qr(torch.randn(WIDTH, N, generator=torch.Generator().manual_seed(0))).Q.T.contiguous()


@pytest.fixture(scope="module")
def server(tiny_llama_dir: Path, rows: torch.Tensor, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    with LiveServer(load_model(str(tiny_llama_dir)), tmp_path_factory.mktemp("feature_artifacts")) as live:
        tensors = {
            "encoder": rows,
            "encoder_bias": torch.zeros(N),
            "decoder": rows.clone(),
            "decoder_bias": torch.zeros(WIDTH),
        }
        ArtifactStore(live.server.config.artifacts_url).put(
            ArtifactKind.AUTOENCODER,
            tensors,
            model_fingerprint=live.model.info.fingerprint,
            site=Site.RESID_POST,
            provenance={"layer": LAYER, "function": "relu", "subtracted": "nothing"},
            tags=["sae"],
        )
        yield live


@pytest.fixture
def client(server: LiveServer) -> Iterator[Client]:
    with Client(server.address) as client:
        yield client


EVERY = read_features("sae", range(N), layers=LAYER, name="every")


def values(client: Client, *edits: object) -> dict[int, np.ndarray]:
    """All features of the prompt, by position."""
    result = client.generate("hello", program=Program(edits, readouts=[EVERY]), max_tokens=1).result()  # type: ignore[arg-type]
    return {value.position: np.array(value.values) for value in result.readouts}


def test_an_edit_changes_its_feature_alone(client: Client) -> None:
    plain = values(client)
    feature = int(max(plain.values(), key=lambda own: own.max()).argmax())
    edited = values(client, set_features("sae", feature, 2.5))
    for position, own in edited.items():
        others = np.arange(N) != feature
        np.testing.assert_allclose(own[others], plain[position][others], atol=1e-5)
        if plain[position][feature] > 0:
            assert own[feature] == pytest.approx(2.5, abs=1e-5)


def test_the_largest_are_the_largest_of_all(client: Client) -> None:
    read = [EVERY, read_top_features("sae", 3, layers=LAYER, name="largest")]
    result = client.generate("hello", program=Program([], readouts=read), max_tokens=2).result()
    every = {value.position: value.values for value in result.readouts if value.name == "every"}
    for value in result.readouts:
        if value.name == "largest":
            expected = sorted((v for v in every[value.position] if v > 0), reverse=True)[:3]
            assert value.values == pytest.approx(expected, abs=1e-5)
            assert [every[value.position][i] for i in value.ids] == pytest.approx(value.values, abs=1e-5)


def test_a_feature_opens_a_gate_and_ends_a_stream(client: Client) -> None:
    active = {position: own[1] > 0 for position, own in values(client).items()}
    gate = when_feature("sae", 1, layer=LAYER, above=0.0)
    steered = client.generate("hello", program=[add([1.0] * WIDTH, layers=1, gate=gate)], max_tokens=1).result()
    assert steered.receipt.edits[0].gate_firings == sum(active.values())
    assert 0 < sum(active.values()) < len(active)
    feature = next(i for i in range(N) if values(client)[0][i] > 0)
    stop = Program([], abort_when=[abort_when_feature("sae", feature, layer=LAYER, above=0.0, name="on")])
    with pytest.raises(PatchclampError) as ended:
        client.generate("hello", program=stop, max_tokens=4).result()
    assert ended.value.code == "ABORTED"


def test_a_wrong_number_is_refused_by_its_field(client: Client) -> None:
    with pytest.raises(PatchclampError) as refused:
        client.generate("hello", program=[clamp_features("sae", [1, N], max=0.0)], max_tokens=1).result()
    assert refused.value.violations[0].field == "program.edits[0].features.features[1]"


def test_features_are_watched_by_number(client: Client) -> None:
    created = client.create_watch([watch_autoencoder("topic", "sae", [1, 5])], tags=["topics"])
    assert created.items == ("topic/L0F1", "topic/L0F5")
    client.start_watch("topics")
    client.generate("hello", max_tokens=3, ignore_eos=True).result()
    found = client.watch_statistics("topics")
    assert [item.threshold for item in found.items] == [0.0, 0.0]
    assert found.items[0].tokens > 0
    client.stop_watch("topics")


def test_the_command_line_edits_and_watches_features(
    client: Client, server: LiveServer, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--address", server.address, "--json"]
    assert main(["generate", "hello", "--features", "sae#3,5=2.0", "--max-tokens", "2", *options]) == 0
    [edit] = json.loads(capsys.readouterr().out)["receipt"]["edits"]
    assert edit["name"] == "sae#3,5"
    assert main(["watch", "create", "named", "--features", "topic=sae#3,5:0.5", *options]) == 0
    assert "topic/L0F3" in capsys.readouterr().out

"""patchclamp features, against a server of the embedded model."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from live import LiveServer
from small_autoencoder import FEATURES, SmallAutoencoder

from patchclamp import Client
from patchclamp.cli.app import main


@pytest.fixture
def sae(
    embedded_server: LiveServer,
    small_autoencoder: SmallAutoencoder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Iterator[str]:
    """The tag of the autoencoder, imported by the command; its names are `cli-names`."""
    monkeypatch.setenv("PATCHCLAMP_ADDRESS", embedded_server.address)
    monkeypatch.chdir(tmp_path)
    small_autoencoder.save_saelens(tmp_path / "layer_14")
    assert main(["features", "import", "layer_14", "--name", "cli-sae", "--replace"]) == 0
    assert "resid_post of layer 14, width 576" in capsys.readouterr().out
    (tmp_path / "names.json").write_text('{"3": "weather", "9": "numbers"}')
    command = ["features", "label", "names.json", "--of", "cli-sae", "--name", "cli-names", "--replace"]
    assert main(command) == 0
    assert "2 names of features of cli-sae" in capsys.readouterr().out
    yield "cli-sae"
    # Other tests import the same autoencoder, and delete it by a tag that must be its only one.
    with Client(embedded_server.address) as client:
        for tag in ("cli-names", "cli-sae"):
            client.untag_artifact(tag)


def test_features_are_searched_by_a_label_of_a_data_set(sae: str, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["features", "search", sae, "--target", "joyful", "--data", "sentiment"]
    assert main([*command, "--top", "3", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["features"]) == 3
    assert found["tokens"] > 100
    assert main([*command, "--top", "3"]) == 0
    shown = capsys.readouterr().out
    assert "explains" in shown
    assert str(found["features"][0]["feature"]) in shown


def test_features_are_searched_by_their_names(sae: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["features", "search", sae, "--label", "WEATHER", "--labels", "cli-names", "--json"]) == 0
    (feature,) = json.loads(capsys.readouterr().out)["features"]
    assert (feature["feature"], feature["label"]) == (3, "weather")


def test_a_detached_search_is_followed_to_what_it_found(sae: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["features", "search", sae, "--label", "weather", "--labels", "cli-names", "--detach"]) == 0
    assert main(["jobs", "follow", capsys.readouterr().out.strip()]) == 0
    assert "weather" in capsys.readouterr().out


def test_texts_beside_a_search_that_takes_none_are_a_wrong_use(sae: str) -> None:
    assert main(["features", "search", sae, "--label", "x", "--data", "code"]) == 2


def test_an_autoencoder_is_exported_and_imported_again_to_the_same_weights(
    sae: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["features", "export", sae, "-o", "back", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["directory"] == "back"
    own, back = ((tmp_path / name / "sae_weights.safetensors").stat().st_size for name in ("layer_14", "back"))
    assert abs(own - back) < 1000
    np.savez(tmp_path / "params.npz", W_enc=np.zeros((576, FEATURES), dtype=np.float32))
    assert main(["features", "import", "params.npz", "--site", "resid_post", "--layer", "3"]) == 1

"""Requests about features, and the files of autoencoders that are sent."""

from pathlib import Path
from typing import Any

import pytest

from patchclamp import requests
from patchclamp.autoencoders import ExportedAutoencoder, autoencoder_file


def test_a_search_says_by_what() -> None:
    texts = {"code": ["x = 1"], "prose": ["It rained."]}
    contrast = requests.search_features("sae", texts=texts, target="code", top_k=3, labels="names")
    assert contrast.WhichOneof("by") == "contrast"
    assert (contrast.contrast.target, contrast.top_k, contrast.labels) == ("code", 3, "names")
    assert [group.label for group in contrast.contrast.texts.groups] == ["code", "prose"]
    tokens = requests.search_features("sae", texts="corpus", tokens=" the")
    assert (tokens.tokens.texts.corpus, list(tokens.tokens.tokens)) == ("corpus", [" the"])
    assert requests.search_features("sae", direction="joy").direction.artifact == "joy"
    assert requests.search_features("sae", label="dogs").label == "dogs"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "got none"),
        ({"label": "x", "direction": "v"}, "got direction, label"),
        ({"target": "a"}, "texts: give them with target"),
        ({"label": "x", "texts": ["y"]}, "texts: give them with target"),
        ({"label": "x", "contrast": "b"}, "contrast: give it with target"),
    ],
)
def test_a_search_by_nothing_or_by_two_ways_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        requests.search_features("sae", **options)


def test_the_files_of_saelens_are_found_by_their_directory(tmp_path: Path) -> None:
    exported = ExportedAutoencoder(b"weights", '{"architecture": "standard"}')
    directory = exported.save(tmp_path / "sae")
    for path in (directory, str(directory), directory / "sae_weights.safetensors"):
        file, options = autoencoder_file(path)
        assert file.read_bytes() == b"weights"
        assert (options["format"], options["config"]) == ("saelens", '{"architecture": "standard"}')
    assert sorted(each.name for each in directory.iterdir()) == ["cfg.json", "sae_weights.safetensors"]


def test_params_of_gemma_scope_have_the_place_that_is_given(tmp_path: Path) -> None:
    (tmp_path / "params.npz").write_bytes(b"zip")
    for path in (tmp_path, tmp_path / "params.npz"):
        _, options = autoencoder_file(path, site="mlp_out", layer=0)
        header = next(requests.upload(b"zip", **options)).header
        assert (header.format, header.layer, header.HasField("layer")) == (7, 0, True)


def test_what_is_no_autoencoder_is_refused_before_it_is_sent(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"sae_weights\.safetensors"):
        autoencoder_file(tmp_path)
    (tmp_path / "sae_weights.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"cfg\.json"):
        autoencoder_file(tmp_path)
    with pytest.raises(TypeError, match="path"):
        autoencoder_file(3)  # type: ignore[arg-type]


def test_a_file_is_read_as_it_is_sent(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(range(256)) * 8192)
    header, *chunks = requests.upload(path)
    assert header.header.size_bytes == 1 << 21
    assert [len(each.chunk) for each in chunks] == [1 << 20, 1 << 20]
    assert b"".join(each.chunk for each in chunks) == path.read_bytes()

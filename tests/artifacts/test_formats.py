"""Files of artifacts: safetensors of our own, GGUF control vectors of llama.cpp and repeng, bytes that are neither."""

import hashlib
import json
import re
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from patchclamp_server.artifacts.formats import (
    feature_label_json,
    gguf_control_vector,
    head_score_json,
    safetensors,
    text_json_lines,
)
from patchclamp_server.artifacts.formats.base import CannotExpress, MalformedFile
from patchclamp_server.artifacts.formats.registry import FORMATS
from patchclamp_server.artifacts.store import ArtifactStore
from patchclamp_server.artifacts.types import Artifact, ArtifactKind
from patchclamp_server.model.sites import Site


def stored_vector(layers: dict[int, torch.Tensor], site: Site = Site.RESID_POST, **kwargs: object) -> Artifact:
    store = ArtifactStore("memory://formats")
    tensors = {f"layer.{layer}": vector for layer, vector in layers.items()}
    info = store.put(ArtifactKind.VECTOR, tensors, model_fingerprint="m", site=site, **kwargs)  # type: ignore[arg-type]
    return store.get(info.id)


def stored_heads(**tensors: torch.Tensor) -> Artifact:
    store = ArtifactStore("memory://formats")
    return store.get(store.put(ArtifactKind.HEAD_SET, tensors, model_fingerprint="m").id)


def stored_neurons(layers: dict[int, list[int]], **numbers: list[float]) -> Artifact:
    """`numbers`: values or scores of all layers, in their order."""
    store = ArtifactStore("memory://formats")
    tensors = {f"layer.{layer}.neurons": torch.tensor(neurons) for layer, neurons in layers.items()}
    for kind, flat in numbers.items():
        parts = torch.tensor(flat).split([len(neurons) for neurons in layers.values()])
        tensors |= {f"layer.{layer}.{kind}": part for layer, part in zip(layers, parts, strict=True)}
    return store.get(store.put(ArtifactKind.NEURON_SET, tensors, model_fingerprint="m").id)


def stored_corpus() -> Artifact:
    store, file = (
        ArtifactStore("memory://formats"),
        text_json_lines.decode(b'{"text": "a", "label": "b"}\n{"text": "c"}'),
    )
    info = store.put(ArtifactKind.CORPUS, file.tensors, model_fingerprint="", provenance=file.provenance)
    return store.get(info.id)


def stored_labels() -> Artifact:
    store, file = ArtifactStore("memory://formats"), feature_label_json.decode(b'{"3": "a", "17": "bc"}')
    about = {**file.provenance, "autoencoder": "sha256:" + 64 * "a"}
    info = store.put(ArtifactKind.FEATURE_LABELS, file.tensors, model_fingerprint="m", provenance=about)
    return store.get(info.id)


def write_as_repeng(path: Path, directions: dict[int, np.ndarray], arch: str = "controlvector") -> Path:
    writer = gguf.GGUFWriter(path, arch)
    writer.add_string(f"{arch}.model_hint", "mistral")
    writer.add_uint32(f"{arch}.layer_count", len(directions))
    for layer in directions:
        writer.add_tensor(f"direction.{layer}", directions[layer])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def gguf_bytes(
    *, keys: bytes = b"", n_keys: int = 0, entries: bytes = b"", n_tensors: int = 0, version: int = 3
) -> bytes:
    architecture = text("general.architecture") + struct.pack("<I", 8) + text("controlvector")
    return b"GGUF" + struct.pack("<IQQ", version, n_tensors, n_keys + 1) + architecture + keys + entries


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def entry(name: str, size: int, *, dims: int = 1, ggml_type: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack("<I", dims) + struct.pack("<Q", size) * dims + struct.pack("<IQ", ggml_type, offset)


def test_a_repeng_file_keeps_its_layer_numbers_and_values(tmp_path: Path) -> None:
    # repeng's order: from the last layer down.
    directions = {layer: np.random.default_rng(layer).normal(size=24).astype(np.float32) for layer in range(5, 0, -1)}
    path = write_as_repeng(tmp_path / "vector.gguf", directions)
    for source in (path, path.read_bytes()):
        decoded = gguf_control_vector.decode(source)
        assert set(decoded.tensors) == {f"layer.{layer}" for layer in directions}
        assert all(np.array_equal(decoded.tensors[f"layer.{k}"].numpy(), v) for k, v in directions.items())
        assert decoded.provenance["model_hint"] == "mistral"


def test_an_exported_vector_is_read_by_the_gguf_package_as_llama_cpp_expects_it(tmp_path: Path) -> None:
    vectors = {1: torch.randn(16), 7: torch.randn(16)}
    path = tmp_path / "out.gguf"
    path.write_bytes(gguf_control_vector.encode(stored_vector(vectors), "llama"))
    reader = gguf.GGUFReader(path)
    fields = {name: reader.get_field(name) for name in ("general.architecture", "controlvector.model_hint")}
    assert {name: field.contents() for name, field in fields.items() if field} == {
        "general.architecture": "controlvector",
        "controlvector.model_hint": "llama",
    }
    tensors = {t.name: t for t in reader.tensors}
    assert set(tensors) == {"direction.1", "direction.7"}
    assert all(t.tensor_type == gguf.GGMLQuantizationType.F32 and t.data.ndim == 1 for t in reader.tensors)
    assert np.array_equal(tensors["direction.7"].data, vectors[7].numpy())


@settings(max_examples=25, deadline=None)
@given(layers=st.sets(st.integers(1, 99), min_size=1, max_size=6), width=st.integers(1, 70), seed=st.integers(0, 999))
def test_any_gguf_vector_round_trips_exactly(layers: set[int], width: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    vectors = {layer: torch.randn(width, generator=generator) for layer in layers}
    decoded = gguf_control_vector.decode(gguf_control_vector.encode(stored_vector(vectors), "llama"))
    assert set(decoded.tensors) == {f"layer.{layer}" for layer in layers}
    assert all(torch.equal(decoded.tensors[f"layer.{layer}"], vectors[layer]) for layer in layers)


def test_the_model_hint_of_an_imported_vector_is_exported_again(tmp_path: Path) -> None:
    decoded = gguf_control_vector.decode(write_as_repeng(tmp_path / "v.gguf", {1: np.ones(4, np.float32)}))
    artifact = stored_vector({1: decoded.tensors["layer.1"]}, provenance=decoded.provenance)
    assert gguf_control_vector.decode(gguf_control_vector.encode(artifact, "llama")).provenance == decoded.provenance


def test_half_precision_directions_are_kept_on_import_and_written_as_float32(tmp_path: Path) -> None:
    path = write_as_repeng(tmp_path / "v.gguf", {2: np.array([0.1, 3.0], np.float16)})
    vector = gguf_control_vector.decode(path).tensors["layer.2"]
    assert vector.dtype == torch.float16
    again = gguf_control_vector.decode(gguf_control_vector.encode(stored_vector({2: vector}), "llama"))
    assert torch.equal(again.tensors["layer.2"], vector.float())


def test_what_llama_cpp_has_no_place_for_is_refused_and_not_dropped() -> None:
    with pytest.raises(CannotExpress, match=r"layer 0: choose layers from 1 on \(--layers\)"):
        gguf_control_vector.encode(stored_vector({0: torch.ones(2), 1: torch.ones(2)}), "llama")
    with pytest.raises(CannotExpress, match="mlp_out"):
        gguf_control_vector.encode(stored_vector({1: torch.ones(2)}, Site.MLP_OUT), "llama")
    store = ArtifactStore("memory://formats")
    neurons = store.put(ArtifactKind.NEURON_SET, {"layer.1.neurons": torch.tensor([1])}, model_fingerprint="m")
    with pytest.raises(CannotExpress, match="neuron_set"):
        gguf_control_vector.encode(store.get(neurons.id), "llama")


BAD_GGUF = {
    "empty": b"",
    "other magic": b"GGML" + bytes(40),
    "version 1": gguf_bytes(version=1),
    "big-endian": b"GGUF" + struct.pack(">IQQ", 3, 0, 0),
    "another architecture": b"GGUF" + struct.pack("<IQQ", 3, 0, 0),
    "keys that are not there": gguf_bytes(n_keys=2**60),
    "tensors that are not there": gguf_bytes(n_tensors=2**60),
    "an array longer than the file": gguf_bytes(keys=text("a.b") + struct.pack("<IIQ", 9, 0, 2**62), n_keys=1),
    "texts longer than the file": gguf_bytes(keys=text("a.b") + struct.pack("<IIQ", 9, 8, 2**62), n_keys=1),
    "an array of arrays": gguf_bytes(keys=text("a.b") + struct.pack("<IIQ", 9, 9, 1) * 2000, n_keys=1),
    "an unknown value type": gguf_bytes(keys=text("a.b") + struct.pack("<I", 77), n_keys=1),
    "a name of 2^63 bytes": gguf_bytes(keys=struct.pack("<Q", 2**63), n_keys=1),
    "a name that is not UTF-8": gguf_bytes(keys=struct.pack("<Q", 2) + b"\xff\xfe", n_keys=1),
    "alignment 0": gguf_bytes(keys=text("general.alignment") + struct.pack("<II", 4, 0), n_keys=1),
    "layer 0": gguf_bytes(entries=entry("direction.0", 1), n_tensors=1) + bytes(200),
    "another tensor": gguf_bytes(entries=entry("token_embd.weight", 1), n_tensors=1) + bytes(200),
    "a layer twice": gguf_bytes(entries=entry("direction.1", 1) * 2, n_tensors=2) + bytes(200),
    "two dimensions": gguf_bytes(entries=entry("direction.1", 1, dims=2), n_tensors=1) + bytes(200),
    "2^32 dimensions": gguf_bytes(entries=text("direction.1") + struct.pack("<I", 2**32 - 1), n_tensors=1),
    "quantised": gguf_bytes(entries=entry("direction.1", 32, ggml_type=8), n_tensors=1) + bytes(200),
    "data past the end": gguf_bytes(entries=entry("direction.1", 1, offset=2**40), n_tensors=1) + bytes(200),
    "overlapping data": gguf_bytes(entries=b"".join(entry(f"direction.{i}", 40) for i in range(1, 9)), n_tensors=8)
    + bytes(400),
}


@pytest.mark.parametrize("data", BAD_GGUF.values(), ids=BAD_GGUF.keys())
def test_a_gguf_file_that_lies_is_malformed(data: bytes) -> None:
    with pytest.raises(MalformedFile):
        gguf_control_vector.decode(data)


@pytest.mark.parametrize("name", FORMATS)
@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 2**32), cut=st.floats(0, 1), flips=st.integers(0, 6))
def test_a_file_with_random_damage_is_decoded_or_malformed_and_nothing_else(
    name: str, seed: int, cut: float, flips: int
) -> None:
    random = np.random.default_rng(seed)
    makers = {
        "head_score_json": lambda: stored_heads(scores=torch.rand(2, 3)),
        "neuron_set_json": lambda: stored_neurons({0: [3, 1], 2: [7]}),
        "text_json_lines": stored_corpus,
        "feature_label_json": stored_labels,
    }
    artifact = makers.get(name, lambda: stored_vector({1: torch.ones(8), 2: torch.zeros(8)}))()
    data = bytearray(FORMATS[name].encode(artifact, "llama"))
    for position in random.integers(0, len(data), flips):
        data[position] = random.integers(0, 256)
    if flips < 3:
        del data[int(len(data) * cut) :]
    try:
        tensors = FORMATS[name].decode(bytes(data)).tensors
    except MalformedFile:
        tensors = {}
    # Heads that a file does not name are zeros of a tensor, so that format alone is bounded by what a model may have.
    # A document of one byte has an end and a label of eight each, and so has the name of a feature; a digit and a comma
    # are an index of eight.
    limits = {
        "head_score_json": 4 * 1024 * 1024,
        "neuron_set_json": 4 * len(data),
        "text_json_lines": 2 * len(data),
        "feature_label_json": 2 * len(data),
    }
    limit = limits.get(name, len(data))
    assert sum(t.numel() * t.element_size() for t in tensors.values()) <= limit


def test_the_sha256_of_an_exported_safetensors_file_is_the_id() -> None:
    artifact = stored_vector({0: torch.randn(5)}, description="joy", evidence={"accuracy": [0.5, 1]})
    data = FORMATS["safetensors"].encode(artifact, "llama")
    assert f"sha256:{hashlib.sha256(data).hexdigest()}" == artifact.info.id
    decoded = safetensors.decode(data)
    assert decoded.metadata == artifact.info.metadata
    assert torch.equal(decoded.tensors["layer.0"], artifact.direction(0))


def test_a_file_of_the_safetensors_library_has_tensors_and_no_metadata() -> None:
    decoded = safetensors.decode(save({"layer.2": torch.arange(3.0)}, metadata={"format": "pt"}))
    assert decoded.metadata is None
    assert decoded.tensors["layer.2"].tolist() == [0.0, 1.0, 2.0]


def header(value: bytes, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(value)) + value + data


BAD_SAFETENSORS = {
    "empty": b"",
    "a pickle": b"\x80\x04\x95" + bytes(60),
    "a header of 2^60 bytes": struct.pack("<Q", 2**60) + b"{}",
    "a header past the end": struct.pack("<Q", 100) + b"{}",
    "no JSON": header(b"not json"),
    "a list": header(b"[1,2]"),
    "deep JSON": header(b"[" * 100_000),
    "an entry without a shape": header(b'{"layer.1":{"dtype":"F32","data_offsets":[0,4]}}', bytes(4)),
    "an infinite offset": header(b'{"layer.1":{"dtype":"F32","shape":[1],"data_offsets":[0,1e999]}}', bytes(4)),
    "data past the end": header(b'{"layer.1":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', bytes(4)),
    "a size unlike the shape": header(b'{"layer.1":{"dtype":"F32","shape":[9],"data_offsets":[0,4]}}', bytes(4)),
    "an unknown type": header(b'{"layer.1":{"dtype":"F99","shape":[1],"data_offsets":[0,4]}}', bytes(4)),
    "metadata of another version": header(b'{"__metadata__":{"patchclamp":"{\\"version\\":99}"}}'),
    "metadata that is not an object": header(b'{"__metadata__":{"patchclamp":"[]"}}'),
    "metadata without a kind": header(b'{"__metadata__":{"patchclamp":"{\\"version\\":1}"}}'),
}


@pytest.mark.parametrize("data", BAD_SAFETENSORS.values(), ids=BAD_SAFETENSORS.keys())
def test_a_safetensors_file_that_lies_is_malformed(data: bytes) -> None:
    with pytest.raises(MalformedFile):
        safetensors.decode(data)


def test_published_head_scores_become_the_means_of_their_runs_in_a_table_of_layers_and_heads() -> None:
    published = b'{"1-1": [0.5, 0.0, 1.0], "0-0": [1], "0-1": [0], "1-0": [0.25]}'
    decoded = head_score_json.decode(published)
    assert decoded.tensors["scores"].tolist() == [[1.0, 0.0], [0.25, 0.5]]
    assert decoded.provenance == {"method": "imported", "format": "head_score_json", "runs": {"fewest": 1, "most": 3}}


@settings(max_examples=25, deadline=None)
@given(layers=st.integers(1, 9), heads=st.integers(1, 12), seed=st.integers(0, 999))
def test_any_head_scores_round_trip_exactly(layers: int, heads: int, seed: int) -> None:
    scores = torch.rand(layers, heads, generator=torch.Generator().manual_seed(seed))
    data = head_score_json.encode(stored_heads(scores=scores, low=scores - 1, high=scores + 1))
    assert set(json.loads(data)) == {f"{layer}-{head}" for layer in range(layers) for head in range(heads)}
    assert all(len(runs) == 1 for runs in json.loads(data).values())
    assert torch.equal(head_score_json.decode(data).tensors["scores"], scores)


def test_head_scores_hold_nothing_but_a_head_set() -> None:
    with pytest.raises(CannotExpress, match="vector"):
        head_score_json.encode(stored_vector({1: torch.ones(2)}))


BAD_HEAD_SCORES = {
    "empty": (b"", "JSON"),
    "not JSON": (b"0-0: [1]", "JSON"),
    "not UTF-8": (b'{"0-0": [1], "\xff": 1}', "JSON"),
    "deep JSON": (b"[" * 100_000, "JSON"),
    "a list": (b"[[0.5]]", "object"),
    "no heads": (b"{}", "object"),
    "a head less": (b'{"0-0": [1], "0-2": [1], "1-0": [1], "1-1": [1]}', "2 of 6 heads are missing, the first is 0-1"),
    "the first heads less": (b'{"1-1": [1]}', "3 of 4 heads are missing, the first is 0-0"),
    "a head twice": (b'{"0-0": [1], "0-0": [0]}', "twice"),
    "a head in words": (b'{"first": [1]}', "'first'"),
    "a negative layer": (b'{"-1-0": [1]}', "'-1-0'"),
    "a leading zero": (b'{"00-1": [1]}', "'00-1'"),
    "a layer that no model has": (b'{"1024-0": [1]}', "1024-0"),
    "a head that no model has": (b'{"0-999999": [1]}', "0-999999"),
    "a number instead of runs": (b'{"0-3": 0.5}', "0-3"),
    "no runs": (b'{"0-3": []}', "0-3"),
    "a text as score": (b'{"0-3": ["1"]}', "0-3"),
    "a truth as score": (b'{"0-3": [true]}', "0-3"),
    "NaN": (b'{"0-3": [NaN]}', "NaN"),
    "a score beyond float32": (b'{"0-3": [1e39]}', "0-3"),
    "a score beyond every float": (b'{"0-3": [' + b"1" * 400 + b"]}", "0-3"),
    "a score of too many digits": (b'{"0-3": [' + b"1" * 5000 + b"]}", "JSON"),
}


@pytest.mark.parametrize(("data", "message"), BAD_HEAD_SCORES.values(), ids=BAD_HEAD_SCORES.keys())
def test_a_file_of_head_scores_that_lies_is_malformed(data: bytes, message: str) -> None:
    with pytest.raises(MalformedFile, match=message):
        head_score_json.decode(data)


def test_a_file_of_head_scores_beyond_the_bound_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "scores.json"
    with path.open("wb") as file:
        file.truncate(head_score_json.MAX_FILE_BYTES + 1)
    with pytest.raises(MalformedFile, match="at most"):
        head_score_json.decode(path)


def test_neurons_go_out_as_lists_by_layer_and_come_back_in_their_order() -> None:
    artifact = stored_neurons({2: [7, 0], 0: [3]}, scores=[0.5, 0.25, 1.0], values=[20.0, -20.0, 1.0])
    data = FORMATS["neuron_set_json"].encode(artifact, "llama")
    assert json.loads(data) == {"0": [3], "2": [7, 0]}
    decoded = FORMATS["neuron_set_json"].decode(data)
    assert {name: tensor.tolist() for name, tensor in decoded.tensors.items()} == {
        "layer.0.neurons": [3],
        "layer.2.neurons": [7, 0],
    }
    assert decoded.provenance["format"] == "neuron_set_json"


@pytest.mark.parametrize(
    ("data", "named"),
    [
        (b"[]", "object"),
        (b"{}", "not empty"),
        (b'{"0": []}', "no layer has a neuron"),
        (b'{"01": [1]}', "'01'"),
        (b'{"-1": [1]}', "'-1'"),
        (b'{"0": 1}', "layer 0"),
        (b'{"3": [1.5]}', "layer 3: 1.5"),
        (b'{"3": [true]}', "layer 3: True"),
        (b'{"3": [-1]}', "layer 3: -1"),
        (b'{"3": [4294967296]}', "layer 3: 4294967296"),
        (b'{"3": [1], "3": [2]}', "'3'"),
        (b'{"3": [NaN]}', "NaN"),
    ],
)
def test_a_file_that_is_no_lists_of_neurons_is_refused_by_what_is_wrong(data: bytes, named: str) -> None:
    with pytest.raises(MalformedFile, match=re.escape(named)):
        FORMATS["neuron_set_json"].decode(data)


def test_a_vector_is_no_lists_of_neurons() -> None:
    with pytest.raises(CannotExpress, match="neuron_set"):
        FORMATS["neuron_set_json"].encode(stored_vector({1: torch.ones(2)}), "llama")

"""Head lists of others: gates of DuoAttention and lists of QRHead, as head sets of a model and back."""

import io
import json
import re

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from patchclamp_server.artifacts.formats.base import Beside, CannotExpress, Decoded, MalformedFile
from patchclamp_server.artifacts.formats.registry import FORMATS
from patchclamp_server.artifacts.head_sets import HeadSelection, select
from patchclamp_server.artifacts.store import ArtifactStore
from patchclamp_server.artifacts.types import Artifact, ArtifactKind
from patchclamp_server.errors import InvalidArgument
from patchclamp_server.model.info import ModelInfo
from patchclamp_server.model.sites import Site

DUO, QR = FORMATS["duo_attention_tsv"], FORMATS["qr_head_yaml"]
MODEL = ModelInfo(
    name="tiny",
    fingerprint="m",
    architecture="llama",
    n_layers=2,
    d_model=8,
    d_ff=24,
    n_heads=6,
    n_kv_heads=3,
    head_dim=4,
    vocab_size=100,
    context_length=64,
    dtype="float32",
    device="cpu",
    sites={Site.RESID_POST: 8},
)
SERVED = Beside(model=MODEL)


def savetxt(gates: np.ndarray) -> bytes:
    """As DuoAttention saves its gates."""
    file = io.StringIO()
    np.savetxt(file, gates, delimiter="\t")
    return file.getvalue().encode()


def stored(file: Decoded) -> Artifact:
    store = ArtifactStore("memory://imported-heads")
    info = store.put(
        ArtifactKind.HEAD_SET,
        file.tensors,
        model_fingerprint="m",
        provenance=file.provenance,
        evidence=file.evidence,
    )
    return store.get(info.id)


def scored(scores: torch.Tensor, threshold: float = 0.5) -> Artifact:
    return stored(Decoded({"scores": scores}, evidence={"threshold": threshold}))


def test_a_gate_is_the_score_of_the_query_heads_that_share_its_kv_head() -> None:
    gates = np.array([[0.25, 1.0, 0.0], [0.5, 0.75, 0.125]])
    file = DUO.decode(savetxt(gates), SERVED)
    assert np.array_equal(file.tensors["scores"].numpy(), np.repeat(gates, 2, axis=1).astype(np.float32))
    assert file.evidence == {"threshold": 0.5}
    assert file.provenance == {"method": "imported", "format": "duo_attention_tsv", "kv_heads": 3}
    assert file.warnings == ("each of the 3 gates of a layer is the score of 2 query heads",)


def test_gates_of_duo_attention_select_the_heads_from_one_half_on() -> None:
    store = ArtifactStore("memory://imported-duo")
    file = DUO.decode(savetxt(np.array([[0.25, 1.0, 0.0], [0.5, 0.0, 0.0]])), SERVED)
    store.put(ArtifactKind.HEAD_SET, file.tensors, model_fingerprint="m", evidence=file.evidence, tags=["duo"])
    heads = select(HeadSelection(head_set="duo"), store, MODEL, "heads")
    assert [tuple(head) for head in heads] == [(0, 2), (0, 3), (1, 0), (1, 1)]


def test_gates_outside_the_unit_interval_are_clipped_and_counted() -> None:
    file = DUO.decode(savetxt(np.array([[1.5, -0.25, 1.0], [0.0, 0.5, 0.5]])), SERVED)
    assert file.tensors["scores"][0].tolist() == [1.0, 1.0, 0.0, 0.0, 1.0, 1.0]
    assert file.provenance["clipped"] == 2
    assert file.warnings[0] == "2 gates outside [0, 1] were clipped"


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 999))
def test_gates_go_out_as_numpy_reads_them_and_come_back_exactly(seed: int) -> None:
    gates = torch.rand(2, 3, generator=torch.Generator().manual_seed(seed))
    data = DUO.encode(scored(gates.repeat_interleave(2, dim=1)), MODEL)
    assert np.array_equal(np.loadtxt(io.BytesIO(data), delimiter="\t").astype(np.float32), gates.numpy())
    assert data == savetxt(gates.numpy().astype(np.float64))
    assert torch.equal(DUO.decode(data, SERVED).tensors["scores"], gates.repeat_interleave(2, dim=1))


def test_heads_that_share_a_kv_head_but_no_score_have_no_gate() -> None:
    scores = torch.full((2, 6), 0.5)
    scores[1, 3] = 0.25
    with pytest.raises(CannotExpress, match="heads 2 to 3 of layer 1 share a KV head"):
        DUO.encode(scored(scores), MODEL)


def test_a_score_outside_the_unit_interval_is_no_gate() -> None:
    scores = torch.full((2, 6), 0.5)
    scores[0, 4:] = -1.0
    with pytest.raises(CannotExpress, match="head 4 of layer 0 has the score -1"):
        DUO.encode(scored(scores), MODEL)


BAD_GATES = {
    "empty": (b"", "0 lines"),
    "a layer less": (b"0\t1\t0\n", "1 lines; tiny has 2 layers"),
    "a layer more": (b"0\t1\t0\n" * 3, "line 3"),
    "as many gates as query heads": (b"0\t1\t0\t1\t0\t1\n" * 2, "line 1 has 6 gates; tiny has 3 KV heads"),
    "commas": (b"0,1,0\n0,1,0\n", "line 1 has 1 gates"),
    "a word": (b"0\tone\t0\n" * 2, "line 1, gate 1"),
    "NaN": (b"0\tnan\t0\n" * 2, "line 1, gate 1"),
    "infinity": (b"0\t1\t0\n0\t0\tinf\n", "line 2, gate 2"),
    "beyond every float": (b"0\t1e999\t0\n" * 2, "not finite"),
    "an underscore": (b"0\t1_0\t0\n" * 2, "line 1, gate 1"),
    "not ASCII": (b"0\t\xd9\xa1\t0\n" * 2, "line 1, gate 1"),
    "a blank line": (b"0\t1\t0\n\n0\t1\t0\n", "line 2 has 1 gates"),
    "a number without end": (b"0\t" + b"1" * 100 + b"\t0\n" * 2, "gate 1"),
    "a file without end": (b"0" * 100_000, "at most 432"),
}


@pytest.mark.parametrize(("data", "message"), BAD_GATES.values(), ids=BAD_GATES.keys())
def test_a_file_of_gates_that_lies_is_malformed(data: bytes, message: str) -> None:
    with pytest.raises(MalformedFile, match=message):
        DUO.decode(data, SERVED)


PUBLISHED = b"""# Default configuration

attn_head_set: "1-5,0-3,1-0,0-0" # top4
model_base_class: "Tiny-Instruct"
model_name_or_path: "lab/Tiny-Instruct\""""


def test_a_list_of_qr_head_becomes_scores_that_keep_its_order() -> None:
    file = QR.decode(PUBLISHED, SERVED)
    scores = file.tensors["scores"]
    assert [scores[place].item() for place in ((1, 5), (0, 3), (1, 0), (0, 0))] == [1.0, 0.75, 0.5, 0.25]
    assert int((scores > 0).sum()) == 4
    assert scores.shape == (2, 6)
    assert file.provenance == {
        "method": "imported",
        "format": "qr_head_yaml",
        "listed": 4,
        "model_base_class": "Tiny-Instruct",
        "model_name_or_path": "lab/Tiny-Instruct",
    }
    assert file.warnings == ("scores are places in the list, not measurements",)


@pytest.mark.parametrize("count", range(1, 13))
def test_the_threshold_of_a_list_selects_the_list_in_its_order(count: int) -> None:
    order = [divmod(head, 6) for head in np.random.default_rng(count).permutation(12)[:count].tolist()]
    store = ArtifactStore("memory://imported-qr")
    file = QR.decode(f'attn_head_set: "{",".join(f"{layer}-{head}" for layer, head in order)}"'.encode(), SERVED)
    store.put(
        ArtifactKind.HEAD_SET,
        file.tensors,
        model_fingerprint="m",
        evidence=file.evidence,
        tags=[f"list-{count}"],
    )
    heads = select(HeadSelection(head_set=f"list-{count}"), store, MODEL, "heads")
    assert [tuple(head) for head in heads] == order


def test_full_heads_are_all_heads_of_the_model() -> None:
    file = QR.decode(b'attn_head_set: "full_heads"', SERVED)
    assert bool((file.tensors["scores"] == 1).all())
    assert file.evidence == {"threshold": 1.0}


def test_a_list_goes_out_as_yaml_reads_it_and_comes_back_the_same() -> None:
    data = QR.encode(stored(QR.decode(PUBLISHED, SERVED)), MODEL)
    assert yaml.safe_load(data) == yaml.safe_load(PUBLISHED)
    again = QR.decode(data, SERVED)
    assert torch.equal(again.tensors["scores"], QR.decode(PUBLISHED, SERVED).tensors["scores"])


def test_measured_scores_go_out_as_the_list_of_those_from_the_threshold_best_first() -> None:
    scores = torch.zeros(2, 6)
    scores[0, 1], scores[1, 2], scores[1, 4] = 0.3, 0.9, 0.29
    listed = yaml.safe_load(QR.encode(scored(scores, 0.3), MODEL))
    assert listed == {"attn_head_set": "1-2,0-1", "model_base_class": "tiny", "model_name_or_path": "tiny"}


def test_a_set_without_a_head_above_its_threshold_is_no_list() -> None:
    with pytest.raises(CannotExpress, match=r"no head reaches the threshold of the set, 0\.5"):
        QR.encode(scored(torch.zeros(2, 6)), MODEL)


@pytest.mark.parametrize("format", [DUO, QR], ids=lambda format: format.name)
def test_what_is_no_head_set_has_no_list_of_heads(format: object) -> None:
    store = ArtifactStore("memory://imported-heads")
    vector = store.put(ArtifactKind.VECTOR, {"layer.1": torch.ones(2)}, model_fingerprint="m", site=Site.RESID_POST)
    with pytest.raises(CannotExpress, match="not a vector"):
        format.encode(store.get(vector.id), MODEL)  # type: ignore[attr-defined]


@pytest.mark.parametrize(("format", "data"), [(DUO, b"1\t1\t1\n" * 2), (QR, PUBLISHED)], ids=["gates", "list"])
def test_heads_of_a_model_that_the_server_does_not_know_are_refused(format: object, data: bytes) -> None:
    with pytest.raises(InvalidArgument, match="of the served model alone") as caught:
        format.decode(data)  # type: ignore[attr-defined]
    assert caught.value.field == "model_fingerprint"


ALIASES = b"a: &a [x, x]\nb: &b [*a, *a]\nattn_head_set: *b\n"
BAD_LISTS = {
    "empty": (b"", "not a mapping"),
    "no YAML": (b'attn_head_set: "', "not YAML"),
    "a list": (b"- 0-1\n", "not a mapping"),
    "a text": (b"0-1", "not a mapping"),
    "no list of heads": (b"heads: 0-1", "attn_head_set"),
    "a list of pairs": (b"attn_head_set: [[0, 1]]", "line 1"),
    "a nested mapping": (b"x:\n  y: 1\nattn_head_set: 0-1", "line 2"),
    "aliases that grow": (ALIASES, "line 1"),
    "an anchor": (b"attn_head_set: &a 0-1", "anchor"),
    "an alias": (b"attn_head_set: *a", "line 1"),
    "a merge": (b"<<: {a: b}\nattn_head_set: 0-1", "line 1"),
    "a tag that calls": (b"!!python/object/apply:os.mkdir ['made']", "not a mapping"),
    "a mapping that calls": (b"!!python/object:os.x {attn_head_set: 0-1}", "not a mapping"),
    "a tagged text": (b"attn_head_set: !!python/name:os.system 0-1", "tag"),
    "two documents": (b"attn_head_set: 0-1\n---\nattn_head_set: 0-2\n", "more than one document"),
    "a name twice": (b"attn_head_set: 0-1\nattn_head_set: 0-2\n", "'attn_head_set' is there twice"),
    "no head": (b'attn_head_set: ""', "'' is not a head"),
    "a word": (b'attn_head_set: "0-1,top"', "'top' is not a head"),
    "a leading zero": (b'attn_head_set: "00-1"', "'00-1'"),
    "a head twice": (b'attn_head_set: "0-1,0-1"', "0-1 is there twice"),
    "a layer that the model lacks": (b'attn_head_set: "2-0"', "tiny has layers 0 to 1 of heads 0 to 5"),
    "a head that the model lacks": (b'attn_head_set: "0-6"', "0-6"),
    "deep": (b"[" * 100_000, "not a mapping"),
    "deep inside": (b"a: " + b"[" * 100_000, "line 1"),
    "not UTF-8": (b'attn_head_set: "\xff"', "not YAML"),
    "a control character": (b'attn_head_set: "\x07"', "not YAML"),
    "an escape beyond Unicode": (b'attn_head_set: "\\UFFFFFFFF"', "not YAML"),
    "a file without end": (b"#" * (256 * 1024 + 1), "at most"),
}


@pytest.mark.parametrize(("data", "message"), BAD_LISTS.values(), ids=BAD_LISTS.keys())
def test_a_list_of_heads_that_lies_is_malformed(data: bytes, message: str) -> None:
    with pytest.raises(MalformedFile, match=re.escape(message)):
        QR.decode(data, SERVED)


def test_names_of_a_model_with_quotes_stay_what_they_are() -> None:
    named = stored(
        Decoded(
            {"scores": torch.ones(2, 6)},
            provenance={"model_base_class": 'a "b"\n: ü', "model_name_or_path": "plain"},
            evidence={"threshold": 1.0},
        )
    )
    data = QR.encode(named, MODEL)
    assert yaml.safe_load(data)["model_base_class"] == 'a "b"\n: ü'
    assert json.dumps('a "b"\n: ü') in data.decode()

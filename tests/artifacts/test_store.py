"""The content-addressed store: identity, integrity, tags, pages, crashes."""

import errno
import json
import math
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import fsspec
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import given, settings
from hypothesis import strategies as st

from patchclamp_server.artifacts.store import ArtifactStore
from patchclamp_server.artifacts.types import ArtifactInfo, ArtifactKind, Tags
from patchclamp_server.errors import AlreadyExists, FailedPrecondition, InvalidArgument, NotFound, ResourceExhausted
from patchclamp_server.model.sites import Site

VECTOR, NEURON_SET = ArtifactKind.VECTOR, ArtifactKind.NEURON_SET
PROFILE, HEAD_SET = ArtifactKind.SPARSITY_PROFILE, ArtifactKind.HEAD_SET


def put_vector(store: ArtifactStore, value: float = 1.0, **kwargs: object) -> ArtifactInfo:
    tensors = {"layer.3": torch.full((5,), value), "layer.11": torch.arange(5.0)}
    arguments = {"model_fingerprint": "model-a", "site": Site.RESID_POST} | kwargs
    return store.put(VECTOR, tensors, **arguments)  # type: ignore[arg-type]


def object_file(root: Path, info: ArtifactInfo) -> Path:
    digest = info.id.removeprefix("sha256:")
    return root / "objects" / digest[:2] / f"{digest[2:]}.safetensors"


@pytest.fixture(params=["directory", "memory"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "store") if request.param == "directory" else f"memory://{tmp_path.name}-{id(request)}"


def test_a_vector_comes_back_as_it_was_put_from_a_new_store_on_the_same_url(url: str) -> None:
    info = put_vector(ArtifactStore(url), description="joy", provenance={"seed": 3}, evidence={"accuracy": 0.9})
    artifact = ArtifactStore(url).get(info.id)
    assert torch.equal(artifact.direction(11), torch.arange(5.0))
    assert artifact.info == info
    assert (info.layers, info.width, info.site, info.kind) == ((3, 11), 5, Site.RESID_POST, VECTOR)
    assert (info.description, info.provenance, info.evidence) == ("joy", {"seed": 3}, {"accuracy": 0.9})
    assert info.created > 0


def test_a_neuron_set_comes_back_with_and_without_values(url: str) -> None:
    store = ArtifactStore(url)
    tensors = {
        "layer.0.neurons": torch.tensor([7, 2]),
        "layer.0.values": torch.tensor([0.5, -1.0]),
        "layer.4.neurons": torch.tensor([0]),
    }
    artifact = store.get(store.put(NEURON_SET, tensors, model_fingerprint="m").id)
    neurons, values = artifact.neurons(0)
    assert neurons.tolist() == [7, 2]
    assert values is not None
    assert values.tolist() == [0.5, -1.0]
    assert artifact.neurons(4)[1] is None
    assert artifact.info.site is None


def test_a_sparsity_profile_comes_back_with_tensors_of_any_name_and_shape(url: str) -> None:
    tensors = {
        "gate_error.3": torch.rand(2, 5),
        "quantiles.attn_output": torch.rand(7),
        "counts": ints(3, 1, 2).view(1, 3, 1),
        "cluster_layer": torch.tensor(4),
    }
    provenance = {"policy": "fovea", "parameters": {"keep_ratio": 0.5}}
    store = ArtifactStore(url)
    info = store.put(PROFILE, tensors, model_fingerprint="m", provenance=provenance, evidence={"divergence": 0.1})
    artifact = ArtifactStore(url).get(info.id)
    loaded = artifact.profile_tensors()
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)
    assert (info.layers, info.width, info.site) == ((), 0, None)
    assert (info.provenance, info.evidence) == (provenance, {"divergence": 0.1})


def test_a_head_set_comes_back_with_and_without_intervals(url: str) -> None:
    store, scores = ArtifactStore(url), torch.rand(3, 4)
    bare = store.get(store.put(HEAD_SET, {"scores": scores}, model_fingerprint="m").id)
    assert bare.head_scores()[1:] == (None, None)
    tensors = {"scores": scores, "low": scores - 0.1, "high": scores + 0.1}
    info = store.put(HEAD_SET, tensors, model_fingerprint="m", evidence={"threshold": 0.1})
    for loaded, stored in zip(store.get(info.id).head_scores(), tensors.values(), strict=True):
        assert torch.equal(loaded, stored)
    assert (info.layers, info.width, info.site) == ((0, 1, 2), 4, None)


def test_an_artifact_is_not_read_as_another_kind(url: str) -> None:
    store = ArtifactStore(url)
    vector = store.get(put_vector(store).id)
    heads = store.get(store.put(HEAD_SET, {"scores": F(2, 2)}, model_fingerprint="m").id)
    for read in (vector.head_scores, vector.profile_tensors, heads.profile_tensors, lambda: heads.direction(1)):
        with pytest.raises(FailedPrecondition):
            read()
    with pytest.raises(FailedPrecondition) as refusal:
        heads.only([0])
    assert refusal.value.field == "layers"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_element_type_is_kept(url: str, dtype: torch.dtype) -> None:
    store = ArtifactStore(url)
    vector = torch.linspace(-2, 2, 7).to(dtype)
    info = store.put(VECTOR, {"layer.0": vector}, model_fingerprint="m", site=Site.MLP_OUT)
    loaded = ArtifactStore(url).get(info.id).direction(0)
    assert loaded.dtype == dtype
    assert torch.equal(loaded, vector)


def test_equal_content_has_one_id_and_is_stored_once_whatever_its_tags(url: str) -> None:
    store = ArtifactStore(url)
    first = put_vector(store, provenance={"a": 1, "b": [2.0]}, tags=["x"])
    second = put_vector(store, provenance={"b": (2,), "a": 1.0}, tags=["y"])
    assert first.id == second.id
    assert second.tags == ("x", "y")
    assert len(store.list()[0]) == 1


def test_a_second_put_of_equal_content_does_not_write_the_object_again(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    path = object_file(tmp_path, put_vector(store))
    inode = path.stat().st_ino
    put_vector(store, tags=["joy"])
    assert path.stat().st_ino == inode


def test_the_id_does_not_depend_on_strides(url: str) -> None:
    store = ArtifactStore(url)
    strided = torch.arange(10.0).reshape(5, 2)[:, 0]
    ids = {
        store.put(VECTOR, {"layer.0": v}, model_fingerprint="m", site=Site.RESID_PRE).id
        for v in (strided, strided.clone())
    }
    assert len(ids) == 1


@pytest.mark.parametrize(
    "change",
    [
        {"description": "other"},
        {"model_fingerprint": "model-b"},
        {"site": Site.RESID_MID},
        {"provenance": {"seed": 1}},
        {"evidence": {"accuracy": 1}},
        {"value": 2.0},
    ],
    ids=lambda change: next(iter(change)),
)
def test_whatever_is_stored_changes_the_id(tmp_path: Path, change: dict[str, object]) -> None:
    store = ArtifactStore(tmp_path)
    assert put_vector(store).id != put_vector(store, **change).id  # type: ignore[arg-type]


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False, min_value=-1e300, max_value=1e300)
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("abc.é", max_size=4), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=50, deadline=None)
@given(
    layers=st.sets(st.integers(0, 200), min_size=1, max_size=5),
    width=st.integers(1, 9),
    seed=st.integers(0, 2**31),
    evidence=st.dictionaries(st.text("xyz", max_size=4), JSON, max_size=3),
)
def test_any_vector_and_evidence_round_trip(
    layers: set[int], width: int, seed: int, evidence: dict[str, object]
) -> None:
    generator = torch.Generator().manual_seed(seed)
    tensors = {f"layer.{layer}": torch.randn(width, generator=generator) for layer in layers}
    store = ArtifactStore("memory://round-trip")
    info = store.put(VECTOR, tensors, model_fingerprint="m", site=Site.RESID_POST, evidence=evidence)
    artifact = ArtifactStore("memory://round-trip").get(info.id)
    assert artifact.tensors.keys() == tensors.keys()
    assert all(torch.equal(artifact.tensors[name], tensors[name]) for name in tensors)
    assert artifact.info.evidence == evidence
    assert artifact.info.layers == tuple(sorted(layers))


F = torch.ones


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64)


BAD_CONTENT = {
    "no layer": (VECTOR, {}, "at least one layer"),
    "unknown name": (VECTOR, {"weights": F(3)}, "weights"),
    "leading zero": (VECTOR, {"layer.01": F(3)}, "layer.01"),
    "two dimensions": (VECTOR, {"layer.1": F(1, 3)}, "layer.1"),
    "empty": (VECTOR, {"layer.1": F(0)}, "layer.1"),
    "integers": (VECTOR, {"layer.1": ints(1, 2)}, "int64"),
    "unequal widths": (VECTOR, {"layer.1": F(3), "layer.2": F(4)}, "layer.2 has width 4"),
    "NaN": (VECTOR, {"layer.1": F(3), "layer.2": torch.tensor([1, math.nan, 1])}, "layer.2 holds NaN or Inf"),
    "Inf": (VECTOR, {"layer.9": torch.tensor([math.inf])}, "layer.9 holds NaN or Inf"),
    "beyond float32": (VECTOR, {"layer.1": torch.tensor([1e39], dtype=torch.float64)}, "beyond the largest float32"),
    "values alone": (NEURON_SET, {"layer.1.values": F(2)}, "layer.1.neurons"),
    "floats as neurons": (NEURON_SET, {"layer.1.neurons": F(2)}, "int64"),
    "int32 neurons": (NEURON_SET, {"layer.1.neurons": ints(1).int()}, "int64"),
    "no neuron": (NEURON_SET, {"layer.1.neurons": ints()}, "n >= 1"),
    "negative neuron": (NEURON_SET, {"layer.1.neurons": ints(3, -1)}, "negative index -1"),
    "doubled neuron": (NEURON_SET, {"layer.1.neurons": ints(3, 3)}, "twice"),
    "too few values": (NEURON_SET, {"layer.1.neurons": ints(3, 4), "layer.1.values": F(1)}, "1 values for 2 neurons"),
    "NaN value": (
        NEURON_SET,
        {"layer.1.neurons": ints(3), "layer.1.values": torch.tensor([math.nan])},
        "layer.1.values holds NaN or Inf",
    ),
    "vector as neuron set": (NEURON_SET, {"layer.1": F(3)}, "layer.<l>.neurons"),
    "no tensor of a profile": (PROFILE, {}, "1 to 1024"),
    "too many of them": (PROFILE, {f"t{i}": F(1) for i in range(1025)}, "1 to 1024"),
    "a name that is a path": (PROFILE, {"../x": F(1)}, "../x"),
    "a name without end": (PROFILE, {"x" * 129: F(1)}, "xxx"),
    "too many dimensions": (PROFILE, {"x": torch.ones((1,) * 9)}, "9 dimensions"),
    "int32 in a profile": (PROFILE, {"x": ints(1).int()}, "x must be float32 or int64"),
    "truths in a profile": (PROFILE, {"x": F(2).bool()}, "x must be float32 or int64"),
    "doubles in a profile": (PROFILE, {"x": F(2).double()}, "x must be float32 or int64"),
    "nothing in a tensor": (PROFILE, {"x": F(0, 3)}, "at least one number"),
    "NaN in a profile": (PROFILE, {"x": F(1), "y": torch.tensor(math.nan)}, "y holds NaN or Inf"),
    "heads without scores": (HEAD_SET, {"low": F(2, 2)}, "needs scores"),
    "heads with something else": (HEAD_SET, {"scores": F(2, 2), "mean": F(2, 2)}, "'mean'"),
    "heads in one row": (HEAD_SET, {"scores": F(2)}, "[n_layers, n_heads]"),
    "heads that no model has": (HEAD_SET, {"scores": F(1, 1025)}, "[n_layers, n_heads]"),
    "intervals of other heads": (HEAD_SET, {"scores": F(2, 2), "low": F(2, 3)}, "low has the shape [2, 3]"),
    "heads in half precision": (HEAD_SET, {"scores": F(2, 2).half()}, "scores must be float32"),
    "heads with Inf": (HEAD_SET, {"scores": F(2, 2), "high": F(2, 2) * math.inf}, "high holds NaN or Inf"),
    "an interval upside down": (
        HEAD_SET,
        {"scores": F(1, 2), "low": F(1, 2), "high": F(1, 2) - 1},
        "low is above high",
    ),
}


@pytest.mark.parametrize(("kind", "tensors", "message"), BAD_CONTENT.values(), ids=BAD_CONTENT.keys())
def test_bad_tensors_are_refused_by_name_and_nothing_is_stored(
    tmp_path: Path, kind: ArtifactKind, tensors: dict[str, torch.Tensor], message: str
) -> None:
    store = ArtifactStore(tmp_path)
    site = Site.RESID_POST if kind is VECTOR else None
    provenance = {"policy": "griffin"} if kind is PROFILE else {}
    with pytest.raises(InvalidArgument) as refusal:
        store.put(kind, tensors, model_fingerprint="m", site=site, provenance=provenance)
    assert refusal.value.field == "tensors"
    assert message in refusal.value.message
    assert store.list() == ([], "")


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"site": None}, "site"),
        ({"model_fingerprint": ""}, "model_fingerprint"),
        ({"provenance": {"loss": math.nan}}, "provenance.loss"),
        ({"provenance": {"steps": [1, math.inf]}}, "provenance.steps[1]"),
        ({"evidence": {"norm": torch.ones(1)}}, "evidence.norm"),
        ({"evidence": {3: "x"}}, "evidence"),
        ({"evidence": {"big": 10**400}}, "evidence.big"),
        ({"description": "\ud800"}, "description"),
        ({"description": "x" * 300_000}, "description"),
        ({"tags": ["fine", "../up"]}, "tags[1]"),
    ],
)
def test_bad_metadata_is_refused_with_its_field(tmp_path: Path, change: dict[str, object], field: str) -> None:
    store = ArtifactStore(tmp_path)
    with pytest.raises(InvalidArgument) as refusal:
        put_vector(store, **change)  # type: ignore[arg-type]
    assert refusal.value.field == field
    assert store.list() == ([], "")


@pytest.mark.parametrize("provenance", [{}, {"policy": ""}, {"policy": 3}, {"policy": {"name": "teal"}}])
def test_a_profile_that_does_not_name_its_policy_is_refused(tmp_path: Path, provenance: dict[str, object]) -> None:
    with pytest.raises(InvalidArgument) as refusal:
        ArtifactStore(tmp_path).put(PROFILE, {"x": F(1)}, model_fingerprint="m", provenance=provenance)
    assert refusal.value.field == "provenance.policy"


@pytest.mark.parametrize("kind", [PROFILE, HEAD_SET])
def test_only_what_belongs_to_a_site_has_one(tmp_path: Path, kind: ArtifactKind) -> None:
    store, provenance = ArtifactStore(tmp_path), {"policy": "teal"}
    with pytest.raises(InvalidArgument) as refusal:
        store.put(kind, {"scores": F(1, 1)}, model_fingerprint="m", site=Site.MLP_POST, provenance=provenance)
    assert refusal.value.field == "site"


def test_a_tag_can_be_used_in_place_of_the_id_and_moves_where_that_is_asked_for(url: str) -> None:
    store = ArtifactStore(url)
    first, second = put_vector(store, 1.0, tags=["joy"]), put_vector(store, 2.0)
    assert store.get("joy").info.id == first.id
    moved = store.tag("joy", second.id, replace_tag=True)
    assert (moved.tags, moved.replaced) == (("joy",), {"joy": first.id})
    assert store.get("joy").info.id == second.id
    assert store.info(first.id).tags == ()
    again = store.tag("happy", "joy")
    assert (again.tags, again.replaced) == (("happy", "joy"), {})


def test_a_tag_that_names_another_artifact_is_not_taken_from_it(url: str) -> None:
    store = ArtifactStore(url)
    first, second = put_vector(store, 1.0, tags=["joy"]), put_vector(store, 2.0)
    for take, path in (
        (lambda: store.tag("joy", second.id), "tag"),
        (lambda: put_vector(store, 3.0, tags=["new", "joy"]), "tags[1]"),
        (lambda: store.check_tags(Tags(("joy",))), "tags[0]"),
    ):
        with pytest.raises(AlreadyExists, match=first.id) as refused:
            take()
        assert refused.value.field == path
    assert store.info("joy").id == first.id
    # Nothing of the refused put was stored.
    assert {i.id for i in store.list()[0]} == {first.id, second.id}


def test_more_tags_at_once_than_anybody_reads_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument) as refusal:
        put_vector(ArtifactStore(tmp_path), 1.0, tags=[f"t{i}" for i in range(65)])
    assert refusal.value.field == "tags"


def test_the_artifact_that_a_put_replaces_is_told(url: str) -> None:
    store = ArtifactStore(url)
    first = put_vector(store, 1.0, tags=["joy"])
    second = put_vector(store, 2.0, tags=Tags(("joy", "new"), replace=True))
    assert (second.tags, second.replaced) == (("joy", "new"), {"joy": first.id})
    # The same content under the same tag takes nothing from anybody.
    assert put_vector(store, 2.0, tags=["joy"]).replaced == {}


def test_a_tag_whose_object_a_crash_has_lost_is_free(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    object_file(tmp_path, put_vector(store, 1.0, tags=["joy"])).unlink()
    assert put_vector(store, 2.0, tags=["joy"]).tags == ("joy",)


def test_an_untagged_artifact_stays_and_its_tag_is_unknown(url: str) -> None:
    store = ArtifactStore(url)
    info = put_vector(store, tags=["joy"])
    assert store.untag("joy") == info.id
    with pytest.raises(NotFound):
        store.get("joy")
    with pytest.raises(NotFound):
        store.untag("joy")
    assert store.get(info.id).info.id == info.id


@pytest.mark.parametrize("tag", ["", ".", "..", "../x", "a/b", "a\\b", "-a", ".a", "a b", "a\n", "é", "a" * 129, "a:b"])
def test_a_tag_that_could_be_a_path_is_refused(tmp_path: Path, tag: str) -> None:
    store = ArtifactStore(tmp_path / "store")
    info = put_vector(store)
    before = sorted(tmp_path.rglob("*"))
    for call in (lambda: store.tag(tag, info.id), lambda: store.get(tag), lambda: store.untag(tag)):
        with pytest.raises(InvalidArgument):
            call()
    assert sorted(tmp_path.rglob("*")) == before


def test_an_id_prefix_or_an_unknown_ref_is_no_artifact(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    info = put_vector(store)
    for ref in (info.id[:20], info.id.upper().replace("SHA256", "sha256"), info.id + "0"):
        with pytest.raises(InvalidArgument):
            store.get(ref)
    for ref in ("sha256:" + "0" * 64, info.id.removeprefix("sha256:"), "no-such-tag"):
        with pytest.raises(NotFound):
            store.get(ref)


def test_an_artifact_is_not_deleted_by_one_of_several_tags(url: str) -> None:
    store = ArtifactStore(url)
    info = put_vector(store, tags=["a", "b"])
    with pytest.raises(FailedPrecondition, match=f"also tagged 'b'.*{info.id}"):
        store.delete("a")
    assert store.info("a").tags == ("a", "b")
    store.untag("b")
    assert store.delete("a") == (info.id, ("a",))


def test_delete_by_id_removes_the_artifact_and_every_tag_of_it(url: str) -> None:
    store = ArtifactStore(url)
    info, other = put_vector(store, tags=["a", "b"]), put_vector(store, 2.0, tags=["c"])
    store.get(info.id)
    assert store.delete(info.id) == (info.id, ("a", "b"))
    for ref in (info.id, "a", "b"):
        with pytest.raises(NotFound):
            store.get(ref)
        with pytest.raises(NotFound):
            store.delete(ref)
    assert [i.id for i in store.list()[0]] == [other.id]


def test_an_artifact_that_was_deleted_can_be_put_again(url: str) -> None:
    store = ArtifactStore(url)
    info = put_vector(store)
    store.delete(info.id)
    assert put_vector(store).id == info.id
    assert store.get(info.id).direction(3).tolist() == [1.0] * 5


@pytest.mark.parametrize("damage", ["flipped", "truncated", "empty", "header"])
def test_damaged_bytes_are_an_error_and_never_numbers(tmp_path: Path, damage: str) -> None:
    info = put_vector(ArtifactStore(tmp_path), tags=["joy"])
    path = object_file(tmp_path, info)
    data = bytearray(path.read_bytes())
    if damage == "flipped":
        data[-3] ^= 1
    elif damage == "header":
        data[8:40] = os.urandom(32)
    path.write_bytes({"truncated": data[:-4], "empty": b""}.get(damage, bytes(data)))
    store = ArtifactStore(tmp_path)
    with pytest.raises(FailedPrecondition, match="damaged"):
        store.get("joy")
    assert store.damaged == {info.id}


def test_damaged_objects_are_left_out_of_listings_and_mended_by_a_new_put(tmp_path: Path) -> None:
    info, other = put_vector(ArtifactStore(tmp_path)), put_vector(ArtifactStore(tmp_path), 2.0)
    path = object_file(tmp_path, info)
    path.write_bytes(path.read_bytes()[:-1])
    store = ArtifactStore(tmp_path)
    assert [i.id for i in store.list()[0]] == [other.id]
    put_vector(store)
    assert len(store.list()[0]) == 2
    assert store.get(info.id).direction(3).tolist() == [1.0] * 5
    assert store.damaged == frozenset()


def test_a_damaged_tag_is_an_error_and_can_be_set_again(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    info = put_vector(store, tags=["joy"])
    (tmp_path / "tags" / "joy").write_bytes(b"sha256:\xff")
    with pytest.raises(FailedPrecondition):
        store.get("joy")
    store.tag("joy", info.id)
    assert store.info("joy").tags == ("joy",)


@pytest.mark.parametrize("page_size", [1, 3, 7, 8])
def test_pages_show_every_artifact_once_in_one_order(url: str, page_size: int) -> None:
    store = ArtifactStore(url)
    ids = sorted(put_vector(store, float(i)).id for i in range(7))
    seen, token = [], ""
    while True:
        page, token = store.list(page_size=page_size, page_token=token)
        assert len(page) <= page_size
        seen += [i.id for i in page]
        if not token:
            break
    assert seen == ids


def test_a_page_token_survives_changes_of_the_store(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    ids = sorted(put_vector(store, float(i)).id for i in range(5))
    _, token = store.list(page_size=2)
    store.delete(ids[1])
    rest, end = ArtifactStore(tmp_path).list(page_token=token)
    assert [i.id for i in rest] == ids[2:]
    assert end == ""


def test_listings_filter_by_kind_and_model(url: str) -> None:
    store = ArtifactStore(url)
    a, b = put_vector(store), put_vector(store, model_fingerprint="model-b")
    neurons = store.put(NEURON_SET, {"layer.0.neurons": torch.tensor([1])}, model_fingerprint="model-b")
    assert {i.id for i in store.list(VECTOR)[0]} == {a.id, b.id}
    assert {i.id for i in store.list(model_fingerprint="model-b")[0]} == {b.id, neurons.id}
    assert [i.id for i in store.list(NEURON_SET, "model-a")[0]] == []


@pytest.mark.parametrize("token", ["x", "!!!!", "bnVsbA==", "W10=", "é", "WzEsMl0="])
def test_a_made_up_page_token_is_refused(tmp_path: Path, token: str) -> None:
    with pytest.raises(InvalidArgument) as refusal:
        ArtifactStore(tmp_path).list(page_token=token)
    assert refusal.value.field == "page_token"


def test_a_page_token_of_another_query_and_a_bad_page_size_are_refused(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    for i in range(3):
        put_vector(store, float(i))
    _, token = store.list(page_size=1)
    with pytest.raises(InvalidArgument, match="other filters"):
        store.list(VECTOR, page_token=token)
    for size in (0, -1, 1001):
        with pytest.raises(InvalidArgument, match="page_size"):
            store.list(page_size=size)


def test_a_page_ends_before_its_metadata_pass_the_size_of_a_message(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    for i in range(3):
        put_vector(store, float(i), description="x" * 200_000)
    page, token = store.list()
    assert len(page) == 2
    assert len(store.list(page_token=token)[0]) == 1


def test_the_cache_keeps_what_fits_and_drops_the_least_recently_used(tmp_path: Path) -> None:
    size = put_vector(ArtifactStore(tmp_path)).size_bytes
    store = ArtifactStore(tmp_path, cache_bytes=2 * size)
    a, b, c = (put_vector(store, float(i)).id for i in range(3))
    kept, dropped = store.get(a), store.get(b)
    assert store.get(a) is kept
    store.get(c)
    assert store.get(a) is kept
    assert store.get(b) is not dropped


def test_threads_that_put_tag_list_and_delete_at_once_leave_a_consistent_store(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    failures: list[BaseException] = []

    def work(worker: int) -> None:
        try:
            for i in range(8):
                info = put_vector(store, float(i), tags=Tags((f"tag-{i}",), replace=True))
                store.list()
                store.tag(f"worker-{worker}", info.id, replace_tag=True)
                if i % 4 == 3:
                    store.delete(info.id)
        except NotFound:
            # Another worker deleted the artifact first: a correct answer.
            return
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(w,)) for w in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    fresh = ArtifactStore(tmp_path)
    for info in fresh.list()[0]:
        assert fresh.get(info.id).info.id == info.id
        assert all(fresh.get(tag).info.id == info.id for tag in info.tags)
    stored_tags = {p.name for p in (tmp_path / "tags").iterdir()}
    assert stored_tags == {tag for info in fresh.list()[0] for tag in info.tags}
    assert list((tmp_path / "tmp").iterdir()) == []


KILLED_AT_AN_EVENT = """
import os, signal, sys, torch
from patchclamp_server.artifacts.store import ArtifactStore
from patchclamp_server.artifacts.types import ArtifactKind, Tags
from patchclamp_server.interventions.program import Site

store = ArtifactStore(sys.argv[1])
wanted = sys.argv[2]

def stop(event, arguments):
    if event == wanted and "/tmp/" in str(arguments[0]) + "/":
        os.write(1, b"!")
        signal.pause()

sys.addaudithook(stop)
store.put(ArtifactKind.VECTOR, {"layer.0": torch.ones(1000)}, model_fingerprint="m", site=Site.RESID_POST,
          tags=Tags(("new",), replace=True))
"""
KILLED_IN_A_LOOP = """
import itertools, os, sys, torch
from patchclamp_server.artifacts.store import ArtifactStore
from patchclamp_server.artifacts.types import ArtifactKind, Tags
from patchclamp_server.interventions.program import Site

store = ArtifactStore(sys.argv[1])
for i in itertools.count():
    tensors = {"layer.0": torch.full((50_000,), float(i))}
    tags = Tags(("last",), replace=True)
    info = store.put(ArtifactKind.VECTOR, tensors, model_fingerprint="m", site=Site.RESID_POST, tags=tags)
    os.write(1, (info.id + "\\n").encode())
"""


def start(script: str, *arguments: str) -> subprocess.Popen[bytes]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen(
        [sys.executable, "-c", script, *arguments], stdout=subprocess.PIPE, env=environment, bufsize=0
    )


@pytest.mark.parametrize("event", ["open", "os.rename"])
def test_a_put_that_is_killed_before_its_object_has_its_name_shows_nothing(tmp_path: Path, event: str) -> None:
    other = put_vector(ArtifactStore(tmp_path), tags=["new"])
    with start(KILLED_AT_AN_EVENT, str(tmp_path), event) as child:
        assert child.stdout is not None
        assert child.stdout.read(1) == b"!"
        child.kill()
        assert child.wait() == -signal.SIGKILL
    store = ArtifactStore(tmp_path)
    assert [i.id for i in store.list()[0]] == [other.id]
    assert store.info("new").id == other.id
    # The object and its tag have both found room by then.
    assert len(list((tmp_path / "tmp").iterdir())) == (2 if event == "os.rename" else 0)


KILLED_BETWEEN_NAMES = """
import os, signal, sys, torch
from patchclamp_server.artifacts.store import ArtifactStore
from patchclamp_server.artifacts.types import ArtifactKind, Tags
from patchclamp_server.interventions.program import Site

store = ArtifactStore(sys.argv[1])
wanted, seen = sys.argv[2], 0

def stop(event, arguments):
    global seen
    if event == wanted and any(name in str(path) for path in arguments for name in ("/objects/", "/tags/")):
        seen += 1
        if seen == 2:
            os.write(1, b"!")
            signal.pause()

def put():
    return store.put(ArtifactKind.VECTOR, {"layer.0": torch.ones(1000)}, model_fingerprint="m", site=Site.RESID_POST,
                     tags=Tags(("new",), replace=True))

if wanted == "os.remove":
    info = put()
sys.addaudithook(stop)
store.delete(info.id) if wanted == "os.remove" else put()
"""


@pytest.mark.parametrize("event", ["os.rename", "os.remove"], ids=["put", "delete"])
def test_a_kill_between_two_names_leaves_an_object_without_a_tag_and_no_tag_without_its_object(
    tmp_path: Path, event: str
) -> None:
    with start(KILLED_BETWEEN_NAMES, str(tmp_path), event) as child:
        assert child.stdout is not None
        assert child.stdout.read(1) == b"!"
        child.kill()
        assert child.wait() == -signal.SIGKILL
    store = ArtifactStore(tmp_path)
    (info,) = store.list()[0]
    assert info.tags == ()
    assert store.get(info.id).direction(0).tolist() == [1.0] * 1000
    with pytest.raises(NotFound):
        store.info("new")


def test_everything_acknowledged_before_a_kill_is_there_and_whole(tmp_path: Path) -> None:
    with start(KILLED_IN_A_LOOP, str(tmp_path)) as child:
        assert child.stdout is not None
        acknowledged = [child.stdout.readline().decode().strip() for _ in range(5)]
        child.kill()
        assert child.wait() == -signal.SIGKILL
    store = ArtifactStore(tmp_path)
    listed = [i.id for i in store.list()[0]]
    assert set(acknowledged) <= set(listed)
    assert all(store.get(i).direction(0).unique().numel() == 1 for i in [*listed, "last"])
    assert store.damaged == frozenset()


def test_unfinished_writes_are_swept_on_start_once_they_are_an_hour_old(tmp_path: Path) -> None:
    info = put_vector(ArtifactStore(tmp_path))
    old, young = tmp_path / "tmp" / "old", tmp_path / "tmp" / "young"
    old.write_bytes(object_file(tmp_path, info).read_bytes()[:50])
    young.write_bytes(b"half")
    written = young.stat().st_mtime - 3700
    os.utime(old, (written, written))
    store = ArtifactStore(tmp_path)
    assert [i.id for i in store.list()[0]] == [info.id]
    assert not old.exists()
    assert young.exists()


class FullDisk(MemoryFileSystem):
    """A file system without room: what an operator's disk does, which a test cannot fill."""

    protocol = "fulldisk"
    store: dict[str, object] = {}  # noqa: RUF012 (as in fsspec)
    pseudo_dirs: list[str] = [""]  # noqa: RUF012 (as in fsspec)

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(MemoryFileSystem._strip_protocol(path.replace("fulldisk://", "memory://")))

    # Files that still find room.
    room = 0

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **kwargs: object) -> None:
        if FullDisk.room == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        FullDisk.room -= 1
        super().pipe_file(path, value, mode, **kwargs)


@pytest.mark.parametrize("room", [0, 1], ids=["for nothing", "for the object but not its tag"])
def test_a_full_disk_is_resource_exhausted_and_leaves_nothing(room: int) -> None:
    fsspec.register_implementation("fulldisk", FullDisk, clobber=True)
    store = ArtifactStore("fulldisk://root")
    FullDisk.room = room
    with pytest.raises(ResourceExhausted, match="No space left"):
        put_vector(store, tags=["new"])
    assert store.list() == ([], "")
    assert not [path for path in store._blobs.fs.find("fulldisk://root") if not path.endswith("/")]


def test_the_stored_file_is_plain_safetensors_with_canonical_json(tmp_path: Path) -> None:
    from safetensors import safe_open

    info = put_vector(ArtifactStore(tmp_path), provenance={"z": 1, "a": 2})
    with safe_open(object_file(tmp_path, info), "pt") as file:
        assert set(file.keys()) == {"layer.3", "layer.11"}
        text = file.metadata()["patchclamp"]
        assert torch.equal(file.get_tensor("layer.11"), torch.arange(5.0))
    assert text == json.dumps(json.loads(text), sort_keys=True, separators=(",", ":"))
    assert "created" not in text
    assert "tags" not in text

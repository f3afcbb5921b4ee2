"""Watches and their references as artifacts: what is stored comes back, and what a stranger's file may not bring."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from patchclamp_server.artifacts.formats import safetensors
from patchclamp_server.artifacts.store import ArtifactStore
from patchclamp_server.artifacts.types import ArtifactKind
from patchclamp_server.errors import FailedPrecondition, InvalidArgument
from patchclamp_server.model.sites import Site
from patchclamp_server.monitoring.reference import Reference
from patchclamp_server.monitoring.stored_tensors import MAX_ITEM_NAME_BYTES, MAX_WATCH_ITEMS
from patchclamp_server.monitoring.watch import ItemKind, Watch

WATCH, REFERENCE = ArtifactKind.WATCH, ArtifactKind.WATCH_REFERENCE
MADE_WITH = {"watch": "sha256:" + "0" * 64}


def watch_of(*names: str) -> Watch:
    """One neuron a name, and a direction."""
    n = len(names)
    return Watch(
        names=(*names, "joy"),
        kinds=torch.tensor([ItemKind.NEURON] * n + [ItemKind.DIRECTION]),
        layers=torch.ones(n + 1, dtype=torch.int64),
        units=torch.tensor([*range(n), 0]),
        thresholds=torch.zeros(n + 1, dtype=torch.float64),
        vectors=torch.ones(1, 4),
        sites=(Site.RESID_POST,),
        bias=torch.zeros(1),
        jump=torch.zeros(1),
    )


def text(*words: str) -> torch.Tensor:
    return torch.tensor(list(json.dumps(words).encode()), dtype=torch.uint8)


def tensors(**changes: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """Those of a watch, but for these; None takes one out."""
    changed = {**watch_of("a", "b").tensors(), **changes}
    return {name: tensor for name, tensor in changed.items() if tensor is not None}


def reference_tensors(**changes: torch.Tensor) -> dict[str, torch.Tensor]:
    n, k = 3, 15
    edges = torch.arange(float(k), dtype=torch.float64).repeat(n, 1)
    counts = torch.ones(n, k + 1, dtype=torch.int64)
    figures = torch.zeros(n, dtype=torch.float64)
    return {**Reference(edges, counts, figures, figures).tensors(), **changes}


def test_a_watch_comes_back_as_it_was_stored(tmp_path: Path) -> None:
    watch = watch_of("suspects/L1N0", "café ☕")
    info = ArtifactStore(tmp_path).put(WATCH, watch.tensors(), model_fingerprint="m", provenance={"items": 3})
    loaded = ArtifactStore(tmp_path).get(info.id)
    assert (info.layers, info.width, info.site) == ((), 0, None)
    back = Watch.from_tensors(loaded.tensors)
    assert (back.names, back.sites) == (watch.names, watch.sites)
    for name in ("kinds", "layers", "units", "thresholds", "vectors", "bias", "jump"):
        assert torch.equal(getattr(back, name), getattr(watch, name))


def test_a_file_of_a_watch_uploaded_again_has_the_same_id(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    info = store.put(WATCH, watch_of("a").tensors(), model_fingerprint="m")
    file = safetensors.decode(safetensors.encode(store.get(info.id)))
    assert store.put(WATCH, file.tensors, model_fingerprint="m").id == info.id


def test_a_reference_comes_back_with_the_watch_it_is_of(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    info = store.put(REFERENCE, reference_tensors(), model_fingerprint="m", provenance=MADE_WITH)
    assert store.info(info.id).provenance == MADE_WITH
    assert torch.equal(Reference.from_tensors(store.get(info.id).tensors).edges, reference_tensors()["edges"])


@pytest.mark.parametrize("provenance", [{}, {"watch": ""}, {"watch": 3}])
def test_a_reference_that_does_not_name_its_watch_is_refused(tmp_path: Path, provenance: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgument) as refused:
        ArtifactStore(tmp_path).put(REFERENCE, reference_tensors(), model_fingerprint="m", provenance=provenance)
    assert refused.value.field == "provenance.watch"


@pytest.mark.parametrize("kind", [WATCH, REFERENCE])
def test_neither_has_a_site(tmp_path: Path, kind: ArtifactKind) -> None:
    content = tensors() if kind is WATCH else reference_tensors()
    with pytest.raises(InvalidArgument) as refused:
        ArtifactStore(tmp_path).put(kind, content, model_fingerprint="m", site=Site.RESID_POST, provenance=MADE_WITH)
    assert refused.value.field == "site"


def test_a_watch_is_exported_whole(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    info = store.put(WATCH, tensors(), model_fingerprint="m")
    with pytest.raises(FailedPrecondition):
        store.get(info.id).only([1])


BAD: dict[str, tuple[ArtifactKind, dict[str, torch.Tensor], str]] = {
    "nothing": (WATCH, {}, "names"),
    "another tensor": (WATCH, tensors(scores=torch.ones(1)), "'scores'"),
    "kinds in a square": (WATCH, tensors(kinds=torch.zeros(3, 3, dtype=torch.int64)), "kinds must have 1 dimension"),
    "no thresholds": (WATCH, tensors(thresholds=None), "thresholds"),
    "a threshold too few": (WATCH, tensors(thresholds=torch.zeros(2, dtype=torch.float64)), "thresholds"),
    "a threshold of NaN": (WATCH, tensors(thresholds=torch.full((3,), torch.nan, dtype=torch.float64)), "thresholds"),
    "a kind there is not": (WATCH, tensors(kinds=torch.full((3,), 9)), "kinds"),
    "a negative layer": (WATCH, tensors(layers=torch.full((3,), -1)), "layer"),
    "a vector there is not": (WATCH, tensors(units=torch.tensor([0, 1, 7])), "vector"),
    "names that are no JSON": (WATCH, tensors(names=torch.tensor([91], dtype=torch.uint8)), "names"),
    "names that are numbers": (
        WATCH,
        tensors(names=torch.tensor(list(b"[1, 2, 3]"), dtype=torch.uint8)),
        "names",
    ),
    "a name twice": (WATCH, tensors(names=text("a", "a", "b")), "name"),
    "an empty name": (WATCH, tensors(names=text("a", "", "b")), "not a name"),
    "a name of several lines": (WATCH, tensors(names=text("a", "b\nc", "d")), "not a name"),
    "a name that no message can carry": (WATCH, tensors(names=text("a", "\ud800", "b")), "not a name"),
    "a name without end": (WATCH, tensors(names=text("a", "b", "x" * (MAX_ITEM_NAME_BYTES + 1))), "not a name"),
    "names without end": (WATCH, tensors(names=torch.zeros(8 * 1024 * 1024 + 1, dtype=torch.uint8)), "names has more"),
    "a site without vectors": (WATCH, tensors(vectors=None), "vectors"),
    "items without end": (WATCH, watch_of(*map(str, range(MAX_WATCH_ITEMS))).tensors(), "at most"),
    "vectors in half precision": (WATCH, tensors(vectors=torch.ones(1, 4).half()), "vectors"),
    "a reference with something else": (REFERENCE, reference_tensors(low=torch.ones(3)), "'low'"),
    "a reference of bins that do not fit": (
        REFERENCE,
        reference_tensors(counts=torch.ones(3, 3, dtype=torch.int64)),
        "counts",
    ),
    "bins without end": (REFERENCE, reference_tensors(edges=torch.zeros(3, 65, dtype=torch.float64)), "edges has more"),
    "negative counts": (REFERENCE, reference_tensors(counts=torch.full((3, 16), -1)), "counts"),
    "edges upside down": (
        REFERENCE,
        reference_tensors(edges=-torch.arange(15.0, dtype=torch.float64).repeat(3, 1)),
        "edges",
    ),
}


@pytest.mark.parametrize(("kind", "content", "message"), BAD.values(), ids=BAD.keys())
def test_what_is_no_watch_is_refused_and_nothing_is_stored(
    tmp_path: Path, kind: ArtifactKind, content: dict[str, torch.Tensor], message: str
) -> None:
    store = ArtifactStore(tmp_path)
    with pytest.raises(InvalidArgument) as refused:
        store.put(kind, content, model_fingerprint="m", provenance=MADE_WITH)
    assert refused.value.field == "tensors"
    assert message in refused.value.message
    assert store.list() == ([], "")

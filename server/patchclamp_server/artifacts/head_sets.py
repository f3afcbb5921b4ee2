"""This module resolves which heads a stored head set or a list names, best first."""

from dataclasses import dataclass

from torch import Tensor

from patchclamp_server.artifacts.heads import DEFAULT_THRESHOLD as DEFAULT_THRESHOLD
from patchclamp_server.artifacts.heads import Head as Head
from patchclamp_server.artifacts.heads import from_threshold, threshold_of
from patchclamp_server.artifacts.heads import ranked as ranked
from patchclamp_server.artifacts.store import ArtifactStore
from patchclamp_server.artifacts.types import ArtifactKind
from patchclamp_server.errors import FailedPrecondition, InvalidArgument, about
from patchclamp_server.model.info import ModelInfo


@dataclass(frozen=True)
class HeadSelection:
    """Names heads by `heads`, or by the id or tag of a head set: its `top_k` best, or all from its threshold."""

    heads: tuple[Head, ...] = ()
    head_set: str = ""
    top_k: int = 0


@dataclass(frozen=True, eq=False)
class HeadSet:
    """A stored head set as `select` and `compare` read it: scores [n_layers, n_heads] and a threshold for them."""

    scores: Tensor
    threshold: float
    model_fingerprint: str

    def best(self, top_k: int) -> tuple[Head, ...]:
        """Returns the k best heads, or with 0 all whose score is at least the threshold."""
        return ranked(self.scores)[:top_k] if top_k else from_threshold(self.scores, self.threshold)


def select(selection: HeadSelection, store: ArtifactStore, info: ModelInfo, path: str) -> tuple[Head, ...]:
    """Returns the selected heads, at least one, in the order listed, or best first.

    Raises InvalidArgument (field path), NotFound (head set) or FailedPrecondition (the head set is of another model, or
    no head reaches the threshold).
    """
    if bool(selection.heads) == bool(selection.head_set):
        raise InvalidArgument(path, "give heads or a head_set, one of both")
    if selection.heads:
        if selection.top_k:
            raise InvalidArgument(f"{path}.top_k", "is for a head_set; listed heads are all taken")
        return _listed(selection.heads, info, f"{path}.heads.heads")
    head_set = load_head_set(selection.head_set, store, f"{path}.head_set")
    _check_model(head_set, selection.head_set, info, f"{path}.head_set")
    check_top_k(selection.top_k, head_set.scores.numel(), f"{path}.top_k")
    chosen = head_set.best(selection.top_k)
    if not chosen:
        raise FailedPrecondition(
            f"{path}.head_set", f"no head of {selection.head_set} reaches its threshold; name a top_k"
        )
    return chosen


def check_top_k(top_k: int, n_heads: int, path: str) -> None:
    if not 0 <= top_k <= n_heads:
        raise InvalidArgument(path, f"{top_k} is not in 0 to {n_heads}, the heads of the model")


def load_head_set(ref: str, store: ArtifactStore, path: str) -> HeadSet:
    """Loads a head set of any model. One that names no threshold (an imported one) gets that of retrieval heads.

    Raises NotFound, or InvalidArgument for another kind of artifact.
    """
    with about(path):
        artifact = store.get(ref)
    if artifact.info.kind is not ArtifactKind.HEAD_SET:
        raise InvalidArgument(path, f"{ref} is a {artifact.info.kind.value}, not a head_set")
    try:
        threshold = threshold_of(artifact.info.evidence)
    except ValueError as error:
        raise InvalidArgument(path, f"{ref} has {error}") from None
    return HeadSet(artifact.head_scores()[0], threshold, artifact.info.model_fingerprint)


def _check_model(head_set: HeadSet, ref: str, info: ModelInfo, path: str) -> None:
    if head_set.model_fingerprint != info.fingerprint:
        raise FailedPrecondition(
            path, f"{ref} was made for model {head_set.model_fingerprint}, served is {info.fingerprint}"
        )
    if head_set.scores.shape != (info.n_layers, info.n_heads):
        has, wanted = " x ".join(map(str, head_set.scores.shape)), f"{info.n_layers} x {info.n_heads}"
        raise FailedPrecondition(path, f"{ref} has scores of {has} heads, the model has {wanted}")


def _listed(heads: tuple[Head, ...], info: ModelInfo, path: str) -> tuple[Head, ...]:
    seen: set[Head] = set()
    for i, (layer, head) in enumerate(heads):
        if not 0 <= layer < info.n_layers:
            raise InvalidArgument(f"{path}[{i}].layer", f"unknown layer {layer}: the model has {info.n_layers}")
        if not 0 <= head < info.n_heads:
            raise InvalidArgument(f"{path}[{i}].head", f"unknown head {head}: a layer has {info.n_heads}")
        if Head(layer, head) in seen:
            raise InvalidArgument(f"{path}[{i}]", f"head {head} of layer {layer} is named twice")
        seen.add(Head(layer, head))
    return heads

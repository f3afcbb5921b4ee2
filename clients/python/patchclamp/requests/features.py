"""Requests of FeatureService."""

from collections.abc import Iterable
from typing import TypedDict

from patchclamp.fields import build, one_text_or_several
from patchclamp.neurons import TextsLike, texts_message
from patchclamp.programs.vectors import VectorLike, vector_of
from patchclamp.v1 import feature_pb2 as pb
from patchclamp.v1 import neuron_pb2


class SearchFeaturesOptions(TypedDict, total=False):
    """Options of a search for features, of which one of target, tokens, direction and label is given.

    target: a label of `texts`; contrast: the label that it is compared with, by default all others. tokens: one or
    several, each as it stands in the texts, often with a space before it. direction: a vector that decoder rows are
    compared with. label: part of the name of a feature. labels: id or tag of the names, feature_labels. top_k: by
    default 20.
    """

    texts: TextsLike | None
    target: str
    contrast: str
    tokens: str | Iterable[str] | None
    direction: VectorLike | None
    label: str
    labels: str
    top_k: int
    model: str


def search_features(
    autoencoder: str,
    *,
    texts: TextsLike | None = None,
    target: str = "",
    contrast: str = "",
    tokens: str | Iterable[str] | None = None,
    direction: VectorLike | None = None,
    label: str = "",
    labels: str = "",
    top_k: int = 0,
    model: str = "",
) -> pb.SearchFeaturesRequest:
    """Returns a request. Raises ValueError unless one of target, tokens, direction and label is given, and texts with
    one of the first two alone."""
    request = build(
        pb.SearchFeaturesRequest, model=model, autoencoder=autoencoder, label=label, labels=labels, top_k=top_k
    )
    source = neuron_pb2.TextSource() if texts is None else texts_message(texts)
    sides = build(pb.FeatureContrast, target=target, contrast=contrast)
    spelt = None if tokens is None else build(pb.FeatureTokens, tokens=one_text_or_several(tokens))
    along = None if direction is None else vector_of(direction, "direction")
    ways = {"target": sides.target, "tokens": spelt is not None, "direction": along is not None, "label": label}
    chosen = [name for name, given in ways.items() if given]
    if len(chosen) != 1:
        raise ValueError(f"target: give one of target, tokens, direction and label, got {', '.join(chosen) or 'none'}")
    if (texts is not None) != (chosen[0] in ("target", "tokens")):
        raise ValueError("texts: give them with target or tokens, and with nothing else")
    if contrast and not target:
        raise ValueError("contrast: give it with target")
    if target:
        request.contrast.CopyFrom(sides)
        request.contrast.texts.CopyFrom(source)
    elif spelt is not None:
        request.tokens.CopyFrom(spelt)
        request.tokens.texts.CopyFrom(source)
    elif along is not None:
        request.direction.CopyFrom(along)
    return request

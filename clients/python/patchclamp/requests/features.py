"""Requests of FeatureService."""

from collections.abc import Iterable
from typing import TypedDict

from patchclamp.fields import build, build_as, one_text_or_several
from patchclamp.neurons import TextsLike, texts_message
from patchclamp.programs.vectors import VectorLike, vector_of
from patchclamp.v1 import feature_pb2 as pb


class SearchFeaturesOptions(TypedDict, total=False):
    """Options of a search for features, of which one of target, tokens, direction and label is given.

    target: a label of `texts`; contrast: the label that it is compared with, by default all others. tokens: one or
    several, each as it stands in the texts, often with a space before it. direction: a vector that decoder rows are
    compared with. label: part of the name of a feature. labels: id or tag of the names, feature_labels. top_k: by
    default 20.
    """

    texts: "TextsLike | None"
    target: str
    contrast: str
    tokens: str | Iterable[str] | None
    direction: "VectorLike | None"
    label: str
    labels: str
    top_k: int
    model: str


def search_features(
    autoencoder: str,
    *,
    texts: "TextsLike | None" = None,
    target: str = "",
    contrast: str = "",
    tokens: str | Iterable[str] | None = None,
    direction: "VectorLike | None" = None,
    label: str = "",
    labels: str = "",
    top_k: int = 0,
    model: str = "",
) -> pb.SearchFeaturesRequest:
    """Returns a request. Raises ValueError unless one of target, tokens, direction and label is given, and texts with
    one of the first two alone."""
    request = build(pb.SearchFeaturesRequest, model=model, autoencoder=autoencoder, labels=labels, top_k=top_k)
    ways = [name for name, given in _given(target, tokens, direction, label) if given]
    if len(ways) != 1:
        raise ValueError(f"target: give one of target, tokens, direction and label, got {', '.join(ways) or 'none'}")
    if (texts is not None) != (ways[0] in ("target", "tokens")):
        raise ValueError("texts: give them with target or tokens, and with nothing else")
    if contrast and not target:
        raise ValueError("contrast: give it with target")
    if target:
        assert texts is not None
        sides = build(pb.FeatureContrast, target=target, contrast=contrast)
        sides.texts.CopyFrom(texts_message(texts))
        request.contrast.CopyFrom(sides)
    elif tokens is not None:
        assert texts is not None
        spelt = build(pb.FeatureTokens, tokens=one_text_or_several(tokens))
        spelt.texts.CopyFrom(texts_message(texts))
        request.tokens.CopyFrom(spelt)
    elif direction is not None:
        request.direction.CopyFrom(vector_of(direction, "direction"))
    else:
        request.MergeFrom(build_as({}, pb.SearchFeaturesRequest, label=label))
    return request


def _given(target: object, tokens: object, direction: object, label: object) -> list[tuple[str, bool]]:
    return [
        ("target", target != ""),
        ("tokens", tokens is not None),
        ("direction", direction is not None),
        ("label", label != ""),
    ]

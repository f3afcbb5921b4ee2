"""Requests that run neurons over much text: the census, descriptions, and the match of two checkpoints."""

from collections.abc import Iterable, Sequence
from typing import TypedDict

from patchclamp.fields import build
from patchclamp.names import SITES, SiteName, value_or_unspecified
from patchclamp.neurons import NeuronsLike, TextsLike, selection_message, selection_or_layers, texts_message
from patchclamp.requests.artifacts import StoredOptions
from patchclamp.v1 import neuron_pb2 as pb


class CensusNeuronsOptions(StoredOptions, total=False):
    """Options of a census, besides StoredOptions.

    layers: by default every one. site: where neurons are read, by default mlp_gate where the model has it. threshold,
    magnitude: a neuron fires above the threshold, or with magnitude where its absolute value is above it. rare_below,
    always_from: shares of tokens that make it rare or always on. detector_recall, detector_elsewhere: least share of
    the occurrences of its token or n-gram that a detector fires at, and largest share of its firings elsewhere. ngram:
    the longest n. min_occurrences: below which a token or n-gram shows nothing. position_bins, positional_from: bins of
    the positions, and bits that make a neuron positional. checkpoint_tokens: tokens between checkpoints. restart:
    begins anew where a checkpoint is kept. tags: one set for each class is stored as "<tag>-dead" and so on.
    """

    layers: Iterable[int]
    site: SiteName | None
    threshold: float | None
    magnitude: bool
    rare_below: float | None
    always_from: float | None
    detector_recall: float | None
    detector_elsewhere: float | None
    ngram: int
    min_occurrences: int
    position_bins: int
    positional_from: float | None
    checkpoint_tokens: int
    restart: bool
    model: str


class DescribeNeuronsOptions(TypedDict, total=False):
    """Options of a description.

    top_k: of a neuron set, only the k best. site: by default mlp_post. contexts: of each neuron, by default 10.
    context_tokens: before and after the largest one, by default 12. descriptions: candidates that are scored for every
    neuron. causal: whether they are scored by clamping it too, beside random_neurons others.
    """

    top_k: int
    site: SiteName | None
    contexts: int
    context_tokens: int | None
    descriptions: Iterable[str]
    causal: bool
    random_neurons: int
    seed: int
    model: str


class MatchNeuronsOptions(StoredOptions, total=False):
    """Options of a match, besides StoredOptions.

    neurons: which are matched; top_k: of a neuron set, only the k best. layers: instead of neurons, all of these
    layers. any_layer: looks in every layer of the other model, by default in the one of the same index. tags: of the
    matched neurons, as a set of the other model.
    """

    neurons: NeuronsLike | None
    top_k: int
    layers: Iterable[int]
    any_layer: bool
    seed: int
    model: str


def census_neurons(
    texts: TextsLike,
    *,
    layers: Iterable[int] = (),
    site: SiteName | None = None,
    threshold: float | None = None,
    magnitude: bool = False,
    rare_below: float | None = None,
    always_from: float | None = None,
    detector_recall: float | None = None,
    detector_elsewhere: float | None = None,
    ngram: int = 0,
    min_occurrences: int = 0,
    position_bins: int = 0,
    positional_from: float | None = None,
    checkpoint_tokens: int = 0,
    restart: bool = False,
    description: str = "",
    tags: Sequence[str] = (),
    replace_tags: bool = False,
    model: str = "",
) -> pb.CensusNeuronsRequest:
    return build(
        pb.CensusNeuronsRequest,
        model=model,
        texts=texts_message(texts),
        layers=layers,
        site=value_or_unspecified(SITES, site, "site"),
        threshold=threshold,
        magnitude=magnitude,
        rare_below=rare_below,
        always_from=always_from,
        detector_recall=detector_recall,
        detector_elsewhere=detector_elsewhere,
        ngram=ngram,
        min_occurrences=min_occurrences,
        position_bins=position_bins,
        positional_from=positional_from,
        checkpoint_tokens=checkpoint_tokens,
        restart=restart,
        description=description,
        tags=tags,
        replace_tags=replace_tags,
    )


def describe_neurons(
    neurons: NeuronsLike,
    texts: TextsLike,
    *,
    top_k: int = 0,
    site: SiteName | None = None,
    contexts: int = 0,
    context_tokens: int | None = None,
    descriptions: Iterable[str] = (),
    causal: bool = False,
    random_neurons: int = 0,
    seed: int = 0,
    model: str = "",
) -> pb.DescribeNeuronsRequest:
    """Returns a request to describe neurons. Raises ValueError for causal scores without descriptions."""
    request = build(
        pb.DescribeNeuronsRequest,
        model=model,
        neurons=selection_message(neurons, top_k),
        texts=texts_message(texts),
        site=value_or_unspecified(SITES, site, "site"),
        contexts=contexts,
        context_tokens=context_tokens,
        descriptions=descriptions,
        causal=causal,
        random_neurons=random_neurons,
        seed=seed,
    )
    if request.causal and not request.descriptions:
        raise ValueError("causal: scores descriptions, of which none is given")
    return request


def match_neurons(
    other: str,
    texts: TextsLike,
    *,
    neurons: NeuronsLike | None = None,
    top_k: int = 0,
    layers: Iterable[int] = (),
    any_layer: bool = False,
    seed: int = 0,
    description: str = "",
    tags: Sequence[str] = (),
    replace_tags: bool = False,
    model: str = "",
) -> pb.MatchNeuronsRequest:
    """Returns a request to match neurons. Raises ValueError for neurons and layers together."""
    request = build(
        pb.MatchNeuronsRequest,
        model=model,
        other=other,
        texts=texts_message(texts),
        neurons=selection_or_layers(neurons, top_k),
        layers=layers,
        any_layer=any_layer,
        seed=seed,
        description=description,
        tags=tags,
        replace_tags=replace_tags,
    )
    if neurons is not None and request.layers:
        raise ValueError("layers: give either neurons or layers")
    return request

"""Requests that read neurons off the weights, find and localise them, and compare what was found."""

from collections.abc import Iterable, Sequence
from typing import TypedDict

from patchclamp.fields import build, build_as, instance, one_text_or_several, several
from patchclamp.names import (
    NEURON_WEIGHTS,
    SITES,
    NeuronWeightsName,
    SiteName,
    value_of,
    value_or_unspecified,
)
from patchclamp.neurons import LocalizationMethod, NeuronsLike, selection_or_layers
from patchclamp.programs.vectors import VectorLike, vector_of
from patchclamp.requests.artifacts import StoredOptions
from patchclamp.v1 import neuron_pb2 as pb


class DecodeNeuronsOptions(TypedDict, total=False):
    """Options of a decoding.

    top_k: of a neuron set, only the k best. layers: instead of neurons, all of these layers, by default of every one.
    weights: which rows, by default all that the model has. tokens: how many of each row and side, by default 10.
    """

    top_k: int
    layers: Iterable[int]
    weights: Iterable[NeuronWeightsName]
    tokens: int
    model: str


class FindNeuronsOptions(StoredOptions, total=False):
    """Options of a search, besides StoredOptions.

    layers: by default every one. top_k: neurons of the set, by default 20. value: size of the value that is stored with
    each, by default 20; its sign is that of its effect.
    """

    layers: Iterable[int]
    top_k: int
    value: float | None
    model: str


class LocalizeNeuronsOptions(StoredOptions, total=False):
    """Options of a localisation, besides StoredOptions.

    layers: by default every one. site: where neurons are read, by default mlp_post. top_k, share: size of the set, of
    which one is given, by default the method's. holdout_fraction: share of the texts of each label that only the
    evidence sees. random_sets: how many controls of equal size there are, by default 20.
    """

    layers: Iterable[int]
    site: SiteName | None
    top_k: int | None
    share: float | None
    holdout_fraction: float | None
    random_sets: int
    seed: int
    model: str


def decode_neurons(
    neurons: NeuronsLike | None = None,
    *,
    top_k: int = 0,
    layers: Iterable[int] = (),
    weights: Iterable[NeuronWeightsName] = (),
    tokens: int = 0,
    model: str = "",
) -> pb.DecodeNeuronsRequest:
    """Returns a request to decode neurons. Raises ValueError for neurons and layers together."""
    listed = several(weights, "weights", f"one of {', '.join(NEURON_WEIGHTS)}")
    request = build_as(
        {"top_k": "tokens"},
        pb.DecodeNeuronsRequest,
        model=model,
        neurons=selection_or_layers(neurons, top_k),
        layers=layers,
        weights=[value_of(NEURON_WEIGHTS, each, f"weights[{i}]") for i, each in enumerate(listed)],
        top_k=tokens,
    )
    if neurons is not None and request.layers:
        raise ValueError("layers: give either neurons or layers")
    return request


def find_neurons(
    words: str | Iterable[str] | None = None,
    *,
    vector: "VectorLike | None" = None,
    layers: Iterable[int] = (),
    top_k: int = 0,
    value: float | None = None,
    description: str = "",
    tags: Sequence[str] = (),
    replace_tags: bool = False,
    model: str = "",
) -> pb.FindNeuronsRequest:
    """Returns a request to find neurons. Raises ValueError unless either words or a vector are given."""
    direction = None if vector is None else vector_of(vector, "vector")
    spelt = None if words is None else build(pb.Words, words=one_text_or_several(words))
    if (spelt is None) == (direction is None):
        raise ValueError("words: give either a word, several, or vector=")
    if spelt is not None and not spelt.words:
        raise ValueError("words: give at least one word")
    return build(
        pb.FindNeuronsRequest,
        model=model,
        words=spelt,
        vector=direction,
        layers=layers,
        top_k=top_k,
        value=value,
        description=description,
        tags=tags,
        replace_tags=replace_tags,
    )


def localize_neurons(
    method: LocalizationMethod,
    *,
    layers: Iterable[int] = (),
    site: SiteName | None = None,
    top_k: int | None = None,
    share: float | None = None,
    holdout_fraction: float | None = None,
    random_sets: int = 0,
    seed: int = 0,
    description: str = "",
    tags: Sequence[str] = (),
    replace_tags: bool = False,
    model: str = "",
) -> pb.LocalizeNeuronsRequest:
    """Returns a request to localise neurons. Raises ValueError for top_k and share together, and for no method."""
    chosen = instance(method, pb.LocalizeNeuronsRequest, "method", "what a function of patchclamp.neurons makes")
    if chosen.WhichOneof("method") is None:
        raise ValueError("method: expected what a function of patchclamp.neurons makes, such as welch_t(...)")
    request = build(
        pb.LocalizeNeuronsRequest,
        model=model,
        layers=layers,
        site=value_or_unspecified(SITES, site, "site"),
        holdout_fraction=holdout_fraction,
        random_sets=random_sets,
        seed=seed,
        description=description,
        tags=tags,
        replace_tags=replace_tags,
    )
    if top_k is not None:
        request.MergeFrom(build(pb.LocalizeNeuronsRequest, top_k=top_k))
    if share is not None:
        request.MergeFrom(build(pb.LocalizeNeuronsRequest, share=share))
        if top_k is not None:
            raise ValueError("share: give either top_k or share")
    request.MergeFrom(chosen)
    return request


def compare_neuron_sets(neuron_sets: Iterable[str], top_k: int) -> pb.CompareNeuronSetsRequest:
    """Returns a request to compare neuron sets. Raises TypeError for one in place of several."""
    return build(pb.CompareNeuronSetsRequest, neuron_sets=neuron_sets, top_k=top_k)

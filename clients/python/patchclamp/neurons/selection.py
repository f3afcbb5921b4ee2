"""Neurons by their place, or as a stored set."""

from collections.abc import Iterable
from typing import NamedTuple

from patchclamp.fields import build, build_as, several, shown
from patchclamp.places import listed_places
from patchclamp.v1 import neuron_pb2 as pb


class Neuron(NamedTuple):
    """Names one neuron."""

    layer: int
    neuron: int

    def __str__(self) -> str:
        """Returns the neuron as people write it: L29N808."""
        return f"L{self.layer}N{self.neuron}"


# Text is a list such as "L29N808,L3N5", or else the id or tag of a neuron set.
NeuronsLike = str | Iterable[tuple[int, int]]


def selection_message(neurons: NeuronsLike, top_k: int = 0) -> pb.NeuronSelection:
    """Returns a selection of (layer, neuron) pairs, or of a neuron set (id or tag), of which top_k keeps the best.
    Neurons in text, such as "L29N808,L3N5", are listed ones.

    Raises ValueError for top_k with listed neurons and for no neurons, TypeError for what is neither.
    """
    if isinstance(neurons, str) and (named := listed_places(neurons, "N")) is not None:
        neurons = named
    if isinstance(neurons, str):
        return build(pb.NeuronSelection, neuron_set=neurons, top_k=top_k)
    build(pb.NeuronSelection, top_k=top_k)
    if top_k:
        raise ValueError("top_k selects from a neuron set; list only the neurons that are meant")
    listed = [
        _neuron_id(each, f"neurons[{i}]") for i, each in enumerate(several(neurons, "neurons", "(layer, neuron)"))
    ]
    if not listed:
        raise ValueError("give at least one neuron")
    return pb.NeuronSelection(neurons=pb.NeuronIds(neurons=listed))


def selection_or_layers(neurons: NeuronsLike | None, top_k: int) -> pb.NeuronSelection | None:
    """Does what selection_message does; None is left to the layers. ValueError for top_k without a set."""
    if neurons is not None:
        return selection_message(neurons, top_k)
    build(pb.NeuronSelection, top_k=top_k)
    if top_k:
        raise ValueError("top_k selects from a neuron set: give one as neurons")
    return None


def _neuron_id(neuron: object, field: str) -> pb.NeuronId:
    pair = several(neuron, field, "an int")
    if len(pair) != 2:
        raise ValueError(f"{field}: expected (layer, neuron), got {shown(neuron)}")
    names = {"layer": f"{field}[0]", "neuron": f"{field}[1]"}
    return build_as(names, pb.NeuronId, layer=pair[0], neuron=pair[1])

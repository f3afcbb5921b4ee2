"""Neurons: how they are named, and the texts, facts and tests that find and judge them.

from patchclamp.neurons import Fact, FactsTest, LabelledTexts, TextsTest

client.find_neurons("dog", tags=["dog"]).result()
client.evaluate_neuron_edit("dog", "clamp", targets=[FactsTest("dogs", [Fact("She walks her", " dog")])]).result()

neuron.proto says what each field means; what is left out is the server's default.
"""

from collections.abc import Iterable
from typing import NamedTuple

from patchclamp.fields import build, build_as, several, shown
from patchclamp.v1 import neuron_pb2


class Neuron(NamedTuple):
    """Names one neuron."""

    layer: int
    neuron: int

    def __str__(self) -> str:
        """Returns the neuron as people write it: L29N808."""
        return f"L{self.layer}N{self.neuron}"


NeuronsLike = str | Iterable[tuple[int, int]]


def selection_message(neurons: NeuronsLike, top_k: int = 0) -> neuron_pb2.NeuronSelection:
    """Returns a selection of (layer, neuron) pairs, or of a neuron set (id or tag), of which top_k keeps the best.

    Raises ValueError for top_k with listed neurons and for no neurons, TypeError for what is neither.
    """
    if isinstance(neurons, str):
        return build(neuron_pb2.NeuronSelection, neuron_set=neurons, top_k=top_k)
    if top_k:
        raise ValueError("top_k selects from a neuron set; list only the neurons that are meant")
    listed = [
        _neuron_id(each, f"neurons[{i}]") for i, each in enumerate(several(neurons, "neurons", "(layer, neuron)"))
    ]
    if not listed:
        raise ValueError("give at least one neuron")
    return neuron_pb2.NeuronSelection(neurons=neuron_pb2.NeuronIds(neurons=listed))


def _neuron_id(neuron: object, field: str) -> neuron_pb2.NeuronId:
    pair = several(neuron, field, "an int")
    if len(pair) != 2:
        raise ValueError(f"{field}: expected (layer, neuron), got {shown(neuron)}")
    names = {"layer": f"{field}[0]", "neuron": f"{field}[1]"}
    return build_as(names, neuron_pb2.NeuronId, layer=pair[0], neuron=pair[1])

"""An edit of a set of neurons as a program, in every mode that a neuron can be edited in:

    zero     a ← 0
    mean     a ← mean of a over ordinary text
    clamp    a ← a value for all neurons, or the one of each
    scale    a ← factor · a

a is the activation of a neuron at mlp_post, at the tokens in scope.
"""

from collections.abc import Sequence
from enum import Enum

import torch
from torch import Tensor

from patchclamp_server.artifacts.neuron_sets import Neuron, NeuronSet
from patchclamp_server.errors import InvalidArgument
from patchclamp_server.interventions.bind import bind
from patchclamp_server.interventions.bound import BoundProgram
from patchclamp_server.interventions.program import Edit, NeuronEdit, NeuronOp, Program, Scope
from patchclamp_server.model.info import ModelInfo
from patchclamp_server.model.sites import Site


class NeuronEditMode(Enum):
    """The names of the enum NeuronEditMode, in lower case and without its prefix."""

    ZERO = "zero"
    MEAN = "mean"
    CLAMP = "clamp"
    SCALE = "scale"


def edit_values(found: NeuronSet, mode: NeuronEditMode, value: float | None, means: Tensor | None) -> "EditValues":
    """Returns what neurons are edited with. means [n_layers, d_ff] for the mode MEAN.

    Raises InvalidArgument on "value" where the mode needs one and neither the request nor the set has it, or where it
    takes none.
    """
    takes_value = mode in (NeuronEditMode.CLAMP, NeuronEditMode.SCALE)
    if value is not None and not takes_value:
        raise InvalidArgument("value", f"is of the modes clamp and scale; the mode is {mode.value}")
    if mode is NeuronEditMode.MEAN:
        assert means is not None
        return EditValues(NeuronOp.SET, means=means)
    if mode is NeuronEditMode.ZERO:
        return EditValues(NeuronOp.SET, torch.zeros(len(found.neurons)))
    op = NeuronOp.SCALE if mode is NeuronEditMode.SCALE else NeuronOp.SET
    if value is not None:
        return EditValues(op, torch.full((len(found.neurons),), value))
    if mode is NeuronEditMode.SCALE or found.values is None:
        raise InvalidArgument("value", f"the mode {mode.value} needs a value, and the neurons carry none")
    return EditValues(op, found.values)


class EditValues:
    """The operation, and the value of the i-th neuron of a set, or of each neuron by itself (`means`)."""

    def __init__(self, op: NeuronOp, values: Tensor | None = None, means: Tensor | None = None) -> None:
        self.op, self._values, self._means = op, values, means

    def of(self, neurons: Sequence[Neuron]) -> list[float]:
        """Returns the values of the first neurons of a set, or of a random one in their place."""
        if self._values is not None:
            return [float(v) for v in self._values[: len(neurons)]]
        assert self._means is not None
        return [float(self._means[neuron.layer, neuron.neuron]) for neuron in neurons]


def neuron_program(neurons: Sequence[Neuron], values: EditValues, scope: Scope, info: ModelInfo) -> BoundProgram:
    """Returns a program with one edit for each layer."""
    return bind(Program(neuron_edits(neurons, values, scope)), info)


def neuron_edits(neurons: Sequence[Neuron], values: EditValues, scope: Scope) -> tuple[Edit, ...]:
    """Returns one edit for each layer."""
    by_layer: dict[int, list[tuple[int, float]]] = {}
    for neuron, value in zip(neurons, values.of(neurons), strict=True):
        by_layer.setdefault(neuron.layer, []).append((neuron.neuron, value))
    edits = []
    for layer, named in sorted(by_layer.items()):
        indices, own = zip(*named, strict=True)
        edits.append(Edit(NeuronEdit(indices, op=values.op, values=own), Site.MLP_POST, layers=(layer,), scope=scope))
    return tuple(edits)

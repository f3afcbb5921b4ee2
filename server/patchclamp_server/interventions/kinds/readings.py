"""Kernels write the numbers of the readouts projection and neurons as they pass: h·u and values of single neurons."""

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from patchclamp_server.cpu.invariant.reads import Read, gather, products
from patchclamp_server.errors import InvalidArgument
from patchclamp_server.interventions.bound import BoundReadout
from patchclamp_server.interventions.columns import UNIT, EntryFlag, EntryKind
from patchclamp_server.interventions.field_checks import distinct
from patchclamp_server.interventions.kinds.kind import ReadoutTable, UnitColumns, Written
from patchclamp_server.interventions.kinds.rules import CompiledRead, Entries, FeatureValues, StepContext, Units
from patchclamp_server.interventions.kinds.spec import ReadoutNumbers, ReadoutSpec, Where, check_neuron_site
from patchclamp_server.interventions.kinds.vectors import decode_vector
from patchclamp_server.interventions.program import NeuronReadout, ProjectionReadout
from patchclamp_server.interventions.resolver import check_indices
from patchclamp_server.model.arrays import IntArray

if TYPE_CHECKING:
    # The engine also runs where the messages are not installed.
    from patchclamp.v1 import program_pb2 as pb


class ProjectionRule(CompiledRead):
    """Reads h · u for every vector u of the row's readout, summed in float32. Vectors were bound with unit length, as
    those of conditions are; or they are rows of an encoder, whose features are read."""

    def __init__(self, entries: Entries, flags: EntryFlag) -> None:
        self.entries = entries
        self.target = entries.pairs.target[entries.span]
        self.features = FeatureValues.of(entries)

    def run(self, x: Tensor, context: StepContext) -> None:
        values = self.entries.dots(x)
        if self.features is not None:
            values = self.features.among(values)
        context.readings.index_copy_(0, self.target, values)

    def reads(self, readings: Tensor) -> list[Read]:
        rows, which, _ = self.entries.numbers
        own, features = self.features, None
        if own is not None:
            features = own.which.numpy(), own.bias.numpy(), own.jump.numpy()
        vectors = self.entries.own_vectors.numpy()
        return [products(rows, which, vectors, readings.numpy(), self.target.numpy(), features)]


class NeuronValuesRule(CompiledRead):
    """Reads the values of the neurons that each readout names."""

    def __init__(self, entries: Entries, flags: EntryFlag) -> None:
        units = Units(entries, entries.width)
        self.place = units.place
        first = entries.pairs.target[entries.span]
        self.target = first.index_select(0, units.group) + entries.tensor(units.within)

    def run(self, x: Tensor, context: StepContext) -> None:
        context.readings.index_copy_(0, self.target, x.reshape(-1).index_select(0, self.place).float())

    def reads(self, readings: Tensor) -> list[Read]:
        return [gather(self.place.numpy(), 1, readings.numpy(), self.target.numpy())]


def _vectors(readout: BoundReadout, layer: int) -> Written:
    return Written(readout.vectors[layer])


def _n_vectors(readout: BoundReadout, layer: int) -> int:
    return len(readout.vectors[layer])


def _distinct(readout: BoundReadout) -> IntArray:
    """Returns the neurons as the kernels want them: ascending, each once."""
    return np.unique(np.array(readout.ids, dtype=np.int64))


def _neurons(readout: BoundReadout, layer: int) -> Written:
    return Written(None, lambda rows: UnitColumns({UNIT: _distinct(readout)}))


def _n_neurons(readout: BoundReadout, layer: int) -> int:
    return len(_distinct(readout))


def _as_named(readout: BoundReadout, n: int) -> IntArray:
    places: IntArray = np.searchsorted(_distinct(readout), np.array(readout.ids, dtype=np.int64))
    return places


PROJECTION = ReadoutTable(EntryKind.PROJECTION, _vectors, ProjectionRule, _n_vectors)
NEURON_VALUES = ReadoutTable(EntryKind.NEURON_VALUES, _neurons, NeuronValuesRule, _n_neurons, _as_named)


def _decode_projection(proto: "pb.ProjectionReadout", field: str) -> ProjectionReadout:
    if not proto.vectors:
        raise InvalidArgument(f"{field}.vectors", "expected at least one vector")
    return ProjectionReadout(tuple(decode_vector(v, f"{field}.vectors[{i}]") for i, v in enumerate(proto.vectors)))


def _bind_projection(kind: ProjectionReadout, where: Where) -> ReadoutNumbers:
    if not kind.vectors:
        raise InvalidArgument(f"{where.path}.vectors", "at least one vector is needed")
    site, layers, width = where.site, where.layers, where.width
    each = [
        where.resolver.vectors(vector, site, layers, width, f"{where.path}.vectors[{i}]", unit=True)
        for i, vector in enumerate(kind.vectors)
    ]
    return ReadoutNumbers({layer: torch.stack([payload[layer][0] for payload in each]) for layer in layers})


def _decode_neurons(proto: "pb.NeuronReadout", field: str) -> NeuronReadout:
    if not proto.neurons:
        raise InvalidArgument(f"{field}.neurons", "expected at least one neuron")
    return NeuronReadout(distinct(proto.neurons, f"{field}.neurons"))


def _bind_neurons(kind: NeuronReadout, where: Where) -> ReadoutNumbers:
    check_neuron_site(where, "read")
    check_indices(kind.neurons, where.width, f"{where.path}.neurons", "neuron")
    return ReadoutNumbers(ids=kind.neurons)


READOUTS = (
    ReadoutSpec(
        "projection", ProjectionReadout, _decode_projection, _bind_projection, ("read_projection",), PROJECTION
    ),
    ReadoutSpec("neurons", NeuronReadout, _decode_neurons, _bind_neurons, ("read_neurons",), NEURON_VALUES),
)

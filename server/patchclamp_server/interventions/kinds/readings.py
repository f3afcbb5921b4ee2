"""projection, neurons: readouts whose numbers kernels write as they pass, h·u and the values of single neurons."""

import numpy as np
from torch import Tensor

from patchclamp_server.interventions.bound import BoundReadout
from patchclamp_server.interventions.columns import UNIT, EntryFlag, EntryKind
from patchclamp_server.interventions.kinds.kind import ReadoutTable, UnitColumns, Written
from patchclamp_server.interventions.kinds.rules import Entries, StepContext, Units
from patchclamp_server.interventions.row_arithmetic import row_dots
from patchclamp_server.interventions.scopes import IntArray


class ProjectionRule:
    """h · u for every vector u of the row's readout; they were bound with unit length, as those of conditions are.
    Summed in float32."""

    def __init__(self, entries: Entries, flags: EntryFlag) -> None:
        self.entries = entries
        self.target = entries.pairs.target[entries.span]
        self.vectors = entries.vectors()

    def run(self, x: Tensor, context: StepContext) -> None:
        h = x.index_select(0, self.entries.rows).float()
        context.readings.index_copy_(0, self.target, row_dots(h, self.entries.each(self.vectors)))


class NeuronValuesRule:
    """Values of the neurons each readout names."""

    def __init__(self, entries: Entries, flags: EntryFlag) -> None:
        units = Units(entries, entries.width)
        self.place = units.place
        first = entries.pairs.target[entries.span]
        self.target = first.index_select(0, units.group) + entries.tensor(units.within)

    def run(self, x: Tensor, context: StepContext) -> None:
        context.readings.index_copy_(0, self.target, x.reshape(-1).index_select(0, self.place).float())


def _vectors(readout: BoundReadout, layer: int) -> Written:
    return Written(readout.vectors[layer])


def _n_vectors(readout: BoundReadout, layer: int) -> int:
    return len(readout.vectors[layer])


def _distinct(readout: BoundReadout) -> IntArray:
    """Neurons as the kernels want them: ascending, each once."""
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

"""The registry of kinds of edit and readout: everything that differs between them is looked up here."""

from collections.abc import Callable

from patchclamp_server.interventions.columns import EntryFlag, EntryKind
from patchclamp_server.interventions.kinds.add import ADD
from patchclamp_server.interventions.kinds.conditions import ConditionRule
from patchclamp_server.interventions.kinds.heads import HEADS
from patchclamp_server.interventions.kinds.kind import EditTable, ReadoutTable
from patchclamp_server.interventions.kinds.low_rank import LOW_RANK
from patchclamp_server.interventions.kinds.neurons import NEURONS
from patchclamp_server.interventions.kinds.project import PROJECT
from patchclamp_server.interventions.kinds.rankings import LOGIT_LENS, TOP_NEURONS
from patchclamp_server.interventions.kinds.readings import NEURON_VALUES, PROJECTION
from patchclamp_server.interventions.kinds.replace import REPLACE
from patchclamp_server.interventions.kinds.rotate import ROTATE
from patchclamp_server.interventions.kinds.rules import Entries, Rule
from patchclamp_server.interventions.program import (
    LogitLensReadout,
    NeuronReadout,
    ProjectionReadout,
    ReadoutKind,
    TopNeuronsReadout,
)

EDIT_TABLES: dict[EntryKind, EditTable] = {
    table.entry: table for table in (ADD, PROJECT, REPLACE, ROTATE, LOW_RANK, NEURONS, HEADS)
}
# What attention answers itself is in no table.
READOUT_TABLES: dict[type[ReadoutKind], ReadoutTable] = {
    ProjectionReadout: PROJECTION,
    NeuronReadout: NEURON_VALUES,
    TopNeuronsReadout: TOP_NEURONS,
    LogitLensReadout: LOGIT_LENS,
}
RULES: dict[EntryKind, Callable[[Entries, EntryFlag], Rule]] = {
    EntryKind.CONDITION: ConditionRule,
    **{entry: table.rule for entry, table in EDIT_TABLES.items()},
    **{table.entry: table.rule for table in READOUT_TABLES.values()},
}

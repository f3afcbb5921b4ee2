"""In this registry of kinds of edit and readout everything that differs between them is looked up.

A kind is a module with its message and checks, its columns of the tables, the rule that torch runs, the number that
kernels know it by, the name that policies give it, and the client's builders. A new one is added to the list below.
"""

from collections.abc import Callable

from patchclamp_server.interventions.columns import EntryFlag, EntryKind
from patchclamp_server.interventions.kinds import (
    activations,
    add,
    affine,
    features,
    heads,
    latents,
    lens,
    low_rank,
    neurons,
    patch,
    probes,
    project,
    rankings,
    readings,
    replace,
    rotate,
    rotate_in_plane,
)
from patchclamp_server.interventions.kinds.conditions import ConditionRule
from patchclamp_server.interventions.kinds.kind import EditTable, ReadoutTable
from patchclamp_server.interventions.kinds.rules import Entries, Rule
from patchclamp_server.interventions.kinds.spec import EditSpec, ReadoutSpec
from patchclamp_server.interventions.program import EditKind, LatentReadout, ReadoutKind

EDITS: tuple[EditSpec, ...] = (
    *add.EDITS,
    *project.EDITS,
    *replace.EDITS,
    *rotate.EDITS,
    *low_rank.EDITS,
    *neurons.EDITS,
    *heads.EDITS,
    *affine.EDITS,
    *patch.EDITS,
    *rotate_in_plane.EDITS,
    *features.EDITS,
)
READOUTS: tuple[ReadoutSpec, ...] = (
    *readings.READOUTS,
    *rankings.READOUTS,
    *lens.READOUTS,
    *activations.READOUTS,
    *heads.READOUTS,
    *probes.READOUTS,
    *features.READOUTS,
)
_TABLES = (
    add.ADD,
    project.PROJECT,
    replace.REPLACE,
    rotate.ROTATE,
    low_rank.LOW_RANK,
    neurons.NEURONS,
    heads.HEADS,
    affine.FULL,
    affine.LOW_RANK,
    patch.PATCH,
    features.FEATURES,
)

# These look a kind up by the name of the field in its message, and by its dataclass.
EDIT_OF_NAME: dict[str, EditSpec] = {spec.name: spec for spec in EDITS}
EDIT_OF: dict[type[EditKind], EditSpec] = {spec.kind: spec for spec in EDITS}
READOUT_OF_NAME: dict[str, ReadoutSpec] = {spec.name: spec for spec in READOUTS}
READOUT_OF: dict[type[ReadoutKind], ReadoutSpec] = {spec.kind: spec for spec in READOUTS}

EDIT_TABLES: dict[EntryKind, EditTable] = {table.entry: table for table in _TABLES}
# Readouts that attention answers itself are in no table, and latent predictions in no message.
READOUT_TABLES: dict[type[ReadoutKind], ReadoutTable] = {
    spec.kind: spec.table for spec in READOUTS if spec.table is not None
} | {LatentReadout: latents.LATENT}
RULES: dict[EntryKind, Callable[[Entries, EntryFlag], Rule]] = {
    EntryKind.CONDITION: ConditionRule,
    **{entry: table.rule for entry, table in EDIT_TABLES.items()},
    **{table.entry: table.rule for table in READOUT_TABLES.values()},
}

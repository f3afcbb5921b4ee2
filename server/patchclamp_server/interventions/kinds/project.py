"""The edits project_out, set_projection and cap_projection clip the projection h·u on a unit vector to [low, high].

t(h) = h + (clip(h·u, low, high) - h·u) u
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from patchclamp_server.interventions.columns import HIGH, LOW, EntryFlag, EntryKind
from patchclamp_server.interventions.compiled_edits import PROJECT as PROJECT_FORMULA
from patchclamp_server.interventions.field_checks import finite
from patchclamp_server.interventions.kinds.kind import EditTable, one_vector
from patchclamp_server.interventions.kinds.rules import Entries, TargetRule
from patchclamp_server.interventions.kinds.spec import EditNumbers, EditSpec, Where
from patchclamp_server.interventions.kinds.vectors import bounds_in, inline_vector, payload_of, vector_in
from patchclamp_server.interventions.program import CapProjection, ProjectOut, SetProjection
from patchclamp_server.interventions.resolver import check_finite, checked_bounds
from patchclamp_server.interventions.row_arithmetic import add_product, row_dots

if TYPE_CHECKING:
    # The engine also runs where the messages are not installed.
    from patchclamp.v1 import program_pb2 as pb


class ProjectRule(TargetRule):
    """Has the target t(h) = h + (clip(h·u, low, high) - h·u) u."""

    formula = PROJECT_FORMULA

    def __init__(self, entries: Entries, flags: EntryFlag) -> None:
        super().__init__(entries, preserve_norm=bool(flags & EntryFlag.PRESERVE_NORM))
        self.vectors = entries.vectors()
        self.bounds = entries.floats(LOW), entries.floats(HIGH)

    def target(self, h: Tensor, norms: Tensor) -> Tensor:
        unit = self.entries.each(self.vectors)
        projection = row_dots(h, unit)
        low, high = self.bounds
        clipped = torch.minimum(torch.maximum(projection, low), high)
        return add_product(h, (clipped - projection)[:, None], unit)


PROJECT = EditTable(EntryKind.PROJECT, one_vector, ProjectRule)


def _decode_project_out(proto: "pb.ProjectOut", field: str) -> ProjectOut:
    return ProjectOut(vector_in(proto, field))


def _decode_cap(proto: "pb.CapProjection", field: str) -> CapProjection:
    low, high = bounds_in(proto, field)
    return CapProjection(vector_in(proto, field), min=low, max=high)


def _decode_set(proto: "pb.SetProjection", field: str) -> SetProjection:
    return SetProjection(vector_in(proto, field), finite(proto.target, f"{field}.target"))


def _bind_project_out(kind: ProjectOut, where: Where) -> EditNumbers:
    return EditNumbers(PROJECT, payload_of(kind.vector, where, unit=True), (0.0, 0.0))


def _bind_cap(kind: CapProjection, where: Where) -> EditNumbers:
    bounds = checked_bounds(kind.min, kind.max, where.path)
    return EditNumbers(PROJECT, payload_of(kind.vector, where, unit=True), bounds)


def _bind_set(kind: SetProjection, where: Where) -> EditNumbers:
    check_finite(kind.target, f"{where.path}.target")
    return EditNumbers(PROJECT, payload_of(kind.vector, where, unit=True), (kind.target, kind.target))


EDITS = tuple(
    EditSpec(name, kind, decode, bind, (name,), inline_vector(name))
    for name, kind, decode, bind in (
        ("project_out", ProjectOut, _decode_project_out, _bind_project_out),
        ("cap_projection", CapProjection, _decode_cap, _bind_cap),
        ("set_projection", SetProjection, _decode_set, _bind_set),
    )
)

"""project_out, set_projection, cap_projection: the projection h·u on a unit vector, clipped to [low, high].

t(h) = h + (clip(h·u, low, high) - h·u) u
"""

import torch
from torch import Tensor

from patchclamp_server.interventions.columns import HIGH, LOW, EntryFlag, EntryKind
from patchclamp_server.interventions.kinds.kind import EditTable, one_vector
from patchclamp_server.interventions.kinds.rules import Entries, TargetRule
from patchclamp_server.interventions.row_arithmetic import add_product, row_dots


class ProjectRule(TargetRule):
    """t(h) = h + (clip(h·u, low, high) - h·u) u."""

    def __init__(self, entries: Entries, flags: EntryFlag) -> None:
        super().__init__(entries, preserve_norm=bool(flags & EntryFlag.PRESERVE_NORM))
        self.vectors = entries.vectors()
        self.low, self.high = entries.floats(LOW), entries.floats(HIGH)  # [E]

    def target(self, h: Tensor, norms: Tensor) -> Tensor:
        unit = self.entries.each(self.vectors)
        projection = row_dots(h, unit)
        clipped = torch.minimum(torch.maximum(projection, self.low), self.high)
        return add_product(h, (clipped - projection)[:, None], unit)


PROJECT = EditTable(EntryKind.PROJECT, one_vector, ProjectRule)

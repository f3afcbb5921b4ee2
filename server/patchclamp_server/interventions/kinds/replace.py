"""replace: t(h) = v."""

from torch import Tensor

from patchclamp_server.interventions.columns import EntryFlag, EntryKind
from patchclamp_server.interventions.kinds.kind import EditTable, one_vector
from patchclamp_server.interventions.kinds.rules import Entries, TargetRule


class ReplaceRule(TargetRule):
    """t(h) = v."""

    def __init__(self, entries: Entries, flags: EntryFlag) -> None:
        super().__init__(entries, preserve_norm=bool(flags & EntryFlag.PRESERVE_NORM))
        self.vectors = entries.vectors()

    def target(self, h: Tensor, norms: Tensor) -> Tensor:
        return self.entries.each(self.vectors)


REPLACE = EditTable(EntryKind.REPLACE, one_vector, ReplaceRule)

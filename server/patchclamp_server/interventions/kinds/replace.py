"""The edit `replace` has the target t(h) = v."""

from typing import TYPE_CHECKING

from torch import Tensor

from patchclamp_server.interventions.columns import EntryFlag, EntryKind
from patchclamp_server.interventions.kinds.kind import EditTable, one_vector
from patchclamp_server.interventions.kinds.rules import Entries, TargetRule
from patchclamp_server.interventions.kinds.spec import EditNumbers, EditSpec, Where
from patchclamp_server.interventions.kinds.vectors import inline_vector, payload_of, safe_strengths, vector_in
from patchclamp_server.interventions.program import ReplaceVector
from patchclamp_server.interventions.safe_strengths import Application

if TYPE_CHECKING:
    # The engine also runs where the messages are not installed.
    from patchclamp.v1 import program_pb2 as pb


class ReplaceRule(TargetRule):
    """Has the target t(h) = v."""

    def __init__(self, entries: Entries, flags: EntryFlag) -> None:
        super().__init__(entries, preserve_norm=bool(flags & EntryFlag.PRESERVE_NORM))
        self.vectors = entries.vectors()

    def target(self, h: Tensor, norms: Tensor) -> Tensor:
        return self.entries.each(self.vectors)


REPLACE = EditTable(EntryKind.REPLACE, one_vector, ReplaceRule)


def _decode(proto: "pb.ReplaceVector", field: str) -> ReplaceVector:
    return ReplaceVector(vector_in(proto, field))


def _bind(kind: ReplaceVector, where: Where) -> EditNumbers:
    payload = payload_of(kind.vector, where, unit=kind.vector.unit)
    # Towards a vector of another length leads another way than the one that was measured.
    safe = {} if kind.vector.unit else safe_strengths(kind.vector, where, Application.REPLACE)
    return EditNumbers(REPLACE, payload, safe=safe)


EDITS = (EditSpec("replace", ReplaceVector, _decode, _bind, ("replace",), inline_vector("replace")),)

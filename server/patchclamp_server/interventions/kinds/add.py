"""The edit `add` gives h + s v."""

from typing import TYPE_CHECKING

from torch import Tensor

from patchclamp_server.cpu.invariant.operators import holds_for
from patchclamp_server.cpu.invariant.reads import Read
from patchclamp_server.interventions import compiled_writes
from patchclamp_server.interventions.columns import EntryFlag, EntryKind
from patchclamp_server.interventions.compiled_edits import ADD as ADD_FORMULA
from patchclamp_server.interventions.compiled_edits import add_to_rows
from patchclamp_server.interventions.kinds.kind import EditTable, Payload, one_vector
from patchclamp_server.interventions.kinds.rules import CompiledEdit, Entries, Rule, StepContext, TargetRule
from patchclamp_server.interventions.kinds.spec import EditNumbers, EditSpec, Where
from patchclamp_server.interventions.kinds.vectors import inline_vector, payload_of, safe_strengths, vector_in
from patchclamp_server.interventions.program import AddVector
from patchclamp_server.interventions.row_arithmetic import row_norms
from patchclamp_server.interventions.safe_strengths import Application

if TYPE_CHECKING:
    # The engine also runs where the messages are not installed.
    from patchclamp.v1 import program_pb2 as pb


class AddRule(CompiledEdit):
    """Computes h + s v. Several edits may add to one row."""

    def __init__(self, entries: Entries) -> None:
        self.entries = entries
        self.vectors = entries.vectors()  # [k, width]
        # |delta| of each pair, [E], whatever x is.
        self.delta_norms = entries.each(row_norms(self.vectors)) * entries.strength.abs()
        # With one row for each edit (decode) the products do not change from step to step.
        self.delta = self._delta() if entries.which is None else None

    def _delta(self) -> Tensor:
        return self.entries.each(self.vectors) * self.entries.strength[:, None]

    def run(self, x: Tensor, context: StepContext) -> None:
        entries = self.entries
        if holds_for(x):
            opened = entries.opened(context)
            entries.note(self.delta_norms, add_to_rows(x, entries, self.vectors, opened), opened)
            return
        h = x.index_select(0, entries.rows).float()
        delta = self._delta() if self.delta is None else self.delta
        opened = entries.opened(context)
        if entries.gate is not None:
            delta = delta * opened[:, None]
        if entries.earlier is not None:
            later, earlier = entries.earlier
            h.index_add_(0, later, delta.index_select(0, earlier))
        x.index_add_(0, entries.rows, delta.to(x.dtype))
        entries.note(self.delta_norms, row_norms(h), opened)

    def write(self, opened: Tensor) -> Read:
        return compiled_writes.add(self.entries, self.vectors, self.delta_norms, opened)


class AddPreservingRule(TargetRule):
    """Has the target t(h) = h + v, which is rescaled to |h|."""

    formula = ADD_FORMULA

    def __init__(self, entries: Entries) -> None:
        super().__init__(entries, preserve_norm=True)
        self.vectors = entries.vectors()
        self.bounds = entries.strength, entries.strength

    def target(self, h: Tensor, norms: Tensor) -> Tensor:
        return h + self.entries.each(self.vectors)


def _rule(entries: Entries, flags: EntryFlag) -> Rule:
    return AddPreservingRule(entries) if flags & EntryFlag.PRESERVE_NORM else AddRule(entries)


def _always(a: Payload, b: Payload) -> bool:
    return True


ADD = EditTable(EntryKind.ADD, one_vector, _rule, _always)


def _decode(proto: "pb.AddVector", field: str) -> AddVector:
    return AddVector(vector_in(proto, field))


def _bind(kind: AddVector, where: Where) -> EditNumbers:
    payload = payload_of(kind.vector, where, unit=kind.vector.unit)
    safe = safe_strengths(kind.vector, where, Application.ADD)
    if kind.vector.unit and safe:
        norms = {layer: float(v.norm()) for layer, (v,) in payload_of(kind.vector, where, unit=False).items()}
        safe = {layer: found.times(norms[layer]) for layer, found in safe.items()}
    return EditNumbers(ADD, payload, safe=safe)


EDITS = (EditSpec("add", AddVector, _decode, _bind, ("add",), inline_vector("add")),)

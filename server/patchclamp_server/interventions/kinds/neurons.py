"""neurons: single neurons are set, scaled, added to or clamped: t(a) = clip(f a + c, low, high)."""

import numpy as np
import torch
from torch import Tensor

from patchclamp_server.interventions.columns import (
    FACTOR,
    OFFSET,
    UNIT,
    UNIT_HIGH,
    UNIT_LOW,
    EntryFlag,
    EntryKind,
)
from patchclamp_server.interventions.kinds.kind import EditTable, Payload, UnitColumns, Written, apart
from patchclamp_server.interventions.kinds.rules import Entries, StepContext, Units
from patchclamp_server.interventions.row_arithmetic import add_product, interpolate, row_norms
from patchclamp_server.interventions.scopes import IntArray


class NeuronRule:
    """t(a) = clip(f a + c, low, high) for single neurons."""

    def __init__(self, entries: Entries, flags: EntryFlag) -> None:
        self.entries = entries
        self.units = units = Units(entries, entries.width)
        self.factor, self.offset = units.numbers(FACTOR), units.numbers(OFFSET)  # [U]
        self.low, self.high = units.numbers(UNIT_LOW), units.numbers(UNIT_HIGH)

    def run(self, x: Tensor, context: StepContext) -> None:
        entries, units = self.entries, self.units
        norms = row_norms(x.index_select(0, entries.rows).float())
        flat = x.view(-1)
        a = flat.index_select(0, units.place).float()
        target = torch.minimum(torch.maximum(add_product(self.offset, a, self.factor), self.low), self.high)
        edited = interpolate(a, target, units.strength)
        opened = entries.opened(context)
        if entries.gate is not None:
            edited = torch.where(units.opened(opened) > 0, edited, a)
        flat.index_copy_(0, units.place, edited.to(x.dtype))
        norms = units.norms_before(norms, edited.square() - a.square())
        context.count(units.moved(norms, (edited - a).square()), norms, opened)


def _write(payload: Payload) -> Written:
    """(index, factor, offset, low, high), [n] each"""
    order = np.argsort(payload[0].numpy())
    index, factor, offset, low, high = (column.numpy()[order] for column in payload)

    def units(_: IntArray) -> UnitColumns:
        return UnitColumns({UNIT: index}, {FACTOR: factor, OFFSET: offset, UNIT_LOW: low, UNIT_HIGH: high})

    return Written(None, units)


NEURONS = EditTable(EntryKind.NEURONS, _write, NeuronRule, apart, whole_rows=False)

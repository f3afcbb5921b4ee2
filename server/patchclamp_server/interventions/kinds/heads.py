"""heads: the output z of single heads is scaled or replaced by a mean, t(z) = f z + m. Uniform attention is a scale of
0 of their queries."""

import numpy as np
import torch
from torch import Tensor

from patchclamp_server.interventions.columns import FACTOR, OTHER, UNIT, EntryFlag, EntryKind
from patchclamp_server.interventions.kinds.kind import EditTable, Payload, UnitColumns, Written, apart
from patchclamp_server.interventions.kinds.rules import Entries, StepContext, Units
from patchclamp_server.interventions.row_arithmetic import add_product, interpolate, row_norms
from patchclamp_server.interventions.scopes import IntArray


class HeadRule:
    """t(z) = f z + m for single heads."""

    def __init__(self, entries: Entries, flags: EntryFlag) -> None:
        self.entries = entries
        self.n_heads = entries.setting.n_heads
        self.units = units = Units(entries, self.n_heads)
        self.factor = units.numbers(FACTOR)[:, None]  # [U, 1]
        self.offset = entries.bank(units.ints(OTHER), entries.setting.head_dim)  # [U, head_dim]

    def run(self, x: Tensor, context: StepContext) -> None:
        entries, units = self.entries, self.units
        norms = row_norms(x.index_select(0, entries.rows).float())
        heads = x.view(x.shape[0] * self.n_heads, -1)
        z = heads.index_select(0, units.place).float()
        target = add_product(self.offset, z, self.factor)
        edited = interpolate(z, target, units.strength[:, None])
        opened = entries.opened(context)
        if entries.gate is not None:
            edited = torch.where(units.opened(opened)[:, None] > 0, edited, z)
        heads.index_copy_(0, units.place, edited.to(x.dtype))
        norms = units.norms_before(norms, (edited.square() - z.square()).sum(1))
        context.count(units.moved(norms, (edited - z).square().sum(1)), norms, opened)


def _write(payload: Payload) -> Written:
    """(index, factor [n], offset [n, head_dim])"""
    order = np.argsort(payload[0].numpy())
    index, factor = payload[0].numpy()[order], payload[1].numpy()[order]

    def units(rows: IntArray) -> UnitColumns:
        return UnitColumns({UNIT: index, OTHER: rows[order]}, {FACTOR: factor})

    return Written(payload[2], units)


HEADS = EditTable(EntryKind.HEADS, _write, HeadRule, apart, whole_rows=False)

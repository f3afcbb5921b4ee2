"""Lays a program out for the kernels: its items, its columns, and the masks of its rows.

An item is anything with a scope: an edit, the condition of a gate, an abort condition, a readout. Its number is its bit
in the mask of a row. Columns are numbers of a row that kernels write: whether conditions hold, and values of readouts.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from patchclamp_server.interventions.bound import BoundProgram, BoundReadout
from patchclamp_server.interventions.kinds import READOUT_TABLES
from patchclamp_server.interventions.program import Scope
from patchclamp_server.interventions.scopes import SequenceTokens, scope_mask
from patchclamp_server.model.arrays import IntArray

WORD = 64


@dataclass(frozen=True, eq=False)
class ProgramLayout:
    bound: BoundProgram

    @cached_property
    def scopes(self) -> tuple[Scope, ...]:
        """Returns the scope of every item: edits, then gates, aborts and readouts."""
        bound = self.bound
        gates = [bound.edits[i].gate for i in self.gated]
        scopes = [e.scope for e in bound.edits] + [g.scope for g in gates if g is not None]
        scopes += [a.condition.scope for a in bound.aborts]
        return (*scopes, *(r.scope for r in self.items_read))

    @cached_property
    def gated(self) -> tuple[int, ...]:
        """Returns the edits with a gate, in order: the i-th has column i of the conditions."""
        return tuple(i for i, e in enumerate(self.bound.edits) if e.gate is not None)

    @cached_property
    def items_read(self) -> tuple[BoundReadout, ...]:
        """Returns the readouts of sites: those that kernels take as they pass, then those that need whole rows."""
        return tuple(sorted(self.bound.site_readouts, key=lambda readout: not in_kernels(readout)))

    @cached_property
    def readouts(self) -> tuple[BoundReadout, ...]:
        """Returns the readouts that kernels take, which are the first ones of `items_read`."""
        return tuple(readout for readout in self.items_read if in_kernels(readout))

    @cached_property
    def n_columns(self) -> int:
        """Returns the number of columns of conditions."""
        return len(self.gated) + len(self.bound.aborts)

    def gate_item(self, edit: int) -> int:
        return len(self.bound.edits) + self.gated.index(edit)

    def abort_item(self, abort: int) -> int:
        return len(self.bound.edits) + len(self.gated) + abort

    def abort_column(self, abort: int) -> int:
        return len(self.gated) + abort

    def readout_item(self, readout: int) -> int:
        """Returns the item of a readout, given its index in `items_read`."""
        return len(self.bound.edits) + self.n_columns + readout

    @cached_property
    def reading_columns(self) -> dict[tuple[int, int], tuple[int, int]]:
        """Returns the first column and the number of columns by (readout, layer)."""
        columns: dict[tuple[int, int], tuple[int, int]] = {}
        first = 0
        for i, readout in enumerate(self.readouts):
            for layer in readout.layers:
                n = READOUT_TABLES[readout.kind].columns(readout, layer)
                columns[i, layer] = (first, n)
                first += n
        return columns

    @cached_property
    def input_columns(self) -> dict[int, tuple[int, int]]:
        """Returns the first column and the number of columns of what an edit takes from an earlier site, by edit. They
        stand behind those of readouts, and nobody is told of them."""
        columns: dict[int, tuple[int, int]] = {}
        first = sum(n for _, n in self.reading_columns.values())
        for i, edit in enumerate(self.bound.edits):
            if edit.input is not None:
                columns[i] = (first, len(edit.input.ids))
                first += len(edit.input.ids)
        return columns

    @cached_property
    def n_readings(self) -> int:
        columns = (*self.reading_columns.values(), *self.input_columns.values())
        return sum(n for _, n in columns)

    @cached_property
    def words(self) -> int:
        """Returns the number of 64-bit words in the mask of a row."""
        return max(1, -(-len(self.scopes) // WORD))

    def masks(self, sequence: SequenceTokens, positions: IntArray, token_ids: IntArray) -> IntArray:
        """Returns the masks [n, words] of tokens at `positions` [n]."""
        masks = np.zeros((len(positions), self.words), dtype=np.uint64)
        for item, scope in enumerate(self.scopes):
            inside = scope_mask(scope, sequence, positions, token_ids).astype(np.uint64)
            masks[:, item // WORD] |= inside << np.uint64(item % WORD)
        return masks.view(np.int64)


def in_kernels(readout: BoundReadout) -> bool:
    return READOUT_TABLES[readout.kind].entry.in_kernels

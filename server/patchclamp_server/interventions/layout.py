"""How a program is laid out for the kernels: its items, its columns, and the masks of its rows.

An item is anything with a scope: an edit, the condition of a gate, an abort condition, a readout. Its number is its
bit in the mask of a row. Columns are numbers of a row that kernels write: openness of conditions, values of readouts.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from patchclamp_server.interventions.bound import BoundProgram, BoundReadout
from patchclamp_server.interventions.program import NeuronReadout, ProjectionReadout, Scope
from patchclamp_server.interventions.scopes import SequenceTokens, scope_mask
from patchclamp_server.model.arrays import IntArray

WORD = 64
# Readouts that kernels take as they pass. The others need whole rows, and are observers between the kernels.
KERNEL_READOUTS = (ProjectionReadout, NeuronReadout)


@dataclass(frozen=True, eq=False)
class ProgramLayout:
    bound: BoundProgram

    @cached_property
    def scopes(self) -> tuple[Scope, ...]:
        """By item: edits, then gates, aborts and kernel readouts."""
        bound = self.bound
        gates = [bound.edits[i].gate for i in self.gated]
        scopes = [e.scope for e in bound.edits] + [g.scope for g in gates if g is not None]
        scopes += [a.condition.scope for a in bound.aborts]
        return (*scopes, *(r.scope for r in self.readouts))

    @cached_property
    def gated(self) -> tuple[int, ...]:
        """Edits with a gate, in order: the i-th has column i of the conditions."""
        return tuple(i for i, e in enumerate(self.bound.edits) if e.gate is not None)

    @cached_property
    def readouts(self) -> tuple[BoundReadout, ...]:
        return tuple(r for r in self.bound.readouts if r.kind in KERNEL_READOUTS)

    @property
    def observed(self) -> bool:
        """Whether observers must look between the kernels."""
        return len(self.readouts) < len(self.bound.site_readouts)

    @cached_property
    def n_columns(self) -> int:
        """Columns of conditions."""
        return len(self.gated) + len(self.bound.aborts)

    def gate_item(self, edit: int) -> int:
        return len(self.bound.edits) + self.gated.index(edit)

    def abort_item(self, abort: int) -> int:
        return len(self.bound.edits) + len(self.gated) + abort

    def abort_column(self, abort: int) -> int:
        return len(self.gated) + abort

    def readout_item(self, readout: int) -> int:
        """`readout` counts those of `readouts`."""
        return len(self.bound.edits) + self.n_columns + readout

    @cached_property
    def reading_columns(self) -> dict[tuple[int, int], tuple[int, int]]:
        """First column and number of columns by (readout, layer)."""
        columns: dict[tuple[int, int], tuple[int, int]] = {}
        first = 0
        for i, readout in enumerate(self.readouts):
            for layer in readout.layers:
                n = len(distinct(readout)) if readout.kind is NeuronReadout else len(readout.vectors[layer])
                columns[i, layer] = (first, n)
                first += n
        return columns

    @cached_property
    def n_readings(self) -> int:
        return sum(n for _, n in self.reading_columns.values())

    @cached_property
    def words(self) -> int:
        """Words of a row's mask."""
        return max(1, -(-len(self.scopes) // WORD))

    def masks(self, sequence: SequenceTokens, positions: IntArray, token_ids: IntArray) -> IntArray:
        """Masks [n, words] of tokens at `positions`."""
        masks = np.zeros((len(positions), self.words), dtype=np.uint64)
        for item, scope in enumerate(self.scopes):
            inside = scope_mask(scope, sequence, positions, token_ids).astype(np.uint64)
            masks[:, item // WORD] |= inside << np.uint64(item % WORD)
        return masks.view(np.int64)


def distinct(readout: BoundReadout) -> list[int]:
    """Neurons of a readout as the kernels want them: ascending, each once."""
    return sorted(set(readout.ids))

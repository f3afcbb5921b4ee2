"""These products of an MLP read the weights of active neurons only, row by row, for the CPU.

blocks.py uses `GatheredMlp` for a few rows; more rows are computed densely and masked, which is faster. A set that
stays for a sequence is compacted once, while there is room for the copies that codes need.
"""

import weakref
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from patchclamp_server.cpu.sparse.mlp import CompactMlp, SparseMlp
from patchclamp_server.cpu.sparse.output_rows import Floats
from patchclamp_server.model.decoder import Block
from patchclamp_server.model.spec import DecoderSpec
from patchclamp_server.sparsity.policy import FixedSet

# Up to so many rows, reading active neurons one row at a time is faster than a dense product of all rows.
MOST_GATHERED_ROWS = 4
COMPACT_BYTES = 1 << 30


@dataclass(frozen=True, eq=False)
class Chosen:
    """Rows of a step at one layer: `active` [n, d_ff] bool, with all rows alike where it is `fixed`."""

    rows: slice | Tensor
    active: Tensor
    fixed: FixedSet | None = None
    # These are pre-activations [n, d_ff] of all gates, where choosing computed them.
    gate: Tensor | None = None


class SparseProducts(Protocol):
    """Defines products for at most `most_rows` chosen rows of a step."""

    most_rows: int

    def gate(self, x: Tensor) -> Tensor:
        """Returns the pre-activations [n, d_ff] of all gates."""
        ...

    def inputs(self, x: Tensor, chosen: Chosen) -> Tensor:
        """Returns the input projection [n, d_ff or 2 d_ff] of x [n, d_model], 0 at neurons that are not active."""
        ...

    def outputs(self, neurons: Tensor, chosen: Chosen) -> Tensor:
        """Returns y [n, d_model] of neurons [n, d_ff], of which only active ones are read."""
        ...


@dataclass(eq=False)
class CompactBudget:
    """Counts the bytes that compact copies may still take."""

    free: int = COMPACT_BYTES

    def take(self, size: int, owner: FixedSet) -> bool:
        """Takes room and returns whether there was any; it is given back when the owner is collected."""
        if size > self.free:
            return False
        self.free -= size
        weakref.finalize(owner, self._give_back, size)
        return True

    def _give_back(self, size: int) -> None:
        self.free += size


@dataclass(eq=False)
class GatheredMlp:
    mlp: SparseMlp
    budget: CompactBudget
    compact_bytes: int
    most_rows: int = field(default=MOST_GATHERED_ROWS, init=False)

    @classmethod
    def of(cls, block: Block, spec: DecoderSpec, budget: CompactBudget) -> "GatheredMlp":
        mlp = SparseMlp(block.mlp_input, block.mlp_output, spec.activation, gated=spec.family.gated)
        return cls(mlp, budget, mlp.compact_bytes)

    def gate(self, x: Tensor) -> Tensor:
        return self.mlp.gate(x).to(x.dtype)

    def inputs(self, x: Tensor, chosen: Chosen) -> Tensor:
        # This is numpy, which takes a tenth of torch's time to put a few hundred numbers in their places.
        hidden = np.zeros((len(x), 2 if self.mlp.gated else 1, self.mlp.d_ff), dtype=np.float32)
        if chosen.fixed is not None:
            compact = self._compact(chosen.fixed)
            index = chosen.fixed.index
            z = self.mlp.preactivations(x, index) if compact is None else compact.preactivations(x)
            self._spread(z, index, hidden)
            return torch.from_numpy(hidden).view(len(x), -1).to(x.dtype)
        for i, active in enumerate(chosen.active):
            index = active.nonzero()[:, 0]
            gate = None if chosen.gate is None else chosen.gate[i : i + 1].float()
            self._spread(self.mlp.preactivations(x[i : i + 1], index, gate), index, hidden[i : i + 1])
        return torch.from_numpy(hidden).view(len(x), -1).to(x.dtype)

    def outputs(self, neurons: Tensor, chosen: Chosen) -> Tensor:
        if chosen.fixed is not None:
            compact = self._compact(chosen.fixed)
            index = chosen.fixed.index
            h = neurons.index_select(1, index)
            return self.mlp.output(h, index) if compact is None else compact.output(h)
        rows = []
        for i, active in enumerate(chosen.active):
            index = active.nonzero()[:, 0]
            rows.append(self.mlp.output(neurons[i : i + 1].index_select(1, index), index))
        return torch.cat(rows)

    def _spread(self, z: Tensor, index: Tensor, hidden: Floats) -> None:
        """Writes z [n, K], or [n, 2 K] with the gates first, to its places in hidden [n, 1 or 2, d_ff]."""
        parts = z.float().numpy().reshape(len(hidden), hidden.shape[1], len(index))
        hidden[:, :, index.numpy()] = parts

    def _compact(self, fixed: FixedSet) -> CompactMlp | None:
        """Returns the copy of this set, where there is room for one; a set of all neurons needs none."""
        if fixed.prepared is None:
            whole = len(fixed.index) == self.mlp.d_ff
            size = self.compact_bytes * len(fixed.index) // self.mlp.d_ff
            fixed.prepared = not whole and self.budget.take(size, fixed) and self.mlp.compact(fixed.index)
        return fixed.prepared or None

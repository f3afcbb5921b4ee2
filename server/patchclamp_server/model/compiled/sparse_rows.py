"""Rows of a step whose MLPs keep the neurons that add most, computed in 8-bit activations (cpu/sparse/glanced_mlp.py).

    hidden = input projection of round(x);  h = act(hidden), 0 but for the k largest |h_j| ‖W_out[:, j]‖
    y = output projection of round(h), of which only the neurons that are not 0 are read

Edits at the neurons come after the choice, and forced neurons are kept besides. Where a layer has no copy from which
kept neurons can be read, its output projection is a product of all neurons, zeros among them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from patchclamp_server.cpu.integers.products import record_bytes
from patchclamp_server.cpu.sparse.glanced import GlancedCodes
from patchclamp_server.cpu.sparse.glanced_mlp import GlancedMlp
from patchclamp_server.cpu.sparse.kept import SUMS, UNIT
from patchclamp_server.cpu.vector import LANES
from patchclamp_server.model.compiled.job import Job, SparseLayer
from patchclamp_server.model.compiled.sparse_stages import run_sparse

assert run_sparse.address is not None
RUN_SPARSE = int(run_sparse.address)
# What a layer has in a step: sparse rows, whose neurons are read by row, and dense rows besides.
DENSE, SPARSE, BY_ROW, MIXED = 0, 1, 2, 4


class SparseTables:
    """What compiled code knows of the MLPs of all layers."""

    def __init__(self, layers: Sequence[GlancedMlp]) -> None:
        self.layers = layers
        self.table = np.zeros((len(layers), len(SparseLayer)), dtype=np.int64)
        for own, mlp in zip(self.table, layers, strict=True):
            own[SparseLayer.INPUT_PARTS], own[SparseLayer.N_INPUT_PARTS] = _parts(mlp.inputs.parts)
            own[SparseLayer.OUTPUT_PARTS], own[SparseLayer.N_OUTPUT_PARTS] = _parts(mlp.outputs.parts)
            own[SparseLayer.NORMS] = mlp.norms.ctypes.data
            if mlp.tiles is not None:
                _set_tiles(own, mlp.tiles)
            if (kept := mlp.kept) is not None:
                own[SparseLayer.CODES], own[SparseLayer.RECORD] = kept.records.ctypes.data, kept.records.strides[0]
                own[SparseLayer.SCALES], own[SparseLayer.HALVES] = kept.scales.ctypes.data, kept.scales.itemsize == 2
                own[SparseLayer.GROUP], own[SparseLayer.GROUPS] = kept.group, len(kept.scales)
                own[SparseLayer.UNITS] = kept.units

    @property
    def reads_by_row(self) -> NDArray[np.bool_]:
        """Whether each layer has a copy from which kept neurons can be read."""
        found: NDArray[np.bool_] = self.table[:, SparseLayer.CODES] != 0
        return found


def preview_table(tiles: GlancedCodes, place: int) -> NDArray[np.int64]:
    """Returns a table whose last row, at `place`, has a product from these tiles alone."""
    table = np.zeros((place + 1, len(SparseLayer)), dtype=np.int64)
    _set_tiles(table[place], tiles)
    return table


def _set_tiles(own: NDArray[np.int64], tiles: GlancedCodes) -> None:
    own[SparseLayer.TILES], own[SparseLayer.TILE_BYTES] = tiles.tiles.ctypes.data, tiles.tiles.strides[0]
    own[SparseLayer.TILE_HALVES], own[SparseLayer.TILE_GROUPS] = tiles.halves, tiles.groups


def _parts(parts: NDArray[np.int64]) -> tuple[int, int]:
    return parts.ctypes.data, len(parts)


@dataclass(eq=False)
class SparseRows:
    """keep [layers, T] int64: the neurons that a row keeps at a layer, or -1 where it is dense. `forced` [layers, T]:
    addresses of uint8 [d_ff], or 0, which `owners` keep alive. `kept` [layers, T] is set by the step."""

    tables: SparseTables
    keep: NDArray[np.int64]
    forced: NDArray[np.int64] | None = None
    owners: object = None

    def __post_init__(self) -> None:
        self.kept = np.zeros_like(self.keep)

    @cached_property
    def kinds(self) -> bytes:
        """What stages each layer has: a byte of DENSE, or of SPARSE with BY_ROW and MIXED."""
        sparse = self.keep >= 0
        rows = sparse.sum(axis=1)
        kinds = SPARSE + BY_ROW * self.tables.reads_by_row + MIXED * (rows < sparse.shape[1])
        return bytes(np.where(rows > 0, kinds, DENSE).astype(np.uint8))

    def fill(self, job: NDArray[np.int64], widest: int) -> tuple[Tensor, ...]:
        """Sets the fields of a job, and returns its memory. `widest`: the inputs of the widest product of a block."""
        n, d_ff = self.keep.shape[1], int(job[Job.D_FF])
        units = max(int(self.tables.table[:, SparseLayer.UNITS].max()), 1)
        rounded = torch.empty(n, record_bytes(widest), dtype=torch.uint8)
        scores = torch.empty(n, -(-d_ff // LANES) * LANES, dtype=torch.int32)
        partials = torch.empty(n, SUMS, units * UNIT)
        job[Job.ROUNDED], job[Job.SCORES], job[Job.PARTIALS] = (
            memory.data_ptr() for memory in (rounded, scores, partials)
        )
        job[Job.SPARSE], job[Job.RUN_SPARSE] = self.tables.table.ctypes.data, RUN_SPARSE
        job[Job.KEEP], job[Job.KEPT_COUNTS] = self.keep.ctypes.data, self.kept.ctypes.data
        job[Job.FORCED] = 0 if self.forced is None else self.forced.ctypes.data
        return rounded, scores, partials

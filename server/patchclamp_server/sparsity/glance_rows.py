"""The rows of a step that compiled blocks compute by a glance (policies/glance.py): what each keeps at each layer."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from patchclamp_server.cpu.sparse.glanced_mlp import GlancedMlp
from patchclamp_server.model.compiled.sparse_rows import SparseRows, SparseTables
from patchclamp_server.model.spec import DecoderSpec
from patchclamp_server.sparsity.apply import Forced, Rows
from patchclamp_server.sparsity.policies.shares import count
from patchclamp_server.sparsity.policy import Selector


class GlanceRows:
    """Steps that follow each other mostly have the same rows: their arrays are kept."""

    def __init__(self, spec: DecoderSpec, layers: Sequence[GlancedMlp]) -> None:
        self._d_ff = spec.d_ff
        self._tables = SparseTables(layers)
        self._rows: Sequence[Rows] = ()
        self._made: SparseRows | None = None
        self._chosen: list[NDArray[np.int64]] = []

    @property
    def rows(self) -> SparseRows:
        assert self._made is not None
        return self._made

    def follow(self, rows: Sequence[Rows], n: int) -> None:
        """Makes `rows` those of a step of n rows."""
        if self._made is None or self._made.keep.shape[1] != n or not _same(self._rows, rows):
            self._made = made = self._make(rows, n)
            # Where a row is dense, none of it counts as kept.
            self._chosen = [(made.keep[:, part.rows] >= 0).sum(axis=1) for part in rows]
        self._rows = rows

    def count(self) -> None:
        """Tells the sequences what the step kept."""
        kept = self.rows.kept
        for part, chosen in zip(self._rows, self._chosen, strict=True):
            part.state.add_glanced(chosen, kept[:, part.rows].sum(axis=1) / self._d_ff)

    def _make(self, rows: Sequence[Rows], n: int) -> SparseRows:
        layers = len(self._tables.layers)
        keep, forced = np.full((layers, n), -1, dtype=np.int64), np.zeros((layers, n), dtype=np.int64)
        owners = []
        for part in rows:
            keep[:, part.rows] = _kept(part.selector, self._d_ff)[:, None]
            for layer, mask in self._masks(part.forced).items():
                if mask is None:
                    keep[layer, part.rows] = -1
                else:
                    owners.append(mask)
                    forced[layer, part.rows] = mask.data_ptr()
        return SparseRows(self._tables, keep, forced if owners else None, owners)

    def _masks(self, forced: Forced) -> dict[int, Tensor | None]:
        """Returns masks [d_ff] uint8 of what is forced at layers; None stands for all."""
        found: dict[int, Tensor | None] = {}
        for layer, neurons in forced.items():
            if neurons is None:
                found[layer] = None
            elif len(neurons):
                mask = found[layer] = torch.zeros(self._d_ff, dtype=torch.uint8)
                mask[neurons] = 1
        return found


def _kept(selector: Selector, d_ff: int) -> NDArray[np.int64]:
    return np.array([-1 if keep >= 1.0 else count(keep, d_ff) for keep in selector.keep], dtype=np.int64)


def _same(own: Sequence[Rows], other: Sequence[Rows]) -> bool:
    return len(own) == len(other) and all(
        a.rows == b.rows and a.selector is b.selector and a.forced is b.forced for a, b in zip(own, other, strict=True)
    )

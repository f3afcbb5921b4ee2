"""Block tables and masks of one step: what attention reads besides queries, keys and values."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from patchclamp_server.model.arrays import IntArray


@dataclass(frozen=True, eq=False)
class Span:
    """Rows [start, start + n) of the batch are consecutive tokens of one sequence, the first at position `offset`."""

    start: int
    n: int
    offset: int
    blocks: list[int]


# Rows of one sequence whose keys are read together.
_TILE_ROWS = 8


class AttentionBatch:
    """Block tables and masks of one step, shared by all layers; those that are asked for."""

    def __init__(self, spans: list[Span], block_size: int, windows: set[int], device: torch.device) -> None:
        self.spans = spans
        self.single = [s for s in spans if s.n == 1]
        if any(s.n == 1 and s.start != i for i, s in enumerate(self.single)):
            raise ValueError("single-token spans must be the first rows of the batch")
        self.device = device
        self.windows = windows
        self.block_size = block_size
        self._gathered: Tensor | None = None
        self._masks: dict[int, Tensor] = {}

    @cached_property
    def tables(self) -> IntArray:
        """Block tables of all spans, padded with block 0."""
        return _tables(self.spans, self.block_size)

    @cached_property
    def tiles(self) -> IntArray:
        """[n, 4]: sequence, first row, number of rows and position of the first, of rows that follow each other."""
        tiles = [
            (i, s.start + row, min(_TILE_ROWS, s.n - row), s.offset + row)
            for i, s in enumerate(self.spans)
            for row in range(0, s.n, _TILE_ROWS)
        ]
        # The last rows of a prompt see the most keys: each half of the tiles has as many of them.
        tiles = tiles[::2] + tiles[1::2][::-1]
        return np.array(tiles, dtype=np.int64).reshape(-1, 4)

    @cached_property
    def n_keys(self) -> int:
        """Keys that are read, once for each tile."""
        return int((self.tiles[:, 2] + self.tiles[:, 3]).sum())

    @cached_property
    def chunks(self) -> "list[_Chunk]":
        return [_Chunk(s, self.block_size, self.windows, self.device) for s in self.spans if s.n > 1]

    @cached_property
    def single_tables(self) -> IntArray:
        return _tables(self.single, self.block_size)

    @cached_property
    def positions(self) -> IntArray:
        """Those of the single-token rows."""
        return np.array([s.offset for s in self.single], dtype=np.int64)

    @property
    def gathered(self) -> Tensor:
        """The tables of single-token rows as one index of blocks."""
        if self._gathered is None:
            self._gathered = torch.from_numpy(self.single_tables.reshape(-1)).to(self.device)
        return self._gathered

    def mask(self, window: int) -> Tensor:
        """[single rows, 1, 1, keys]: 0 where a row sees a key of `gathered`, -inf elsewhere."""
        if window not in self._masks:
            positions = self.positions[:, None]
            visible = is_visible(positions, np.arange(self.single_tables.shape[1] * self.block_size)[None], window)
            mask = np.where(visible, np.float32(0), np.float32("-inf"))
            self._masks[window] = torch.from_numpy(mask).to(self.device)[:, None, None]
        return self._masks[window]


def _tables(spans: list[Span], block_size: int) -> IntArray:
    used = [(s.offset + s.n - 1) // block_size + 1 for s in spans]
    tables = np.zeros((len(spans), max(used, default=0)), dtype=np.int64)
    for table, s, n in zip(tables, spans, used, strict=True):
        table[:n] = s.blocks[:n]
    return tables


class _Chunk:
    def __init__(self, span: Span, block_size: int, windows: set[int], device: torch.device) -> None:
        self.offset = span.offset
        self.rows = slice(span.start, span.start + span.n)
        self.length = span.offset + span.n
        n_blocks = (self.length + block_size - 1) // block_size
        self.table = torch.tensor(span.blocks[:n_blocks], dtype=torch.int64, device=device)
        # The first chunk of a prompt needs no cache: its keys are its own rows.
        self.fresh = span.offset == 0
        positions = torch.arange(span.offset, self.length, device=device)[:, None]
        keys = torch.arange(self.length, device=device)[None]
        self.masks: dict[int, Tensor | None] = {}
        for window in windows:
            if self.fresh and (not window or self.length <= window):
                self.masks[window] = None
                continue
            self.masks[window] = torch.where(is_visible(positions, keys, window), 0.0, float("-inf"))


def is_visible(positions: Any, keys: Any, window: int) -> Any:
    """Whether a row at `positions` [n, 1] sees keys [1, m]; both arrays or both tensors."""
    visible = keys <= positions
    return visible & (positions - keys < window) if window else visible

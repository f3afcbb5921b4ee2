"""The block tables and masks of one step are what attention reads besides queries, keys and values."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from patchclamp_server.model.arrays import IntArray
from patchclamp_server.model.attention.parts import Parts, parts_of
from patchclamp_server.model.attention.spans import Span, Spans

# The keys of so many rows of one sequence are read together.
_TILE_ROWS = 16


class AttentionBatch:
    """Makes the block tables and masks of one step when they are first asked for; all layers share them."""

    def __init__(self, spans: Spans | Sequence[Span], block_size: int, windows: set[int], device: torch.device) -> None:
        self.spans = spans if isinstance(spans, Spans) else Spans.of(spans, block_size)
        self.n_single = self.spans.n_single
        self.device = device
        self.windows = windows
        self.block_size = block_size
        self._gathered: Tensor | None = None
        self._masks: dict[int, Tensor] = {}
        self._parts: dict[tuple[int, int], Parts] = {}

    @property
    def tables(self) -> IntArray:
        """The block tables of all spans."""
        return self.spans.tables

    @cached_property
    def tiles(self) -> IntArray:
        """Tiles [n, 4] of consecutive rows: sequence, first row, number of rows, position of the first row."""
        n, starts, offsets = self.spans.n, self.spans.starts, self.spans.offsets
        first = np.arange(self.n_single)
        single = np.stack((first, starts[: len(first)], n[: len(first)], offsets[: len(first)]), axis=1)
        chunks = [
            (i, starts[i] + row, min(_TILE_ROWS, n[i] - row), offsets[i] + row)
            for i in range(self.n_single, len(n))
            for row in range(0, n[i], _TILE_ROWS)
        ]
        tiles = np.concatenate((single, np.array(chunks, dtype=np.int64).reshape(-1, 4)))
        # The last rows of a prompt see the most keys, so they are dealt evenly to both halves of the tiles.
        return np.concatenate((tiles[::2], tiles[1::2][::-1]))

    def parts(self, n_kv: int, threads: int) -> Parts:
        """The tiles of KV heads as parts for so many threads."""
        if (n_kv, threads) not in self._parts:
            self._parts[n_kv, threads] = parts_of(self.tiles, n_kv, threads)
        return self._parts[n_kv, threads]

    @cached_property
    def n_keys(self) -> int:
        """Counts the keys that are read, once for each tile."""
        return int((self.tiles[:, 2] + self.tiles[:, 3]).sum())

    @cached_property
    def chunks(self) -> "list[_Chunk]":
        spans = self.spans
        every = zip(spans.starts.tolist(), spans.n.tolist(), spans.offsets.tolist(), spans.tables, strict=True)
        rest = list(every)[self.n_single :]
        return [_Chunk(*span, self.block_size, self.windows, self.device) for span in rest]

    @cached_property
    def single_tables(self) -> IntArray:
        used = int(self.positions.max(initial=-1)) // self.block_size + 1
        return self.tables[: self.n_single, :used]

    @cached_property
    def positions(self) -> IntArray:
        """The positions of the single-token rows."""
        return self.spans.offsets[: self.n_single]

    @property
    def gathered(self) -> Tensor:
        """The tables of single-token rows as one index of blocks."""
        if self._gathered is None:
            self._gathered = torch.from_numpy(self.single_tables.reshape(-1)).to(self.device)
        return self._gathered

    def mask(self, window: int) -> Tensor:
        """Returns a mask [single rows, 1, 1, keys]: 0 where a row sees a key of `gathered`, -inf elsewhere."""
        if window not in self._masks:
            positions = self.positions[:, None]
            visible = is_visible(positions, np.arange(self.single_tables.shape[1] * self.block_size)[None], window)
            mask = np.where(visible, np.float32(0), np.float32("-inf"))
            self._masks[window] = torch.from_numpy(mask).to(self.device)[:, None, None]
        return self._masks[window]


class _Chunk:
    def __init__(
        self,
        start: int,
        n: int,
        offset: int,
        table: IntArray,
        block_size: int,
        windows: set[int],
        device: torch.device,
    ) -> None:
        self.offset = offset
        self.rows = slice(start, start + n)
        self.length = offset + n
        n_blocks = (self.length + block_size - 1) // block_size
        self.table = torch.from_numpy(table[:n_blocks]).to(device)
        # The first chunk of a prompt needs no cache, because its keys are its own rows.
        self.fresh = offset == 0
        positions = torch.arange(offset, self.length, device=device)[:, None]
        keys = torch.arange(self.length, device=device)[None]
        self.masks: dict[int, Tensor | None] = {}
        for window in windows:
            if self.fresh and (not window or self.length <= window):
                self.masks[window] = None
                continue
            self.masks[window] = torch.where(is_visible(positions, keys, window), 0.0, float("-inf"))


def is_visible(positions: Any, keys: Any, window: int) -> Any:
    """Returns whether a row at `positions` [n, 1] sees keys [1, m]; both are arrays or both are tensors."""
    visible = keys <= positions
    return visible & (positions - keys < window) if window else visible

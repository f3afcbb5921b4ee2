"""The attention of a step in parts that threads take: a tile of rows, some KV heads, and a range of its chunks of keys.

How a step is cut changes no bits, because chunks are always those of row_attention.py, and merged in their order.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from patchclamp_server.model.arrays import IntArray

CHUNK = 256  # keys whose weights are computed together
RECORD = 16  # numbers of a record of a query and a chunk, behind its sums of values
# A part is about so small a share of what a thread has to do, and has at least so many keys times rows.
_SHARES = 4
_LEAST = 256
# Columns of `items`.
TILE, FIRST_KV, LAST_KV, FIRST_CHUNK, LAST_CHUNK, COUNTER, OF, RECORDS = range(8)


@dataclass(frozen=True, eq=False)
class Parts:
    """`items` [n, 8]: the tile, its first KV head and the one after its last, its first chunk and the one after its
    last, and where a tile's chunks are dealt to several parts: a counter (else -1), how many parts there are, and the
    first of the records, each for a token row, that all of them share."""

    items: IntArray
    n_counters: int
    n_records: int

    def memory(self, group: int, width: int) -> tuple[IntArray, NDArray[np.float32]]:
        """Returns zeroed counters, and memory for the records of `group` query heads, for one use at a time."""
        records = np.empty(self.n_records * group * (width + RECORD), dtype=np.float32)
        return np.zeros(self.n_counters, dtype=np.int64), records


def parts_of(tiles: IntArray, n_kv: int, threads: int) -> Parts:
    """Cuts the tiles [n, 4] of a step (batch.py) for so many threads."""
    rows, keys = tiles[:, 2], tiles[:, 2] + tiles[:, 3]
    chunks = -(-keys // CHUNK)
    cost = rows * keys
    limit = max(int(cost.sum()) * n_kv // (threads * _SHARES), _LEAST)
    # 0: all KV heads are one part, because what one row does is little.
    pieces = np.minimum(-(-cost // limit), chunks)
    pieces[(rows == 1) & (cost * n_kv <= limit)] = 0
    if threads == 1:
        pieces = np.minimum(pieces, 1)
    counts = np.where(pieces == 0, 1, pieces * n_kv)
    tile = np.repeat(np.arange(len(tiles)), counts)
    within = np.arange(len(tile)) - np.repeat(np.cumsum(counts) - counts, counts)
    of = np.maximum(pieces, 1)[tile]
    whole = pieces[tile] == 0
    kv, piece = within // of, within % of
    shared = np.where(pieces > 1, n_kv, 0)
    counters = (np.cumsum(shared) - shared)[tile] + kv
    own = rows * chunks
    records = (np.cumsum(own * shared) - own * shared)[tile] + own[tile] * kv
    items = np.empty((len(tile), 8), dtype=np.int64)
    items[:, TILE], items[:, FIRST_KV], items[:, LAST_KV] = tile, kv, np.where(whole, n_kv, kv + 1)
    items[:, FIRST_CHUNK], items[:, LAST_CHUNK] = piece * chunks[tile] // of, (piece + 1) * chunks[tile] // of
    items[:, COUNTER], items[:, OF], items[:, RECORDS] = np.where(of > 1, counters, -1), of, records
    return Parts(items, int(shared.sum()), int((own * shared).sum()))

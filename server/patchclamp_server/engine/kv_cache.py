"""The blocks of the paged KV cache, and the prefix cache over them.

A block holds the keys and values of `block_size` consecutive tokens of a sequence, for all layers. A full block is
known by a key that hashes the tokens up to its end and what the sequence's edits did to them, so two requests share a
block exactly when they would have computed the same numbers. Unused blocks keep their content until they are needed,
and are reused least recently used first. Block 0 is never given out (see model/attention/batch.py).
"""

import hashlib
from collections import OrderedDict

import torch
from torch import Tensor

from patchclamp_server.model.arrays import IntArray
from patchclamp_server.model.attention.pools import KvPool, Pool, TiledPool

BlockKey = bytes
ROOT_KEY: BlockKey = b""


def block_key(parent: BlockKey, token_ids: bytes, touched: bytes) -> BlockKey:
    """Returns the key of a block, given the key before it, its tokens, and the digest of the edits that touched it."""
    return hashlib.sha256(b"%d:%b%d:%b%b" % (len(parent), parent, len(touched), touched, token_ids)).digest()


class KvCache:
    """Has the pools of all layers, and counts the holders of blocks."""

    def __init__(
        self,
        *,
        n_layers: int,
        n_blocks: int,
        block_size: int,
        n_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        share_prefixes: bool = True,
        tiled: bool = False,
    ) -> None:
        """`dtype` is that of keys and values; `tiled` is for what reads them on a CPU in float32 (pools.py)."""
        self.block_size = block_size
        self.share_prefixes = share_prefixes
        shape = n_blocks, block_size, n_kv_heads, head_dim
        self.pools: list[Pool] = [
            TiledPool(*shape, dtype) if tiled else KvPool(*shape, dtype, device) for _ in range(n_layers)
        ]
        self.n_blocks = n_blocks - 1
        self._free = list(range(n_blocks - 1, 0, -1))
        self._holders = [0] * n_blocks
        self._block_of: dict[BlockKey, int] = {}
        self._key_of: dict[int, BlockKey] = {}
        # These blocks are held by nobody, but their content is still known; the least recently used is first.
        self._idle: OrderedDict[int, None] = OrderedDict()

    def warm_up(self) -> None:
        """Compiles what reads and writes tiled pools, so that no request waits for it."""
        if isinstance(self.pools[0], TiledPool):
            from patchclamp_server.model.attention.row_attention import warm_up

            warm_up(self.pools[0])

    @property
    def n_free(self) -> int:
        """Returns how many blocks can be had, those with known content included."""
        return len(self._free) + len(self._idle)

    @property
    def n_cached(self) -> int:
        return len(self._idle)

    def lookup(self, key: BlockKey) -> int | None:
        return self._block_of.get(key)

    def is_idle(self, block: int) -> bool:
        return block in self._idle

    def hold(self, block: int) -> None:
        """Adds one holder to a block that `lookup` found."""
        self._holders[block] += 1
        self._idle.pop(block, None)

    def allocate(self) -> int | None:
        """Returns a block with unknown content, or None when all are held."""
        if self._free:
            block = self._free.pop()
        elif self._idle:
            block, _ = self._idle.popitem(last=False)
            self._forget(block)
        else:
            return None
        self._holders[block] = 1
        return block

    def register(self, block: int, key: BlockKey) -> None:
        """Makes the content of a full block known. The first block with a key stays the known one."""
        if self.share_prefixes and key not in self._block_of and block not in self._key_of:
            self._block_of[key] = block
            self._key_of[block] = key

    def release(self, blocks: list[int]) -> None:
        """Gives blocks back, last one first, so that the ends of prefixes are reused before their beginnings."""
        for block in reversed(blocks):
            self._holders[block] -= 1
            assert self._holders[block] >= 0
            if self._holders[block]:
                continue
            if block in self._key_of:
                self._idle[block] = None
            else:
                self._free.append(block)

    def scrub(self, blocks: list[int]) -> None:
        """Zeroes blocks: what is not finite would reach the next holder through masked positions (0 * NaN is NaN)."""
        for pool in self.pools:
            pool.clear(blocks)

    def read(self, slots: IntArray) -> list[list[Tensor]]:
        """Returns what all layers store at token addresses [n]."""
        index = torch.from_numpy(slots)
        return [pool.kept(index) for pool in self.pools]

    def write(self, slots: IntArray, kept: list[list[Tensor]]) -> None:
        """Writes back what `read` returned."""
        index = torch.from_numpy(slots)
        for pool, own in zip(self.pools, kept, strict=True):
            pool.restore(index, own)

    def _forget(self, block: int) -> None:
        key = self._key_of.pop(block)
        del self._block_of[key]

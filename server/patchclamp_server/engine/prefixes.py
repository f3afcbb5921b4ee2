"""Finds which blocks of a sequence's beginning are known, or will be, and which it makes known to others."""

from collections.abc import Iterable

from patchclamp_server.engine.kv_cache import BlockKey, KvCache
from patchclamp_server.engine.sequence import Sequence


class Coming:
    """Holds the keys of blocks that running sequences will make known soon: who needs one of them waits for it, unless
    it is more urgent than all that compute it."""

    def __init__(self) -> None:
        self._priorities: dict[BlockKey, int] = {}

    def add(self, keys: Iterable[BlockKey], sequence: Sequence) -> None:
        priority = int(sequence.request.priority)
        for key in keys:
            self._priorities[key] = min(priority, self._priorities.get(key, priority))

    def has(self, key: BlockKey | None, sequence: Sequence) -> bool:
        priority = None if key is None else self._priorities.get(key)
        return priority is not None and priority <= sequence.request.priority


class Prefixes:
    def __init__(self, cache: KvCache) -> None:
        self._cache, self._size = cache, cache.block_size

    def lookup(self, sequence: Sequence) -> list[int]:
        """Returns the known blocks at the start of the sequence."""
        hit: list[int] = []
        if not self._cache.share_prefixes:
            return hit
        until = sequence.reusable_until()
        if len(sequence.keys) * self._size < until:
            sequence.extend_keys(until, self._size)
        for key in sequence.keys[: until // self._size]:
            block = self._cache.lookup(key)
            if block is None:
                break
            hit.append(block)
        return hit

    def coming(self, running: Iterable[Sequence]) -> Coming:
        coming = Coming()
        for sequence in running:
            if sequence.computed < sequence.prompt_length:
                coming.add(self.prompt_keys(sequence), sequence)
        return coming

    def prompt_keys(self, sequence: Sequence) -> list[BlockKey]:
        """Returns the keys of the blocks that computing the rest of the prompt will make known."""
        if not self._cache.share_prefixes:
            return []
        return sequence.keys[sequence.computed // self._size : sequence.prompt_length // self._size]

    def next_key(self, sequence: Sequence, index: int) -> BlockKey | None:
        reusable = sequence.reusable_until() // self._size
        return sequence.keys[index] if self._cache.share_prefixes and index < reusable else None

    def register(self, sequence: Sequence, first: int) -> None:
        """Makes the full blocks of a sequence known, from number `first` on."""
        full = min(sequence.computed, sequence.shareable_until()) // self._size
        sequence.extend_keys(full * self._size, self._size)
        for i in range(first, full):
            self._cache.register(sequence.blocks[i], sequence.keys[i])

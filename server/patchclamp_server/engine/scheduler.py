"""Which tokens of which sequences run in the next step.

Running sequences come first, by priority and arrival: one token each for those that decode, then chunks of prompts as
the token budget allows; then waiting sequences are admitted. When blocks run out, the running sequence that would be
served last gives up its own and is computed again later (preemption by recomputation); so does one of a lower priority
when a request of a higher one waits for a place.
"""

from dataclasses import dataclass

from patchclamp_server.engine.kv_cache import BlockKey, KvCache
from patchclamp_server.engine.sequence import Sequence, Status


@dataclass(frozen=True, eq=False)
class Work:
    """The next `n` tokens of a sequence."""

    sequence: Sequence
    n: int


class Scheduler:
    def __init__(self, cache: KvCache, *, max_sequences: int, max_tokens: int) -> None:
        self.cache = cache
        self.max_sequences = max_sequences
        self.max_tokens = max_tokens
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.preemptions = 0
        self.prefix_hit_tokens = 0

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Takes a sequence out, whatever it does; its blocks are free at once."""
        if sequence.status is Status.RUNNING:
            self.running.remove(sequence)
        elif sequence.status is Status.WAITING:
            self.waiting.remove(sequence)
        sequence.status = Status.FINISHED
        self._release(sequence)

    def schedule(self) -> list[Work]:
        """Single tokens first, then chunks. Every sequence named has the blocks for its tokens."""
        budget = self.max_tokens
        self._give_way()
        before = self.preemptions
        self.running.sort(key=lambda s: s.priority)
        work: list[Work] = []
        # Decoding sequences first: they have a client waiting for every token.
        for sequence in sorted(self.running, key=lambda s: s.remaining > 1):
            if budget <= 0:
                break
            if sequence.status is not Status.RUNNING or not sequence.runnable:
                continue
            n = min(sequence.chunk, budget)
            if self._reserve(sequence, n):
                work.append(Work(sequence, n))
                budget -= n
        if self.preemptions == before:
            # Blocks are short otherwise, and who was preempted must not come back in the same step.
            self._admit(work, budget)
        work = [w for w in work if w.sequence.status is Status.RUNNING]
        return sorted(work, key=lambda w: w.n > 1)

    def _admit(self, work: list[Work], budget: int) -> None:
        self.waiting.sort(key=lambda s: s.priority)
        # Keys of blocks that running sequences will know soon: who needs one of them waits for it.
        coming = self._coming()
        for sequence in list(self.waiting):
            if budget <= 0 or len(self.running) >= self.max_sequences:
                break
            if not sequence.runnable:
                continue
            hit = self._lookup(sequence)
            if self._next_key(sequence, len(hit)) in coming:
                continue
            n = min(sequence.chunk_from(len(hit) * self.cache.block_size), budget)
            if not self._has_room(hit, n) and not (self._displace(sequence) and self._has_room(hit, n)):
                break
            self._start(sequence, hit)
            coming |= self._prompt_keys(sequence)
            self._reserve(sequence, n)
            work.append(Work(sequence, n))
            budget -= n

    def _give_way(self) -> None:
        """When every place is taken, work of a lower priority makes room for a waiting request of a higher one."""
        ready = [s for s in self.waiting if s.runnable]
        if ready and len(self.running) >= self.max_sequences:
            self._displace(min(ready, key=lambda s: s.priority))

    def _displace(self, sequence: Sequence) -> bool:
        """Preempts the running sequence that is served last, if its priority is lower."""
        victim = max(self.running, key=lambda s: s.priority, default=None)
        if victim is None or victim.request.priority <= sequence.request.priority:
            return False
        self._preempt(victim)
        return True

    def _has_room(self, hit: list[int], n: int) -> bool:
        """Blocks for `n` tokens after those in `hit`, which may be idle and are then not free."""
        needed = self._blocks_for(len(hit) * self.cache.block_size + n) - len(hit)
        return needed <= self.cache.n_free - sum(1 for block in hit if self.cache.is_idle(block))

    def _lookup(self, sequence: Sequence) -> list[int]:
        """Known blocks at the start of the sequence."""
        size = self.cache.block_size
        hit: list[int] = []
        if not self.cache.share_prefixes:
            return hit
        until = sequence.reusable_until()
        if len(sequence.keys) * size < until:
            sequence.extend_keys(until, size)
        for key in sequence.keys[: until // size]:
            block = self.cache.lookup(key)
            if block is None:
                break
            hit.append(block)
        return hit

    def _start(self, sequence: Sequence, hit: list[int]) -> None:
        size = self.cache.block_size
        for block in hit:
            self.cache.hold(block)
        sequence.blocks = list(hit)
        sequence.computed = len(hit) * size
        if hit and sequence.state is not None and sequence.computed > sequence.state.counted:
            sequence.state.count_cached(
                sequence.state.counted, sequence.computed, sequence.token_array(0, sequence.computed)
            )
            sequence.state.counted = sequence.computed
        if not sequence.admitted:
            sequence.admitted = True
            sequence.cached = sequence.computed
            self.prefix_hit_tokens += sequence.computed
        if sequence.sparse is not None:
            sequence.sparse.begin()
        self.waiting.remove(sequence)
        self.running.append(sequence)
        sequence.status = Status.RUNNING

    def _coming(self) -> set[BlockKey]:
        coming: set[BlockKey] = set()
        for sequence in self.running:
            if sequence.computed < sequence.prompt_length:
                coming |= self._prompt_keys(sequence)
        return coming

    def _prompt_keys(self, sequence: Sequence) -> set[BlockKey]:
        """Keys of the blocks that computing the rest of the prompt will make known."""
        if not self.cache.share_prefixes:
            return set()
        size = self.cache.block_size
        return set(sequence.keys[sequence.computed // size : sequence.prompt_length // size])

    def _next_key(self, sequence: Sequence, index: int) -> BlockKey | None:
        reusable = sequence.reusable_until() // self.cache.block_size
        return sequence.keys[index] if self.cache.share_prefixes and index < reusable else None

    def _blocks_for(self, tokens: int) -> int:
        return -(-tokens // self.cache.block_size)

    def _reserve(self, sequence: Sequence, n: int) -> bool:
        """Blocks for the next `n` tokens; preempts others, or the sequence itself when it is the last."""
        needed = self._blocks_for(sequence.computed + n)
        while len(sequence.blocks) < needed:
            block = self.cache.allocate()
            if block is not None:
                sequence.blocks.append(block)
                continue
            victim = max(self.running, key=lambda s: s.priority)
            self._preempt(victim)
            if victim is sequence:
                return False
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self.preemptions += 1
        sequence.preemptions += 1
        self.running.remove(sequence)
        self._release(sequence)
        sequence.computed = 0
        sequence.status = Status.WAITING
        self.waiting.append(sequence)

    def _release(self, sequence: Sequence) -> None:
        self.cache.release(sequence.blocks)
        sequence.blocks = []

    def finish_step(self, work: list[Work]) -> None:
        """After a step: tokens are computed, and full blocks become known to others."""
        size = self.cache.block_size
        for item in work:
            sequence = item.sequence
            before = sequence.computed // size
            sequence.computed += item.n
            if sequence.state is not None:
                sequence.state.counted = max(sequence.state.counted, sequence.computed)
            if not self.cache.share_prefixes:
                continue
            if sequence.computed // size > before:
                full = min(sequence.computed, sequence.shareable_until()) // size
                sequence.extend_keys(full * size, size)
                for i in range(before, full):
                    self.cache.register(sequence.blocks[i], sequence.keys[i])

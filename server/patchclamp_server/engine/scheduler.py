"""Which tokens of which sequences run in the next step.

Running sequences come first, by priority and arrival: one token each for those that decode, then chunks of prompts as
the token budget allows; then waiting sequences are admitted, in the turn of fair_queue.py, while the blocks that they
and the running ones are expected to need are there. While a sequence of a higher priority could run, the prompts of
lower ones have together only as many rows of a step as pace.py says, so that analysis leaves decoding its latency.

When blocks run out all the same, the running sequence that would be served last gives up its own and is computed again
later (preemption by recomputation); so does one of a lower priority when a request of a higher one waits for a place,
and one whose client keeps it waiting when any other waits.
"""

import time
from bisect import insort
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from patchclamp_server.engine.fair_queue import FairQueue
from patchclamp_server.engine.kv_cache import BlockKey, KvCache
from patchclamp_server.engine.pace import Pace
from patchclamp_server.engine.request import Priority
from patchclamp_server.engine.sequence import Sequence, Status

# A sequence whose client keeps it waiting has its place for this long.
PAUSE_SECONDS = 1.0


class Work(NamedTuple):
    """The next `n` tokens of a sequence."""

    sequence: Sequence
    n: int


def counted_tokens(work: list[Work]) -> tuple[int, int]:
    """Before a step: tokens of prompts that it computes for the first time, a baseline beside its leader having none;
    and tokens that a preemption made to be computed again."""
    new = recomputed = 0
    for sequence, n in work:
        start, reached, prompt_length = sequence.computed, sequence.reached, sequence.prompt_length
        if start < reached:
            recomputed += min(start + n, reached) - start
        if start < prompt_length and sequence.leader is None:
            new += max(0, min(start + n, prompt_length) - max(start, reached))
    return new, recomputed


@dataclass(eq=False)
class _Yielding:
    """Rows that prompts of a lower priority than `highest` may still have in this step. A single token is no prompt."""

    highest: Priority | None
    rows: int

    def allow(self, sequence: Sequence, n: int) -> int:
        return min(n, self.rows) if self._concerns(sequence) else n

    def take(self, sequence: Sequence, n: int) -> None:
        if self._concerns(sequence):
            self.rows -= n

    def _concerns(self, sequence: Sequence) -> bool:
        return self.highest is not None and sequence.request.priority > self.highest and sequence.remaining > 1


class Scheduler:
    """`expected_length`: tokens that a sequence is expected to have in the end. `is_late`: it need not start any more;
    those are left in `late` for whoever ends them."""

    def __init__(
        self,
        cache: KvCache,
        *,
        max_sequences: int,
        max_tokens: int,
        expected_length: Callable[[Sequence], int] = lambda sequence: len(sequence.tokens),
        is_late: Callable[[Sequence], bool] = lambda sequence: False,
    ) -> None:
        self.cache = cache
        self.max_sequences = max_sequences
        self.max_tokens = max_tokens
        self.waiting = FairQueue()
        # By priority and arrival.
        self.running: list[Sequence] = []
        self.expected_length = expected_length
        self._is_late = is_late
        self.late: list[Sequence] = []
        self.pace = Pace(cache.block_size)
        # In the last step a sequence that could have run was left waiting.
        self.contended = False
        # Those that the last step ran for the first time.
        self.started: list[Sequence] = []
        self.preemptions = 0
        self.prefix_hit_tokens = 0

    def add(self, sequence: Sequence) -> None:
        self.waiting.add(sequence)

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
        self.started.clear()
        self.late.clear()
        self._note_pauses()
        self._give_way()
        before = self.preemptions
        ready = [(s, s.remaining) for s in self.running if s.paused_at is None]
        yielding = self._yielding(next((s for s, left in ready if left > 0), None))
        work: list[Work] = []
        # Decoding sequences first: they have a client waiting for every token.
        for sequence in [s for s, left in ready if left == 1]:
            if budget <= 0:
                break
            has_room = sequence.computed < len(sequence.blocks) * self.cache.block_size
            if self._is_there(sequence) and (has_room or self._reserve(sequence, 1)):
                work.append(Work(sequence, 1))
                budget -= 1
        for sequence in [s for s, left in ready if left > 1]:
            if budget <= 0:
                break
            if not self._is_there(sequence):
                continue
            n = yielding.allow(sequence, min(sequence.chunk, budget))
            if n and self._reserve(sequence, n):
                work.append(Work(sequence, n))
                yielding.take(sequence, n)
                budget -= n
        self.contended = self.preemptions != before
        if not self.contended:
            # Blocks are short otherwise, and who was preempted must not come back in the same step.
            self._admit(work, budget, yielding)
        if self.preemptions != before:
            work = [w for w in work if w.sequence.status is Status.RUNNING]
        return [w for w in work if w.n == 1] + [w for w in work if w.n > 1]

    def _is_there(self, sequence: Sequence) -> bool:
        """Whether it has not been preempted in this step, nor the sequence that it follows."""
        return sequence.status is Status.RUNNING and (sequence.leader is None or sequence.remaining > 0)

    def _yielding(self, running: Sequence | None) -> "_Yielding":
        """`running`: the first of those that run and can go on."""
        ready = next((s for s in self.waiting.in_turn() if s.runnable), None)
        could_run = [s.request.priority for s in (running, ready) if s is not None]
        return _Yielding(min(could_run, default=None), self.pace.rows(self.max_tokens))

    def _admit(self, work: list[Work], budget: int, yielding: "_Yielding") -> None:
        if not len(self.waiting):
            return
        if budget <= 0 or len(self.running) >= self.max_sequences:
            self.contended = any(s.runnable for s in self.waiting.in_turn())
            return
        # Keys of blocks that running sequences will know soon: who needs one of them waits for it.
        coming = self._coming()
        for sequence in self.waiting.in_turn():
            if not sequence.runnable:
                continue
            if budget <= 0 or len(self.running) >= self.max_sequences:
                self.contended = True
                break
            if sequence.admitted_at is None and self._is_late(sequence):
                self.late.append(sequence)
                continue
            hit = self._lookup(sequence)
            if self._next_key(sequence, len(hit)) in coming:
                continue
            n = yielding.allow(sequence, min(sequence.chunk_from(len(hit) * self.cache.block_size), budget))
            if not n:
                self.contended = True
                break
            if not self._has_room(hit, n) and not (self._displace(sequence) and self._has_room(hit, n)):
                self.contended = True
                break
            if not self._can_finish(sequence, hit):
                self.contended = True
                break
            self._start(sequence, hit)
            coming |= self._prompt_keys(sequence)
            self._reserve(sequence, n)
            work.append(Work(sequence, n))
            yielding.take(sequence, n)
            budget -= n

    def _note_pauses(self) -> None:
        now = time.monotonic()
        for sequence in self.running:
            if not sequence.paused:
                sequence.paused_at = None
            elif sequence.paused_at is None:
                sequence.paused_at = now
                sequence.was_paused = True

    def _give_way(self) -> None:
        """When every place is taken, a sequence that may have to makes room for one that waits."""
        if len(self.running) >= self.max_sequences:
            ready = next((s for s in self.waiting.in_turn() if s.runnable), None)
            if ready is not None:
                self._displace(ready)

    def _displace(self, sequence: Sequence) -> bool:
        """Preempts a running sequence whose client keeps it waiting, or else the one that is served last, if its
        priority is lower."""
        victim = self._long_paused()
        if victim is None:
            victim = max(self.running, key=_priority, default=None)
            if victim is None or victim.request.priority <= sequence.request.priority:
                return False
        self._preempt(victim)
        return True

    def _long_paused(self) -> Sequence | None:
        since = time.monotonic() - PAUSE_SECONDS
        return next((s for s in self.running if s.paused_at is not None and s.paused_at <= since), None)

    def _can_finish(self, sequence: Sequence, hit: list[int]) -> bool:
        """Whether it and those that run before it are expected to come to their ends with the blocks there are.

        Each grows by a token a step and is gone when it ends, so most blocks are needed at one of the ends. Those of a
        lower priority give up theirs when it comes to it. A follower need not wait: its leader's predictions are kept
        until it comes. (The future memory of Gong et al., "Past-Future Scheduler", ASPLOS 2025.)
        """
        before = [s for s in self.running if s.request.priority <= sequence.request.priority]
        if not before or sequence.leader is not None:
            return True
        together = [*before, sequence]
        lengths = np.array([len(s.tokens) for s in together])
        left = np.array([max(1, self.expected_length(s) - len(s.tokens)) for s in together])
        # [end, sequence]: what each that has not ended before holds then.
        held = -(-(lengths + left[:, None]) // self.cache.block_size) * (left >= left[:, None])
        shared = sum(not self.cache.is_idle(block) for block in hit)
        there = self.cache.n_free + shared + sum(len(s.blocks) for s in self.running)
        return int(held.sum(axis=1).max()) <= there

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
        if sequence.admitted_at is None:
            sequence.admitted_at = time.monotonic()
            sequence.cached = sequence.computed
            if sequence.leader is None:
                self.started.append(sequence)
                self.prefix_hit_tokens += sequence.computed
        if sequence.sparse is not None:
            sequence.sparse.begin()
        self.waiting.start(sequence)
        # A prompt is paid for when it starts, so that not all places go to one tenant at once.
        self._charge(sequence, sequence.target)
        insort(self.running, sequence, key=_priority)
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

    def _charge(self, sequence: Sequence, upto: int) -> None:
        """Its tenant pays for tokens up to there, for each once, and for none that came from the prefix cache."""
        begin = max(sequence.charged, sequence.computed)
        if upto > begin:
            self.waiting.charge(sequence, upto - begin)
            sequence.charged = upto

    def _blocks_for(self, tokens: int) -> int:
        return -(-tokens // self.cache.block_size)

    def _reserve(self, sequence: Sequence, n: int) -> bool:
        """Blocks for the next `n` tokens; preempts others, or the sequence itself when it is the last."""
        size = self.cache.block_size
        while len(sequence.blocks) * size < sequence.computed + n:
            block = self.cache.allocate()
            if block is not None:
                sequence.blocks.append(block)
                continue
            victim = self._long_paused() or max(self.running, key=_priority)
            self._preempt(victim)
            if victim is sequence:
                return False
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self.preemptions += 1
        sequence.preempted_at.append(time.monotonic())
        self.running.remove(sequence)
        self._release(sequence)
        sequence.computed = 0
        sequence.paused_at = None
        sequence.status = Status.WAITING
        self.waiting.add(sequence)

    def _release(self, sequence: Sequence) -> None:
        self.cache.release(sequence.blocks)
        sequence.blocks = []

    def finish_step(self, work: list[Work]) -> None:
        """After a step: tokens are computed, and full blocks become known to others."""
        size = self.cache.block_size
        for sequence, n in work:
            before, computed = sequence.computed, sequence.computed + n
            self._charge(sequence, computed)
            sequence.computed = computed
            state = sequence.state
            if state is not None and computed > state.counted:
                state.counted = computed
            if computed // size > before // size and self.cache.share_prefixes:
                self._register(sequence, before // size)

    def _register(self, sequence: Sequence, first: int) -> None:
        """Makes its full blocks known, from number `first` on."""
        size = self.cache.block_size
        full = min(sequence.computed, sequence.shareable_until()) // size
        sequence.extend_keys(full * size, size)
        for i in range(first, full):
            self.cache.register(sequence.blocks[i], sequence.keys[i])


def _priority(sequence: Sequence) -> tuple[int, float]:
    return sequence.priority

"""Places and KV blocks of running sequences: who has them, and who gives them up for whom.

When blocks run out, the running sequence that would be served last gives up its own and is computed again later
(preemption by recomputation); so does one of a lower priority when a request of a higher one waits for a place, and one
whose client keeps it waiting when any other waits.

One place of several is kept for analysis while it has something to run, so that it gets on beside more clients than
there are places; what it may take of the engine there is bounded (analysis_share.py).
"""

import time
from bisect import insort

from patchclamp_server.engine.fair_queue import FairQueue
from patchclamp_server.engine.kv_cache import KvCache
from patchclamp_server.engine.request import Priority
from patchclamp_server.engine.sequence import Sequence, Status

# A sequence whose client keeps it waiting has its place for this long.
PAUSE_SECONDS = 1.0


class Places:
    def __init__(self, cache: KvCache, waiting: FairQueue, max_sequences: int) -> None:
        self._cache, self._waiting, self._n = cache, waiting, max_sequences
        # They are ordered by priority and arrival.
        self.running: list[Sequence] = []
        self.preemptions = 0
        # In the last step a client kept something more urgent than analysis waiting, which may go on any moment.
        self.pausing = False

    @property
    def are_taken(self) -> bool:
        return len(self.running) >= self._n

    @property
    def last_is_kept(self) -> bool:
        """Whether the only free place is kept for analysis that waits, since none of it runs."""
        if self._n == 1 or len(self.running) < self._n - 1 or self._analyses():
            return False
        return any(s.runnable for s in self._waiting.of(Priority.ANALYSIS))

    def _analyses(self) -> list[Sequence]:
        return [s for s in self.running if s.request.priority is Priority.ANALYSIS]

    def take(self, sequence: Sequence, hit: list[int]) -> None:
        """Lets a sequence run from now on, with the blocks that are known already."""
        for block in hit:
            self._cache.hold(block)
        sequence.blocks = list(hit)
        sequence.computed = len(hit) * self._cache.block_size
        insort(self.running, sequence, key=_priority)
        sequence.status = Status.RUNNING

    def leave(self, sequence: Sequence) -> None:
        """Ends the running of a sequence; its blocks are free at once."""
        self.running.remove(sequence)
        self._cache.release(sequence.blocks)
        sequence.blocks = []

    def note_pauses(self) -> None:
        now, self.pausing = time.monotonic(), False
        for sequence in self.running:
            if not sequence.paused:
                sequence.paused_at = None
                continue
            if sequence.paused_at is None:
                sequence.paused_at = now
                sequence.was_paused = True
            if sequence.request.priority < Priority.ANALYSIS and sequence.paused_at > now - PAUSE_SECONDS:
                self.pausing = True

    def give_way(self) -> None:
        """Makes room for one that waits when every place is taken, from a sequence that may have to give way."""
        if self.are_taken:
            ready = next((s for s in self._waiting.in_turn() if s.runnable), None)
            if ready is not None:
                analyses = self._analyses()
                self._displace(ready, kept=analyses[0] if len(analyses) == 1 < self._n else None)

    def _displace(self, sequence: Sequence, kept: Sequence | None = None) -> bool:
        """Preempts a running sequence whose client keeps it waiting, or else the one that is served last, if its
        priority is lower; `kept` is passed over."""
        victim = self._long_paused()
        if victim is None:
            victim = max((s for s in self.running if s is not kept), key=_priority, default=None)
            if victim is None or victim.request.priority <= sequence.request.priority:
                return False
        self._preempt(victim)
        return True

    def _long_paused(self) -> Sequence | None:
        since = time.monotonic() - PAUSE_SECONDS
        return next((s for s in self.running if s.paused_at is not None and s.paused_at <= since), None)

    def make_room(self, sequence: Sequence, hit: list[int], n: int) -> bool:
        """Whether there are blocks for its `n` tokens after those in `hit`, if need be by preempting another."""
        return self._has_room(hit, n) or (self._displace(sequence) and self._has_room(hit, n))

    def _has_room(self, hit: list[int], n: int) -> bool:
        """Whether there are blocks for `n` tokens after those in `hit`, which may be idle and are then not free."""
        needed = -(-n // self._cache.block_size)
        return needed <= self._cache.n_free - sum(1 for block in hit if self._cache.is_idle(block))

    def reserve(self, sequence: Sequence, n: int) -> bool:
        """Takes blocks for the next `n` tokens; preempts others, or the sequence itself when it is the last."""
        size = self._cache.block_size
        while len(sequence.blocks) * size < sequence.computed + n:
            block = self._cache.allocate()
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
        self.leave(sequence)
        sequence.computed = 0
        sequence.paused_at = None
        sequence.status = Status.WAITING
        self._waiting.add(sequence)


def _priority(sequence: Sequence) -> tuple[int, float]:
    return sequence.priority

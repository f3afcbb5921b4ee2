"""Which tokens of which sequences run in the next step.

Running sequences come first, by priority and arrival: one token each for those that decode, then chunks of prompts as
the token budget allows; then waiting sequences are admitted, in the turn of fair_queue.py, while the blocks that they
and the running ones are expected to need are there (future_memory.py). Prompts beside requests that decode, and all of
analysis, have only so many rows of a step that streams keep their latency (yielding.py).

When blocks or places run out all the same, some give up theirs (places.py).
"""

import time
from collections.abc import Callable
from typing import NamedTuple

from patchclamp_server.engine.analysis_share import AnalysisShare
from patchclamp_server.engine.fair_queue import FairQueue
from patchclamp_server.engine.future_memory import can_finish
from patchclamp_server.engine.kv_cache import KvCache
from patchclamp_server.engine.pace import Pace, StepRows
from patchclamp_server.engine.places import Places
from patchclamp_server.engine.prefixes import Prefixes
from patchclamp_server.engine.request import Priority
from patchclamp_server.engine.sequence import Sequence, Status
from patchclamp_server.engine.yielding import Yielding, unserved, yielding


class Work(NamedTuple):
    """The next `n` tokens of a sequence."""

    sequence: Sequence
    n: int


class Scheduler:
    """Decides what runs. `expected_length` gives the tokens that a sequence is expected to have in the end. `is_late`
    says that it need not start any more; those are left in `late` for whoever ends them. `analysis_slowdown`: as in
    EngineConfig."""

    def __init__(
        self,
        cache: KvCache,
        *,
        max_sequences: int,
        max_tokens: int,
        expected_length: Callable[[Sequence], int] = lambda sequence: len(sequence.tokens),
        is_late: Callable[[Sequence], bool] = lambda sequence: False,
        analysis_slowdown: float = 1.5,
    ) -> None:
        self.cache = cache
        self.prefixes = Prefixes(cache)
        self.max_tokens = max_tokens
        self.waiting = FairQueue()
        self.places = Places(cache, self.waiting, max_sequences)
        self.expected_length = expected_length
        self._is_late = is_late
        self.late: list[Sequence] = []
        self.pace = Pace(cache.block_size)
        self.share = AnalysisShare(self.pace, analysis_slowdown)
        # In the last step something more urgent than analysis could run, or had paused a moment before.
        self.serving = False
        # In the last step a sequence that could have run was left waiting.
        self.contended = False
        # These ran for the first time in the last step.
        self.started: list[Sequence] = []
        self.prefix_hit_tokens = 0

    @property
    def running(self) -> list[Sequence]:
        """Returns the running sequences, by priority and arrival."""
        return self.places.running

    @property
    def preemptions(self) -> int:
        return self.places.preemptions

    def add(self, sequence: Sequence) -> None:
        self.waiting.add(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Takes a sequence out, whatever it does; its blocks are free at once."""
        if sequence.status is Status.RUNNING:
            self.places.leave(sequence)
        elif sequence.status is Status.WAITING:
            self.waiting.remove(sequence)
        sequence.status = Status.FINISHED

    def schedule(self, *, with_analysis: bool = True) -> list[Work]:
        """Returns the work of a step: single tokens first, then chunks. Every sequence named has the blocks for its
        tokens. With `with_analysis` False the time of analysis requests is left to others."""
        self.started.clear()
        self.places.note_pauses()
        self.places.give_way()
        highest = self._most_urgent()
        served = highest is not None and highest < Priority.ANALYSIS
        self.serving = served or self.places.pausing
        if not served:
            self.share.nothing_served()
        allowed = yielding(self.pace, self.share, self.max_tokens, highest=highest, pausing=self.places.pausing)
        if not with_analysis:
            allowed.analysis = 0
        work = self._fill(allowed)
        if not work and served and with_analysis:
            # What is more urgent waits for something other than rows, perhaps for analysis.
            rows = unserved(self.pace, self.share, self.max_tokens, pausing=True)
            work = self._fill(Yielding(allowed.urgent, allowed.prompts, rows))
        return [w for w in work if w.n == 1] + [w for w in work if w.n > 1]

    def _most_urgent(self) -> Priority | None:
        """Returns the highest priority of those that could run."""
        running = next((s for s in self.running if s.paused_at is None and s.remaining > 0), None)
        waiting = next((s for s in self.waiting.in_turn() if s.runnable), None)
        return min((s.request.priority for s in (running, waiting) if s is not None), default=None)

    def _fill(self, allowed: Yielding) -> list[Work]:
        budget = self.max_tokens
        self.late.clear()
        before = self.preemptions
        ready = [(s, s.remaining) for s in self.running if s.paused_at is None]
        work: list[Work] = []
        # Decoding sequences come first: they have a client waiting for every token.
        for sequence in [s for s, left in ready if left == 1]:
            if budget <= 0:
                break
            analyses = sequence.request.priority is Priority.ANALYSIS
            if analyses and not allowed.analysis:
                break
            has_room = sequence.computed < len(sequence.blocks) * self.cache.block_size
            if self._is_there(sequence) and (has_room or self.places.reserve(sequence, 1)):
                work.append(Work(sequence, 1))
                allowed.analysis -= analyses
                budget -= 1
        if all(w.sequence.request.priority is Priority.ANALYSIS for w in work):
            # No stream waits for the end of this step.
            allowed.urgent = budget
        for sequence in [s for s, left in ready if left > 1]:
            if budget <= 0:
                break
            if not self._is_there(sequence):
                continue
            n = allowed.allow(sequence, min(sequence.chunk, budget))
            if n and self.places.reserve(sequence, n):
                work.append(Work(sequence, n))
                allowed.take(sequence, n)
                budget -= n
        self.contended = self.preemptions != before
        if not self.contended:
            # Otherwise blocks are short, and who was preempted must not come back in the same step.
            self._admit(work, budget, allowed)
        return work if self.preemptions == before else [w for w in work if w.sequence.status is Status.RUNNING]

    def _is_there(self, sequence: Sequence) -> bool:
        """Whether a sequence has not been preempted in this step, nor the sequence that it follows."""
        return sequence.status is Status.RUNNING and (sequence.leader is None or sequence.remaining > 0)

    def _admit(self, work: list[Work], budget: int, allowed: Yielding) -> None:
        if not len(self.waiting):
            return
        if budget <= 0 or self.places.are_taken:
            self.contended = any(s.runnable for s in self.waiting.in_turn())
            return
        coming = self.prefixes.coming(self.running)
        for sequence in self.waiting.in_turn():
            if not sequence.runnable:
                continue
            if budget <= 0 or self.places.are_taken:
                self.contended = True
                break
            analyses = sequence.request.priority is Priority.ANALYSIS
            if not allowed.allow(sequence, 1) or (self.places.last_is_kept and not analyses):
                # Those of a lower priority have rows, and perhaps a place, of their own.
                self.contended = True
                if analyses:
                    break
                continue
            if sequence.admitted_at is None and self._is_late(sequence):
                self.late.append(sequence)
                continue
            hit = self.prefixes.lookup(sequence)
            if coming.has(self.prefixes.next_key(sequence, len(hit)), sequence):
                continue
            n = allowed.allow(sequence, min(sequence.chunk_from(len(hit) * self.cache.block_size), budget))
            if not self.places.make_room(sequence, hit, n):
                self.contended = True
                break
            if not can_finish(self.cache, self.running, sequence, hit, self.expected_length):
                self.contended = True
                break
            self._start(sequence, hit)
            coming.add(self.prefixes.prompt_keys(sequence), sequence)
            self.places.reserve(sequence, n)
            work.append(Work(sequence, n))
            allowed.take(sequence, n)
            budget -= n

    def _start(self, sequence: Sequence, hit: list[int]) -> None:
        self.waiting.start(sequence)
        self.places.take(sequence, hit)
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
        # A prompt is paid for when it starts, so that not all places go to one tenant at once.
        self._charge(sequence, sequence.target)

    def _charge(self, sequence: Sequence, upto: int) -> None:
        """Charges the tenant for tokens up to `upto`, for each once, and for none that came from the prefix cache."""
        begin = max(sequence.charged, sequence.computed)
        if upto > begin:
            self.waiting.charge(sequence, upto - begin)
            sequence.charged = upto

    def finish_step(self, work: list[Work]) -> None:
        """Is called after a step: counts the tokens as computed, and makes full blocks known to others."""
        size = self.cache.block_size
        for sequence, n in work:
            before, computed = sequence.computed, sequence.computed + n
            self._charge(sequence, computed)
            sequence.computed = computed
            state = sequence.state
            if state is not None and computed > state.counted:
                state.counted = computed
            if computed // size > before // size and self.cache.share_prefixes:
                self.prefixes.register(sequence, before // size)

    def took(self, rows: StepRows, seconds: float) -> None:
        """Takes how long a step was, from which the next ones get their rows."""
        analysis = self.pace.record(rows, seconds)
        if rows.decode or rows.prompt:
            self.share.served(seconds - analysis)
            self.share.analysed(analysis)
        elif not self.serving:
            self.share.analysed_alone(analysis)

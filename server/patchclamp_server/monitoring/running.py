"""A running watch: what it has counted, its window and reference, and who follows it."""

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from random import Random

import numpy as np
import torch

from patchclamp_server.interventions.program import Phase
from patchclamp_server.monitoring.accumulator import Accumulator, Float32s
from patchclamp_server.monitoring.activations import Subscription
from patchclamp_server.monitoring.reference import Floats, Ints, Recording, Reference, total_variation
from patchclamp_server.monitoring.ring import Ring
from patchclamp_server.monitoring.statistics import Statistics
from patchclamp_server.monitoring.watch import Watch, WatchOptions

Call = Callable[[], None]


@dataclass(frozen=True)
class RunningWatch:
    """A running watch at one moment. `started` is in seconds since the epoch."""

    name: str
    watch_id: str
    watch: Watch
    options: WatchOptions
    reference_id: str
    started: float
    tokens: int


@dataclass(eq=False)
class Running:
    watch_id: str
    watch: Watch
    options: WatchOptions
    accumulator: Accumulator
    started: float = field(default_factory=time.time)
    clock: float = field(default_factory=time.monotonic)
    rows: int = 0
    recordings: list[Recording] = field(default_factory=list)
    subscriptions: list[Subscription] = field(default_factory=list)
    reference_id: str = ""
    _reference: Ints | None = None
    _drift: Floats | None = None
    # Tokens of the window that is filling, and what had been counted before it.
    _filled: int = 0
    _before: Ints = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    _random: Random = field(default_factory=lambda: Random(0))

    def __post_init__(self) -> None:
        # Whether prompt tokens and whether generated ones are watched; asked for every row.
        self._phases = Phase.PROMPT in self.options.phases, Phase.GENERATED in self.options.phases

    @classmethod
    def of(
        cls, watch_id: str, watch: Watch, options: WatchOptions, device: torch.device, *, compiled: bool
    ) -> "Running":
        thresholds = watch.thresholds.numpy()
        return cls(watch_id, watch, options, Accumulator(thresholds, options.buckets, device, compiled=compiled))

    def set_reference(self, reference: Reference, reference_id: str) -> None:
        """Drift is measured against it, over windows that begin now."""
        self.accumulator.set_edges(reference.edges.numpy())
        self.reference_id = reference_id
        self._reference, self._drift = reference.counts.numpy(), None
        self._filled, self._before = 0, self.accumulator.histogram()

    def wants(self, generated: bool) -> bool:
        """Whether a token is watched: one of its phases, and of these a random share."""
        rate = self.options.sampling_rate
        return self._phases[generated] and (rate >= 1.0 or self._random.random() < rate)

    @property
    def follows(self) -> bool:
        """Whether somebody waits for every step."""
        return bool(self.subscriptions)

    @property
    def soon(self) -> int | None:
        """Tokens after which somebody waits for the count."""
        return min(recording.left for recording in self.recordings) if self.recordings else None

    def take(self, ring: Ring, rows: Ints, columns: Ints) -> list[Call]:
        """Counts `rows` of the ring; returns who is to be told, once no lock is held."""
        calls: list[Call] = []
        if not len(rows):
            return calls
        values = _on_host(ring, rows, columns) if self.recordings or self.subscriptions else None
        for part in self._windows(len(rows)):
            self.accumulator.add(ring.values, rows[part], columns)
            self._advance(part.stop - part.start)
        if values is not None:
            calls += [call for recording in list(self.recordings) for call in self._record(recording, values)]
            for subscription in self.subscriptions:
                found = subscription.take(values, [ring.kept[row] for row in rows.tolist()])
                if found is not None:
                    calls.append(lambda tell=subscription.on_activations, found=found: tell(found))  # type: ignore[misc]
        return calls

    def _windows(self, n: int) -> Iterator[slice]:
        """n rows, cut where a window ends."""
        start = 0
        while start < n:
            end = n if self._reference is None else min(n, start + self.options.window_tokens - self._filled)
            yield slice(start, end)
            start = end

    def _advance(self, n: int) -> None:
        self.rows += n
        if self._reference is None:
            return
        self._filled += n
        if self._filled == self.options.window_tokens:
            counted = self.accumulator.histogram()
            self._drift = total_variation(counted - self._before, self._reference)
            self._filled, self._before = 0, counted

    def _record(self, recording: Recording, values: Float32s) -> list[Call]:
        recording.add(values[: recording.left])
        seen, total = recording.seen, recording.tokens
        calls: list[Call] = [lambda: recording.on_progress(seen, total)]
        if not recording.left:
            self.recordings.remove(recording)
            # It sorts what may be millions of numbers, and the engine's thread may be the one that tells.
            finish = threading.Thread(
                target=lambda: recording.on_done(recording.result()), name="patchclamp-reference", daemon=True
            )
            calls.append(finish.start)
        return calls

    def end(self) -> list[Call]:
        """Tells those who wait that nothing more comes."""
        ended: list[Call] = [lambda tell=r.on_done: tell(None) for r in self.recordings]  # type: ignore[misc]
        ended += [lambda tell=s.on_activations: tell(None) for s in self.subscriptions]  # type: ignore[misc]
        self.recordings, self.subscriptions = [], []
        return ended

    def snapshot(self) -> RunningWatch:
        return RunningWatch(
            self.options.name, self.watch_id, self.watch, self.options, self.reference_id, self.started, self.rows
        )

    def statistics(self) -> Statistics:
        sums = self.accumulator.read()
        return Statistics(
            sums.tokens,
            sums.fired,
            sums.not_finite,
            sums.total,
            sums.total_squares,
            sums.min,
            sums.max,
            self.accumulator.edges,
            sums.histogram,
            self.options.buckets,
            sums.bucket_counts[0],
            self.rows,
            self._drift,
        )


def _on_host(ring: Ring, rows: Ints, columns: Ints) -> Float32s:
    """[n, W]"""
    if ring.compiled:
        values: Float32s = ring.values[rows[:, None], columns]
        return values
    index = (torch.from_numpy(array).to(ring.device) for array in (rows, columns))
    on_host: Float32s = ring.values.index_select(0, next(index)).index_select(1, next(index)).cpu().numpy()
    return on_host

"""A running watch knows what it has counted, its window and reference, and who follows it."""

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from random import Random

import numpy as np
import torch

from patchclamp_server.interventions.program import Phase
from patchclamp_server.monitoring.accumulator import Accumulator
from patchclamp_server.monitoring.activations import Subscription
from patchclamp_server.monitoring.arrays import Float32s, Floats, Ints
from patchclamp_server.monitoring.drift import Drift, drift_of
from patchclamp_server.monitoring.outliers import Outliers
from patchclamp_server.monitoring.reference import Recording, Reference
from patchclamp_server.monitoring.ring import Columns, Ring
from patchclamp_server.monitoring.scale import (
    FirstTokens,
    Scale,
    asking,
    calibration_size,
    chosen_scale,
    scale_of_reference,
)
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
    device: torch.device
    compiled: bool
    # This is None while thresholds, buckets and the norms of outliers are being derived from the first tokens.
    accumulator: Accumulator | None = None
    first: FirstTokens | None = None
    started: float = field(default_factory=time.time)
    clock: float = field(default_factory=time.monotonic)
    rows: int = 0
    # These are rows at position 0, which are not counted otherwise.
    sinks: int = 0
    recordings: list[Recording] = field(default_factory=list)
    subscriptions: list[Subscription] = field(default_factory=list)
    reference_id: str = ""
    _reference: Reference | None = None
    _drift: Drift | None = None
    # These are the tokens of the window that is filling, and what had been counted before it.
    _filled: int = 0
    _before: Ints = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    _random: Random = field(default_factory=lambda: Random(0))

    def __post_init__(self) -> None:
        # These tell whether prompt tokens and whether generated ones are watched; every row asks for them.
        self._phases = Phase.PROMPT in self.options.phases, Phase.GENERATED in self.options.phases
        self._kind_of = self.watch.kind_of

    @classmethod
    def of(
        cls,
        watch_id: str,
        watch: Watch,
        options: WatchOptions,
        device: torch.device,
        *,
        compiled: bool,
        reference: Reference | None = None,
        reference_id: str = "",
    ) -> "Running":
        running = cls(watch_id, watch, options, device, compiled)
        outliers = None if watch.places else Outliers.none(len(watch))
        scale = chosen_scale(watch, options)
        if scale is None or outliers is None:
            running.first = FirstTokens(watch, options, outliers)
        else:
            running.accumulator = Accumulator(scale, outliers, running._kind_of, device, compiled=compiled)
        if reference is not None:
            running.set_reference(reference, reference_id)
        return running

    def set_reference(self, reference: Reference, reference_id: str) -> None:
        """Measures drift against this reference, over windows that begin now, or when the first tokens have been seen.
        The outliers follow from it, and so do thresholds and buckets where they are not known yet."""
        outliers = _outliers_of(reference, self.watch)
        if self.accumulator is not None:
            self.accumulator.set_outliers(outliers)
        else:
            assert self.first is not None
            scale = chosen_scale(self.watch, self.options) or scale_of_reference(self.watch, self.options, reference)
            self.first.known = outliers
            if scale is not None:
                self._settle(scale, outliers)
                self.first = None
        self.reference_id, self._reference, self._drift = reference_id, reference, None
        self._begin_windows()

    def _begin_windows(self) -> None:
        if self.accumulator is not None and self._reference is not None:
            self.accumulator.set_edges(self._reference.edges.numpy())
            self._filled, self._before = 0, self.accumulator.histogram()

    def _settle(self, scale: Scale, outliers: Outliers) -> None:
        """Uses this scale and these outliers from now on."""
        self.accumulator = self._counted(scale, outliers).on(self.device, compiled=self.compiled)
        for subscription in self.subscriptions:
            subscription.settle(scale.thresholds)
        self._begin_windows()

    def _counted(self, scale: Scale, outliers: Outliers) -> Accumulator:
        """Counts the first tokens on the host. Sums are added up in their order, so that they never fall."""
        assert self.first is not None
        counted = Accumulator(scale, outliers, self._kind_of, torch.device("cpu"), compiled=True)
        values, n = self.first.values, len(self.watch)
        columns = Columns.of(np.arange(n), n + np.arange(len(self.watch.places)), self.watch.place_of)
        counted.add(values, np.arange(len(values)), columns)
        return counted

    def wants(self, generated: bool) -> bool:
        """Returns whether a token is watched: it is in a watched phase, and in the random share of that."""
        rate = self.options.sampling_rate
        return self._phases[generated] and (rate >= 1.0 or self._random.random() < rate)

    @property
    def thresholds(self) -> Floats:
        """The thresholds [W]; infinite where they are still to be derived, so that nothing fires before."""
        if self.accumulator is not None:
            return self.accumulator.scale.thresholds
        waiting: Floats = np.where(asking(self.watch), np.inf, self.watch.thresholds.numpy())
        return waiting

    @property
    def follows(self) -> bool:
        """Whether somebody waits for every step."""
        return bool(self.subscriptions)

    @property
    def soon(self) -> int | None:
        """After so many tokens somebody waits for the count."""
        return min(recording.left for recording in self.recordings) if self.recordings else None

    @property
    def outliers(self) -> Outliers | None:
        """What a recording leaves out, or None where it has to find that itself: while it is not known, and beside a
        reference that was recorded before anything was left out."""
        if self.accumulator is None or (self._reference is not None and self._reference.norms is None):
            return None
        return self.accumulator.outliers

    def take(self, ring: Ring, rows: Ints, columns: Columns) -> list[Call]:
        """Counts `rows` of the ring; returns the calls that tell others, to be made once no lock is held."""
        calls: list[Call] = []
        if not len(rows):
            return calls
        asked = bool(self.recordings or self.subscriptions)
        values = norms = np.zeros((0, 0), dtype=np.float32)
        if asked or self.accumulator is None:
            values, norms = _on_host(ring, rows, columns)
        counted = self._take_first(values, norms) if self.accumulator is None else 0
        for part in self._windows(counted, len(rows)):
            assert self.accumulator is not None
            self.accumulator.add(ring.values, rows[part], columns)
            self._advance(part.stop - part.start)
        if asked:
            calls += [call for recording in list(self.recordings) for call in self._record(recording, values, norms)]
            judged = self._without_outliers(values, norms) if self.subscriptions else values
            for subscription in self.subscriptions:
                found = subscription.take(judged, [ring.kept[row] for row in rows.tolist()])
                if found is not None:
                    calls.append(lambda tell=subscription.on_activations, found=found: tell(found))  # type: ignore[misc]
        return calls

    def _take_first(self, values: Float32s, norms: Float32s) -> int:
        """Keeps those rows that are among the first tokens, and returns how many they are."""
        assert self.first is not None
        taken = min(self.first.left, len(values))
        self.first.add(values[:taken], norms[:taken])
        self.rows += taken
        if not self.first.left:
            outliers = self.first.outliers()
            self._settle(self.first.scale(outliers), outliers)
            self.first.forget()
        return taken

    def _without_outliers(self, values: Float32s, norms: Float32s) -> Float32s:
        """Returns values for those who are told at once: they do not wait until all first tokens show what an outlier
        is, but judge by those seen so far."""
        if self.accumulator is not None:
            return self.accumulator.outliers.without(values, norms)
        assert self.first is not None
        return self.first.outliers().without(values, norms)

    def _windows(self, start: int, n: int) -> Iterator[slice]:
        """Yields the rows from `start` to n, cut where a window ends."""
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
            assert self.accumulator is not None
            counted = self.accumulator.histogram()
            inflation = self._reference.inflation
            varies = np.ones(len(self.watch)) if inflation is None else inflation.numpy()
            self._drift = drift_of(counted - self._before, self._reference.counts.numpy(), varies)
            self._filled, self._before = 0, counted

    def _record(self, recording: Recording, values: Float32s, norms: Float32s) -> list[Call]:
        left = recording.left
        recording.add(values[:left], norms[:left])
        if not recording.left or recording.seen >= calibration_size(self.watch, self.options):
            recording.find_outliers(self.watch.place_of)
        seen, total = recording.seen, recording.tokens
        calls: list[Call] = [lambda: recording.on_progress(seen, total)]
        if not recording.left:
            self.recordings.remove(recording)
            # This sorts what may be millions of numbers, and the caller may be the engine's thread.
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
        """Returns the statistics; while the first tokens are being seen, as if there were no more of them."""
        accumulator = self.accumulator
        if accumulator is None:
            assert self.first is not None
            outliers = self.first.outliers()
            accumulator = self._counted(self.first.scale(outliers), outliers)
        return Statistics(
            accumulator.read(),
            accumulator.edges,
            accumulator.scale,
            self.watch.kind_names,
            self._kind_of,
            self.rows,
            self.sinks,
            0 if self.first is None else self.first.seen,
            0 if self.first is None else self.first.total,
            self._drift,
        )


def _outliers_of(reference: Reference, watch: Watch) -> Outliers:
    """Returns the outliers of a reference: none, where it was recorded before anything was left out."""
    if reference.norms is None:
        return Outliers.none(len(watch))
    return Outliers(np.where(watch.place_of < 0, 0.0, reference.norms.numpy()), watch.place_of)


def _on_host(ring: Ring, rows: Ints, columns: Columns) -> tuple[Float32s, Float32s]:
    """Returns values [n, W] and norms [n, places]."""
    both = np.concatenate((columns.items, columns.places))
    if ring.compiled:
        values: Float32s = ring.values[rows[:, None], both]
    else:
        index = (torch.from_numpy(array).to(ring.device) for array in (rows, both))
        values = ring.values.index_select(0, next(index)).index_select(1, next(index)).cpu().numpy()
    return values[:, : len(columns.items)], values[:, len(columns.items) :]

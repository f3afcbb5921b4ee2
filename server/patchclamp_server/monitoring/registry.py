"""The registry holds the running watches of an engine.

    begin(step) → places fill a ring → end(step) → counted when the ring is full, or somebody reads or waits

The engine's thread runs steps; any other may start, stop and read. Nobody waits for a step: watches are changed between
steps, and a step that runs meanwhile is counted by the watches it began with. Only served rows are watched: not those
of analysis requests and of baselines, not tokens that came from the prefix cache, and a token that is computed again
after a preemption only once. The steps of the quality guard are not reported here.
"""

import threading
from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
import torch

from patchclamp_server.errors import (
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
    Unavailable,
)
from patchclamp_server.interventions.program import Phase
from patchclamp_server.model.spec import DecoderSpec
from patchclamp_server.monitoring import accumulator, looks
from patchclamp_server.monitoring.activations import Activations, Subscription
from patchclamp_server.monitoring.layout import Layout, forced_by_watches, layout_of
from patchclamp_server.monitoring.reference import Recording, Reference
from patchclamp_server.monitoring.running import Call, Running, RunningWatch
from patchclamp_server.monitoring.statistics import Statistics
from patchclamp_server.monitoring.step import MAX_WATCHES, ServedSpan, StepWatch, awaited, counted, watched_rows
from patchclamp_server.monitoring.watch import MAX_REFERENCE_TOKENS, Watch, WatchOptions, check_watch
from patchclamp_server.sparsity.apply import Forced

# So many items of all watches may have their own series in Prometheus.
MAX_EXPORTED_ITEMS = 256


class WatchRegistry:
    """With `compiled`, numba's loops copy and count rows, as on a CPU, and not torch operators."""

    def __init__(
        self,
        spec: DecoderSpec,
        device: torch.device,
        *,
        max_watches: int,
        max_items: int,
        compiled: bool | None = None,
    ) -> None:
        if max_watches > MAX_WATCHES:
            raise ValueError(f"max_watches must be at most {MAX_WATCHES}, got {max_watches}")
        self.max_watches, self.max_items = max_watches, max_items
        # Sparse policies keep these neurons, since generated tokens are watched there. A change makes a new object.
        self.forced: Forced = {}
        self._spec, self._device = spec, device
        self._lock = threading.Lock()
        # This is held while a layout is made, for which the engine's thread does not wait; it is taken before _lock.
        self._changing = threading.Lock()
        self._watches: dict[str, Running] = {}
        # This is None while nothing is watched.
        self._current: tuple[Layout, Sequence[Running]] | None = None
        self._ended = False
        self._compiled = device.type == "cpu" if compiled is None else compiled
        if self._compiled:
            _warm_up()

    # Any thread may call the following.

    def start(
        self,
        watch_id: str,
        watch: Watch,
        options: WatchOptions,
        reference: Reference | None = None,
        reference_id: str = "",
    ) -> RunningWatch:
        """Starts a watch. Raises FailedPrecondition where it does not fit the model, the reference does not fit it, or
        the name is in use; ResourceExhausted at the caps; Unavailable once the engine has ended."""
        check_watch(watch, self._spec)
        if reference is not None:
            _check_reference(reference, watch)
        running = Running.of(
            watch_id,
            watch,
            options,
            self._device,
            compiled=self._compiled,
            reference=reference,
            reference_id=reference_id,
        )
        with self._changing:
            if self._ended:
                raise Unavailable("", "the engine has stopped")
            if options.name in self._watches:
                raise FailedPrecondition("name", f"a watch named {options.name!r} is running")
            if len(self._watches) >= self.max_watches:
                raise ResourceExhausted("name", f"{self.max_watches} watches are running, the most of this server")
            items = sum(len(other.watch) for other in self._watches.values())
            if items + len(watch) > self.max_items:
                message = f"{items} items are watched; with {len(watch)} more they would exceed {self.max_items}"
                raise ResourceExhausted("watch", message)
            if options.export_items:
                _check_exported([*self._watches.values(), running])
            snapshot = running.snapshot()
            calls = self._change({**self._watches, options.name: running})
        _tell(calls)
        return snapshot

    def stop(self, name: str) -> RunningWatch:
        """Stops a watch, returns it as it was and tells those who follow it. Raises NotFound."""
        with self._changing:
            running = self._named(name)
            calls = self._change({other: own for other, own in self._watches.items() if other != name})
            with self._lock:
                calls += running.end()
                snapshot = running.snapshot()
        _tell(calls)
        return snapshot

    def running(self) -> list[RunningWatch]:
        """Returns the watches in the order in which they were started."""
        with self._lock:
            calls = self._count()
            snapshots = [running.snapshot() for running in self._watches.values()]
        _tell(calls)
        return snapshots

    def get(self, name: str) -> RunningWatch:
        """Returns the watch of this name. Raises NotFound."""
        with self._lock:
            running = self._named(name)
            calls = self._count()
            snapshot = running.snapshot()
        _tell(calls)
        return snapshot

    def statistics(self, name: str) -> Statistics:
        """Returns the statistics of the watch of this name. Raises NotFound."""
        with self._lock:
            running = self._named(name)
            calls = self._count()
            statistics = running.statistics()
        _tell(calls)
        return statistics

    def set_reference(self, name: str, reference: Reference, reference_id: str) -> None:
        """Measures drift against this reference from now on. Raises NotFound, or FailedPrecondition for other items."""
        with self._lock:
            running = self._named(name)
            _check_reference(reference, running.watch)
            calls = self._count()
            running.set_reference(reference, reference_id)
        _tell(calls)

    def subscribe(
        self,
        name: str,
        items: Sequence[int],
        threshold: float | None,
        on_activations: Callable[[Activations | None], None],
    ) -> Callable[[], None]:
        """Delivers events of the items (of all, without any) above `threshold` or their own; returns what ends it.

        `on_activations` is mostly called on the engine's thread, and must not block; its last call gets None, when the
        watch was stopped or the engine has ended. Raises NotFound.
        """
        with self._lock:
            running = self._named(name)
            calls = self._count()
            chosen = list(items) or list(range(len(running.watch)))
            if not all(0 <= item < len(running.watch) for item in chosen):
                raise InvalidArgument("items", f"the watch has {len(running.watch)} items")
            thresholds = running.thresholds[chosen]
            if threshold is not None:
                thresholds = np.full(len(chosen), threshold)
            subscription = Subscription(chosen, thresholds, running.clock, on_activations, own=threshold is None)
            running.subscriptions.append(subscription)
        _tell(calls)
        return lambda: self._forget(running.subscriptions, subscription)

    def record_reference(
        self,
        name: str,
        tokens: int,
        on_progress: Callable[[int, int], None],
        on_done: Callable[[Reference | None], None],
    ) -> Callable[[], None]:
        """Waits for so many more tokens, and makes a reference of them. Returns what ends it.

        `on_done` is called on a thread of its own, or with None where the watch was stopped or the engine has ended.
        Raises NotFound, InvalidArgument, and FailedPrecondition while the watch records another reference.
        """
        if not 1 <= tokens <= MAX_REFERENCE_TOKENS:
            raise InvalidArgument("tokens", f"must be in [1, {MAX_REFERENCE_TOKENS}], got {tokens}")
        with self._lock:
            running = self._named(name)
            if running.recordings:
                raise FailedPrecondition("name", f"a reference of {name!r} is being recorded")
            calls = self._count()
            recording = Recording(len(running.watch), tokens, on_progress, on_done, running.outliers)
            running.recordings.append(recording)
        _tell(calls)
        return lambda: self._forget(running.recordings, recording)

    def close(self) -> None:
        """Stops all watches, because nothing will run any more."""
        with self._changing:
            self._ended = True
            watches = list(self._watches.values())
            calls = self._change({})
            with self._lock:
                calls += [call for running in watches for call in running.end()]
        _tell(calls)

    @property
    def ended(self) -> bool:
        """Whether the engine has ended; then every watch is stopped."""
        return self._ended

    # Only the engine's thread calls the following.

    @property
    def active(self) -> bool:
        """Whether anything is watched. A watch that starts now sees the next step."""
        return self._current is not None

    def begin(self, spans: Sequence[ServedSpan]) -> StepWatch | None:
        """Begins a step; `spans` are its served ones. Returns None when none of their rows is watched."""
        with self._lock:
            if self._current is None:
                return None
            layout, watches = self._current
            rows = watched_rows(spans, watches)
            if rows is None:
                return None
            calls: list[Call] = []
            if not layout.ring.has_room(len(rows)):
                calls = self._count()
                layout.ring.empty(len(rows))
            layout.looks.begin(rows)
        _tell(calls)
        return StepWatch(layout, rows, watches)

    def end(self, step: StepWatch) -> None:
        """Counts the rows of a step that has run, if somebody waits for them."""
        calls: list[Call] = []
        layout = step.layout
        with self._lock:
            layout.ring.commit(step.rows)
            if self._current is None or layout is not self._current[0]:
                # Watches were started or stopped meanwhile; the step counts for those that it began with.
                calls = counted(layout, step.watches)
            elif awaited(layout, step.watches):
                calls = self._count()
        _tell(calls)

    def _named(self, name: str) -> Running:
        running = self._watches.get(name)
        if running is None:
            raise NotFound("name", f"no watch named {name!r} is running")
        return running

    def _change(self, watches: dict[str, Running]) -> list[Call]:
        own = list(watches.values())
        current = None
        if own:
            watched = [running.watch for running in own]
            current = layout_of(watched, self._spec, self._device, compiled=self._compiled), own
        forced = forced_by_watches([r.watch for r in own if Phase.GENERATED in r.options.phases])
        with self._lock:
            calls = self._count()
            self._watches, self._current, self.forced = watches, current, forced
        return calls

    def _count(self) -> list[Call]:
        return [] if self._current is None else counted(*self._current)

    def _forget(self, among: list[Subscription] | list[Recording], one: Subscription | Recording) -> None:
        with self._lock:
            if one in among:
                among.remove(one)  # type: ignore[arg-type]


@cache
def _warm_up() -> None:
    accumulator.warm_up()
    looks.warm_up()


def _check_reference(reference: Reference, watch: Watch) -> None:
    if len(reference) != len(watch):
        raise FailedPrecondition("reference", f"is of {len(reference)} items, the watch has {len(watch)}")


def _check_exported(watches: Sequence[Running]) -> None:
    items = sum(len(running.watch) for running in watches if running.options.export_items)
    if items > MAX_EXPORTED_ITEMS:
        message = f"{items} items would have series of their own; this server exports at most {MAX_EXPORTED_ITEMS}"
        raise ResourceExhausted("export_items", message)


def _tell(calls: Sequence[Call]) -> None:
    """Calls these outside the lock, because whoever is told may ask something."""
    for call in calls:
        call()

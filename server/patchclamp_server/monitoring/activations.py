"""Whoever follows a running watch gets events: values above their thresholds."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from patchclamp_server.monitoring.arrays import Float32s, Floats, Ints, floor32
from patchclamp_server.monitoring.ring import Row

# A step may bring as many events as it has rows times the watch has items.
MAX_BATCH = 1024


@dataclass(frozen=True, eq=False)
class Activations:
    """Holds m events, oldest first, as parallel arrays. `dropped` counts the further events of this batch."""

    items: Ints
    values: Floats
    token_ids: Ints
    positions: Ints
    sequences: Ints
    generated: NDArray[np.bool_]
    times: Floats  # seconds since the watch was started
    dropped: int


class Subscription:
    """Delivers events of some items of a watch. `on_activations` must not block; its last call gets None."""

    def __init__(
        self,
        items: Sequence[int],
        thresholds: Floats,
        started: float,
        on_activations: Callable[[Activations | None], None],
        *,
        own: bool,
    ) -> None:
        """thresholds is [items]; `started` is on the clock of time.monotonic(); `own` tells that the thresholds are
        those of the watch."""
        self._items = np.array(items, dtype=np.int64)
        self._thresholds = floor32(thresholds)
        self._own = own
        self._started = started
        self.on_activations = on_activations

    def settle(self, thresholds: Floats) -> None:
        """Sets the thresholds [W] of the watch from now on."""
        if self._own:
            self._thresholds = floor32(thresholds[self._items])

    def take(self, values: Float32s, rows: Sequence[Row]) -> Activations | None:
        """Returns the events of values [n, W] of `rows`; None when nothing is above its threshold."""
        own = values[:, self._items]
        row, item = np.nonzero((own > self._thresholds) & np.isfinite(own))
        if not len(row):
            return None
        dropped = max(0, len(row) - MAX_BATCH)
        row, item = row[:MAX_BATCH], item[:MAX_BATCH]
        events = [rows[at] for at in row.tolist()]
        return Activations(
            items=self._items[item],
            values=own[row, item].astype(np.float64),
            token_ids=np.array([event.token_id for event in events]),
            positions=np.array([event.position for event in events]),
            sequences=np.array([event.sequence for event in events]),
            generated=np.array([event.generated for event in events]),
            times=np.array([event.time - self._started for event in events]),
            dropped=dropped,
        )

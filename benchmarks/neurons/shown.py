"""What the parts share: lines of progress, and measurements as rows of a result."""

import sys
import time
from itertools import pairwise
from typing import Any

from patchclamp.results import NeuronEditEffect, NeuronMeasurement

_STARTED = time.monotonic()


def say(text: str) -> None:
    print(f"[{time.monotonic() - _STARTED:6.0f} s] {text}", flush=True)


def shows_progress(event: Any) -> None:
    """Progress of a job, on one line of a terminal."""
    if sys.stderr.isatty() and hasattr(event, "stage"):
        end = "\n" if event.done >= event.total else ""
        print(f"\r{event.stage}: {event.done}/{event.total}   ", end=end, file=sys.stderr, flush=True)


def row(fraction: float, measured: NeuronMeasurement) -> dict[str, Any]:
    """What a table shows of a measurement."""
    names = ("unedited", "change", "low", "high", "random_mean", "random_deviation")
    beyond = ("beyond_random", "beyond_random_low", "beyond_random_high")
    return {"fraction": fraction} | {name: round(getattr(measured, name), 4) for name in (*names, *beyond)}


def curve(effect: NeuronEditEffect, test: str, metric: str) -> list[dict[str, Any]]:
    """A row for each fraction."""
    return [
        row(point.fraction, measured)
        for point in effect.points
        for measured in point.measurements
        if (measured.test, measured.metric) == (test, metric)
    ]


def grows(rows: list[dict[str, Any]], sign: int) -> bool:
    """Whether the change has this sign and gets no smaller with the fraction."""
    changes = [sign * each["change"] for each in rows]
    return changes[0] > 0 and all(after >= before for before, after in pairwise(changes))

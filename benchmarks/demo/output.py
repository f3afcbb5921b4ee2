"""How the demo prints."""

import sys
from typing import Any

WIDTH = 106


def heading(text: str) -> None:
    print(f"\n{text}\n{'-' * len(text)}", flush=True)


def show_progress(event: Any) -> None:
    """Progress of a job, on one line of a terminal; other events say nothing."""
    if sys.stderr.isatty() and hasattr(event, "stage"):
        end = "\n" if event.done >= event.total else ""
        print(f"\r{event.stage}: {event.done}/{event.total}", end=end, file=sys.stderr, flush=True)

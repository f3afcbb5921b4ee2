"""What the commands print: text and tables for people, one JSON value for programs, notes and progress on stderr."""

import json
import os
import sys
from collections.abc import Sequence
from typing import Any, TextIO

from patchclamp.collectors import EventT, MessageT, ResultT
from patchclamp.results import Progress
from patchclamp.streams import Stream

_STYLES = {"bold": "1", "dim": "2", "red": "31", "green": "32", "cyan": "36"}


def print_json(value: object) -> None:
    print(json.dumps(value, ensure_ascii=False, indent=2, default=_plain))


def styled(text: str, style: str, stream: TextIO) -> str:
    """ANSI on a terminal that wants it, plain text elsewhere (https://no-color.org)."""
    if not stream.isatty() or os.environ.get("NO_COLOR"):
        return text
    return f"\033[{_STYLES[style]}m{text}\033[0m"


def note(text: object) -> None:
    """A line beside the output proper: receipts, usage, what was done."""
    print(styled(str(text), "dim", sys.stderr), file=sys.stderr)


def heading(text: str) -> None:
    print(styled(text, "bold", sys.stdout))


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Columns as wide as their widest cell."""
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(header, *cells, strict=True)]
    heading("  ".join(name.ljust(width) for name, width in zip(header, widths, strict=True)).rstrip())
    for row in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


class ProgressBar:
    """Redraws itself on a terminal, with a line for each stage; silent elsewhere."""

    def __init__(self) -> None:
        self._stage = ""

    def show(self, event: object) -> None:
        """Of the events of a job, those that are progress."""
        if not isinstance(event, Progress) or not sys.stderr.isatty():
            return
        if event.stage != self._stage:
            self.close()
        filled = 24 * event.done // max(event.total, 1)
        bar = f"\r{event.stage:<12} [{'#' * filled:<24}] {event.done}/{event.total}"
        print(bar, end="", file=sys.stderr, flush=True)
        self._stage = event.stage

    def close(self) -> None:
        """What is printed next starts on a line of its own, also when a stage ended early."""
        if self._stage:
            print(file=sys.stderr)
        self._stage = ""


def job_result(stream: Stream[MessageT, EventT, ResultT]) -> ResultT:
    """The result of a job, with a bar of its progress on the way."""
    bar = ProgressBar()
    try:
        return stream.result(bar.show)
    finally:
        bar.close()


def _plain(value: Any) -> Any:
    return value.to_dict()

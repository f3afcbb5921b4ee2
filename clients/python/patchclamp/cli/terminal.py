"""What the commands print: text and tables for people, one JSON value for programs, notes and progress on stderr."""

import json
import os
import sys
from collections.abc import Sequence
from io import TextIOWrapper
from typing import Any, TextIO

from patchclamp.collectors import EventT, MessageT, ResultT
from patchclamp.results import Progress
from patchclamp.streams import Stream

_STYLES = {"bold": "1", "dim": "2", "red": "31", "green": "32", "cyan": "36"}


def print_json(value: object, indent: int | None = 2) -> None:
    """As text people can read, or escaped where the output cannot write a character of it."""
    text = json.dumps(value, ensure_ascii=False, indent=indent, default=_plain)
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        text = json.dumps(value, indent=indent, default=_plain)
    print(text)


def quoted(text: str) -> str:
    """A text within a line, where its spaces and line breaks show."""
    return json.dumps(text, ensure_ascii=False)


def escape_what_cannot_be_written() -> None:
    """A model writes every language: on an output of few characters the others are backslash escapes, not an error."""
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


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

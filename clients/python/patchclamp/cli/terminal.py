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
    """Prints JSON that people can read, with escapes only where the output cannot write a character of it."""
    text = json.dumps(value, ensure_ascii=False, indent=indent, default=_plain)
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        text = json.dumps(value, indent=indent, default=_plain)
    print(text)


def quoted(text: str) -> str:
    """Returns a text as it stands within a line, where its spaces and line breaks show."""
    return json.dumps(text, ensure_ascii=False)


def escape_what_cannot_be_written() -> None:
    """Makes an output of few characters write backslash escapes for the others: a model writes every language."""
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def styled(text: str, style: str, stream: TextIO) -> str:
    """Returns the text in ANSI colours on a terminal that wants them, plain elsewhere (https://no-color.org)."""
    if not takes_escapes(stream) or os.environ.get("NO_COLOR"):
        return text
    return f"\033[{_STYLES[style]}m{text}\033[0m"


def takes_escapes(stream: TextIO) -> bool:
    """Returns whether it is a terminal that redraws and colours; editors and build logs say TERM=dumb."""
    return stream.isatty() and os.environ.get("TERM", "") not in ("", "dumb")


def note(text: object) -> None:
    """Prints a line beside the output proper: receipts, usage, what was done."""
    print(styled(str(text), "dim", sys.stderr), file=sys.stderr)


def heading(text: str) -> None:
    print(styled(text, "bold", sys.stdout))


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Prints columns as wide as their widest cell."""
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(header, *cells, strict=True)]
    heading("  ".join(name.ljust(width) for name, width in zip(header, widths, strict=True)).rstrip())
    for row in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


class ProgressBar:
    """Redraws itself on a terminal that can, with a line for each stage; elsewhere a line for each tenth of a stage.

    quiet: whether it prints nothing elsewhere, where the output is for programs.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self._redraws = takes_escapes(sys.stderr)
        self._silent = quiet and not self._redraws
        self._stage = ""
        self._tenth = -1

    def show(self, event: object) -> None:
        """Shows those of the events of a job that are progress."""
        if not isinstance(event, Progress) or self._silent:
            return
        if event.stage != self._stage:
            self.close()
            self._stage = event.stage
        if self._redraws:
            filled = 24 * event.done // max(event.total, 1)
            bar = f"\r{event.stage:<12} [{'#' * filled:<24}] {event.done}/{event.total}{_resumed(event)}"
            print(bar, end="", file=sys.stderr, flush=True)
        elif (tenth := 10 * event.done // max(event.total, 1)) > self._tenth:
            print(f"{event.stage} {event.done}/{event.total}{_resumed(event)}", file=sys.stderr, flush=True)
            self._tenth = tenth

    def close(self) -> None:
        """Ends the line, so that what is printed next has its own, also when a stage ended early."""
        if self._stage and self._redraws:
            print(file=sys.stderr)
        self._stage = ""
        self._tenth = -1


def job_result(stream: Stream[MessageT, EventT, ResultT], *, quiet: bool) -> ResultT:
    """Returns the result of a job, and shows its progress on the way. ProgressBar describes `quiet`."""
    bar = ProgressBar(quiet=quiet)
    try:
        return stream.result(bar.show)
    finally:
        bar.close()


def _resumed(event: Progress) -> str:
    return f" ({event.resumed} resumed)" if event.resumed else ""


def _plain(value: Any) -> Any:
    return value.to_dict()

"""What the rows of a step cost, and so how many of each kind it may have.

    d seconds of a step that only decodes, p of a row of a prompt, a of a row of analysis

They are measured on this server and smoothed. Analysis is measured apart from what is served, since the reducers of
its rows take time too; and in steps of its own apart from those beside others, which have few rows and the same fixed
costs.

    prompts beside more urgent work:   (SLOWDOWN - 1) · d / p rows
    anything else that is bounded:     seconds / p, or seconds / a, rows

The one lets a step take SLOWDOWN times what it would without them. There are never fewer than LEAST_ROWS, so that
everybody gets on (of prompts beside their equals PROMPT_ROWS), and one block is all until the seconds are known. On a
CPU a block of 16 rows takes several times as long as a step that decodes one sequence, and from some 32 rows on larger
steps are no faster a row.
"""

from dataclasses import dataclass
from typing import NamedTuple

SLOWDOWN = 2.0
LEAST_ROWS = 4
# Prompts beside equals that decode: a stream waits so much longer for a token at most, if that is enough for so many
# rows, with which a prompt takes hardly longer than with more.
GAP_SECONDS = 0.25
PROMPT_ROWS = 32
# This is the longest step or slice of analysis, or step of batch prompts, while nothing more urgent is there: who comes
# meanwhile waits for its end.
ALONE_SECONDS = 0.1
# The same of analysis that has been alone for a while: larger steps get on faster, by a third on two cores.
QUIET_SECONDS = 0.35
# A new measurement has this share in the one that is kept.
_SHARE = 0.2


class StepRows(NamedTuple):
    """The rows of a step: those of requests that decode, those of prompts, and all of analysis requests."""

    decode: int
    prompt: int
    analysis: int = 0


@dataclass
class _AnalysisRow:
    """The seconds of a row. A dearer one counts at once, so that a step with a costly reducer is too long only once."""

    seconds: float | None = None

    def learn(self, seconds: float) -> None:
        dearer = self.seconds is not None and seconds > self.seconds
        self.seconds = seconds if dearer else smoothed(self.seconds, seconds)


class Pace:
    """Keeps the seconds that steps took, smoothed."""

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._decode: float | None = None
        self._row: float | None = None
        self._alone, self._beside = _AnalysisRow(), _AnalysisRow()

    @property
    def decode_seconds(self) -> float:
        """Returns the seconds of a step that only decodes, or 0 until one has been measured."""
        return self._decode or 0.0

    def record(self, rows: StepRows, seconds: float) -> float:
        """Learns from a step. Returns the seconds of it that analysis took, as far as is known."""
        if not rows.analysis:
            self._learn_served(rows, seconds)
            return 0.0
        served = self._served_seconds(rows)
        if served is None:
            return seconds * rows.analysis / sum(rows)
        took = max(0.0, seconds - served)
        measured = self._beside if rows.decode or rows.prompt else self._alone
        measured.learn(took / rows.analysis)
        return took

    def rows_beside(self, most: int) -> int:
        """Returns the rows of prompts beside more urgent work: at most `most`, and at least LEAST_ROWS unless that is
        more."""
        if self._decode is None:
            return min(most, self._block_size)
        return self._within((SLOWDOWN - 1) * self._decode, self._row, LEAST_ROWS, most)

    def rows_beside_equals(self, most: int) -> int:
        """Returns the rows of prompts beside work of the same urgency that decodes: GAP_SECONDS, and at least
        PROMPT_ROWS unless that is more than `most`."""
        return min(most, PROMPT_ROWS) if self._row is None else self._within(GAP_SECONDS, self._row, PROMPT_ROWS, most)

    def rows_alone(self, most: int) -> int:
        """Returns the rows of prompts while more urgent work may come at any moment: ALONE_SECONDS, and at least one
        block."""
        return self._within(ALONE_SECONDS, self._row, self._block_size, most)

    def analysis_beside(self, seconds: float, most: int) -> int:
        """Returns the rows of analysis in a step that serves others: as many as take `seconds`, and at least
        LEAST_ROWS. It is one block where `seconds` is 0, for not known."""
        row = self._beside.seconds or self._alone.seconds or self._row
        return self._within(seconds, row if seconds else None, LEAST_ROWS, most)

    def analysis_alone(self, seconds: float, most: int) -> int:
        """Returns the rows of a step with nothing but analysis: as many as take `seconds`, and at least one block."""
        return self._within(seconds, self._alone.seconds or self._row, self._block_size, most)

    def _within(self, seconds: float, row: float | None, least: int, most: int) -> int:
        if row is None:
            return min(most, self._block_size)
        return most if seconds >= most * row else min(most, max(least, int(seconds / row)))

    def _learn_served(self, rows: StepRows, seconds: float) -> None:
        if not rows.prompt:
            self._decode = smoothed(self._decode, seconds)
        elif self._decode is not None or not rows.decode:
            decoding = self._decode if rows.decode and self._decode is not None else 0.0
            self._row = smoothed(self._row, max(0.0, seconds - decoding) / rows.prompt)

    def _served_seconds(self, rows: StepRows) -> float | None:
        """Returns the seconds of what a step serves beside analysis, or None where they are not known yet."""
        if (rows.decode and self._decode is None) or (rows.prompt and self._row is None):
            return None
        return (self.decode_seconds if rows.decode else 0.0) + rows.prompt * (self._row or 0.0)


def smoothed(before: float | None, seconds: float) -> float:
    """Returns the kept measurement with a new one in it."""
    return seconds if before is None else before + _SHARE * (seconds - before)

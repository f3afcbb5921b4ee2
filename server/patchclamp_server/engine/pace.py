"""How many rows of less urgent prompts a step takes while more urgent work is in it.

    rows = (SLOWDOWN - 1) · d / p,   d seconds of a step that only decodes, p of each row of a prompt in a step

so that such a step is expected to take at most SLOWDOWN times what it would without them, and never less than
LEAST_ROWS, so that they get on. d and p are measured, and one block is all until both are known. On a CPU a block of 16
rows would take several times as long as a step that decodes one sequence.
"""

SLOWDOWN = 2.0
LEAST_ROWS = 4
# Share of a new measurement in the one that is kept.
_SHARE = 0.2


class Pace:
    """Seconds that steps took, smoothed."""

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._decode: float | None = None
        self._row: float | None = None

    @property
    def decode_seconds(self) -> float:
        """Of a step that only decodes; 0 until one has been measured."""
        return self._decode or 0.0

    def record(self, *, decode_rows: int, prefill_rows: int, seconds: float) -> None:
        if not prefill_rows:
            self._decode = smoothed(self._decode, seconds)
        elif self._decode is not None or not decode_rows:
            decoding = self._decode if decode_rows and self._decode is not None else 0.0
            self._row = smoothed(self._row, max(0.0, seconds - decoding) / prefill_rows)

    def rows(self, most: int) -> int:
        """At most `most`, and at least LEAST_ROWS where that is not less."""
        if self._decode is None or self._row is None:
            return min(most, self._block_size)
        wanted = (SLOWDOWN - 1) * self._decode
        return most if wanted >= most * self._row else min(most, max(LEAST_ROWS, int(wanted / self._row)))


def smoothed(before: float | None, seconds: float) -> float:
    """The kept measurement with a new one in it."""
    return seconds if before is None else before + _SHARE * (seconds - before)

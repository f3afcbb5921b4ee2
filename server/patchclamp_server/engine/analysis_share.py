"""What analysis may take of an engine that serves something more urgent.

    after s seconds of serving:    credit = min(2 · turn, credit + (slowdown - 1) · s)
    after a seconds of analysis:   credit = credit - a
    turn = max(TURN, slowdown - 1) · d,    d seconds of a step that only decodes

Rows of analysis requests, and slices of works at the exclusive door, run when the credit is a turn or more, and then
for about a turn. So of any time in which something more urgent runs

    seconds of analysis ≤ (slowdown - 1) · seconds of serving + two turns + what one turn took too long

and the mean time between tokens of a stream is at most `slowdown` times what it is alone, the longest about 1 + TURN
times; with the default of 1.5 two of three steps have no analysis in them. Where a turn cannot be as short, since its
smallest part takes longer, the next comes as much later.

As long as requests decode, analysis has (slowdown - 1) / slowdown of the engine, a third by default, however many they
are. Of the time that prompts take, it has at least a turn a step. While nothing more urgent could run it has all, in
steps and slices of at most ALONE_SECONDS (pace.py), so that who comes is not kept waiting; of a turn while a client has
just paused, whose next token is about to be asked for. After QUIET_AFTER seconds of analysis in which nobody came they
last QUIET_SECONDS: the first who comes then may wait longer, once.
"""

from patchclamp_server.engine.pace import ALONE_SECONDS, QUIET_SECONDS, Pace

# A turn is relative to a step that only decodes.
TURN = 1.5
QUIET_AFTER = 2.0


class AnalysisShare:
    """Keeps the credit of analysis. `slowdown` is above 1; seconds are those that `pace` has measured."""

    def __init__(self, pace: Pace, slowdown: float) -> None:
        if not slowdown > 1:
            raise ValueError(f"analysis_slowdown: expected a number above 1, got {slowdown}: analysis would never run")
        self._pace, self._earned = pace, slowdown - 1
        self._credit = 0.0
        # The seconds of analysis since anything more urgent ran.
        self._quiet = 0.0

    @property
    def alone_seconds(self) -> float:
        """Returns the longest that a step or slice of analysis may last while nothing more urgent is there."""
        return QUIET_SECONDS if self._quiet >= QUIET_AFTER else ALONE_SECONDS

    @property
    def turn_seconds(self) -> float:
        """Returns the seconds of a turn, or 0 until a step that only decodes has been measured."""
        return max(TURN, self._earned) * self._pace.decode_seconds

    @property
    def is_due(self) -> bool:
        return self._credit > 0 and self._credit >= self.turn_seconds

    def served(self, seconds: float) -> None:
        self._quiet = 0.0
        most = 2 * self.turn_seconds
        earned = self._credit + self._earned * seconds
        self._credit = min(most, earned) if most else earned

    def analysed(self, seconds: float) -> None:
        """Takes seconds of analysis beside something more urgent."""
        self._credit -= seconds

    def analysed_alone(self, seconds: float) -> None:
        """Takes seconds of analysis while nothing more urgent was there."""
        self._quiet += seconds

    def nothing_served(self) -> None:
        """Is called when nothing more urgent could run: what comes next has some steps for itself."""
        self._credit = 0.0

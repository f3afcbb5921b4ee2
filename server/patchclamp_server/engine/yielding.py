"""Bounds the rows of a step that go to work which yields to more urgent work."""

from dataclasses import dataclass

from patchclamp_server.engine.analysis_share import AnalysisShare
from patchclamp_server.engine.pace import Pace
from patchclamp_server.engine.request import Priority
from patchclamp_server.engine.sequence import Sequence


@dataclass(eq=False)
class Yielding:
    """The rows that are left in a step. The single tokens of all that clients wait for have no bound here.

    `urgent` bounds prompts of interactive requests, together, in a step in which a request decodes that is not of
    analysis; `prompts` bounds those of batch requests, together; `analysis` bounds analysis requests, together, single
    tokens included.
    """

    urgent: int
    prompts: int
    analysis: int

    def allow(self, sequence: Sequence, n: int) -> int:
        if sequence.request.priority is Priority.ANALYSIS:
            return min(n, self.analysis)
        if sequence.remaining == 1:
            return n
        return min(n, self.prompts if sequence.request.priority is Priority.BATCH else self.urgent)

    def take(self, sequence: Sequence, n: int) -> None:
        if sequence.request.priority is Priority.ANALYSIS:
            self.analysis -= n
        elif sequence.remaining > 1 and sequence.request.priority is Priority.BATCH:
            self.prompts -= n
        elif sequence.remaining > 1:
            self.urgent -= n


def yielding(pace: Pace, share: AnalysisShare, most: int, *, highest: Priority | None, pausing: bool) -> Yielding:
    """Returns the bounds of a step of at most `most` rows. `highest` is the highest priority of those that could run.
    `pausing`: something more urgent than analysis waits for its client, and has not for long."""
    urgent = pace.rows_beside_equals(most)
    prompts = pace.rows_beside(most) if highest is Priority.INTERACTIVE else pace.rows_alone(most)
    if highest is not None and highest < Priority.ANALYSIS:
        return Yielding(urgent, prompts, pace.analysis_beside(share.turn_seconds, most) if share.is_due else 0)
    return Yielding(urgent, prompts, unserved(pace, share, most, pausing=pausing))


def unserved(pace: Pace, share: AnalysisShare, most: int, *, pausing: bool) -> int:
    """Returns the rows of analysis in a step that serves nothing else."""
    return pace.analysis_beside(share.turn_seconds, most) if pausing else pace.analysis_alone(share.alone_seconds, most)

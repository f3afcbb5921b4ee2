"""Counts how far a job is, in steps of a named stage."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """`stage` says what is done and counted."""

    stage: str
    done: int
    total: int


@dataclass(eq=False)
class Steps:
    """Counts `total` steps of a stage, of which `done` are done."""

    stage: str
    total: int
    done: int = 0

    def advance(self, n: int = 1) -> Progress:
        self.done += n
        return Progress(self.stage, self.done, self.total)

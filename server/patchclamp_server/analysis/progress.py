"""How far a job is: counted steps of a named stage. Whoever hears of them may raise to end the job there."""

from collections.abc import Callable
from dataclasses import dataclass

# (stage, done, total)
Progress = Callable[[str, int, int], None]


def unheard(stage: str, done: int, total: int) -> None:
    """For jobs that nobody follows."""


@dataclass(eq=False)
class Steps:
    """`total` steps of a stage, of which `done` are."""

    hear: Progress
    stage: str
    total: int
    done: int = 0

    def advance(self, n: int = 1) -> None:
        self.done += n
        self.hear(self.stage, self.done, self.total)

"""Which prompt tokens retrieval heads copied an answer from."""

from dataclasses import dataclass

from patchclamp.results.record import Record


@dataclass(frozen=True)
class CopySource(Record):
    """Says from which prompt position a head copied a generated token, and its attention probability there."""

    position: int
    layer: int
    head: int
    probability: float


@dataclass(frozen=True)
class GroundedRange(Record):
    """Says that `tokens` generated tokens were copied from the prompt positions start ≤ p < end."""

    start: int
    end: int
    tokens: int
    text: str


@dataclass(frozen=True)
class GroundingReport(Record):
    """Says which parts of the prompt an answer was copied from.

    grounded_ratio: share of the generated tokens that some head of the set copied from the prompt.
    """

    grounded_ratio: float
    grounded_tokens: int
    ranges: tuple[GroundedRange, ...]

    def __str__(self) -> str:
        places = "no range" if not self.ranges else f"{len(self.ranges)} range{'s' if len(self.ranges) > 1 else ''}"
        return (
            f"grounding: {self.grounded_tokens} tokens ({self.grounded_ratio:.0%}) copied from {places} of the prompt"
        )

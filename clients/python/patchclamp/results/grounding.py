"""Which prompt tokens retrieval heads copied an answer from."""

from dataclasses import dataclass

from patchclamp.results.record import Record


@dataclass(frozen=True)
class CopySource(Record):
    """The prompt position that a head copied a generated token from, and its attention probability there."""

    position: int
    layer: int
    head: int
    probability: float


@dataclass(frozen=True)
class GroundedRange(Record):
    """Prompt positions start ≤ p < end that `tokens` generated tokens were copied from."""

    start: int
    end: int
    tokens: int
    text: str


@dataclass(frozen=True)
class GroundingReport(Record):
    """grounded_ratio: share of the generated tokens that some head of the set copied from the prompt."""

    grounded_ratio: float
    grounded_tokens: int
    ranges: tuple[GroundedRange, ...]

    def __str__(self) -> str:
        places = "no range" if not self.ranges else f"{len(self.ranges)} range{'s' if len(self.ranges) > 1 else ''}"
        return (
            f"grounding: {self.grounded_tokens} tokens ({self.grounded_ratio:.0%}) copied from {places} of the prompt"
        )

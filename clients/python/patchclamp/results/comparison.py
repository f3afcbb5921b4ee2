"""Results of Compare: the edited and the unedited model in one batch."""

from dataclasses import dataclass, field

from patchclamp.names import name_of
from patchclamp.results.generation import Chunk, GenerateCollector, GenerateResult
from patchclamp.results.record import Record
from patchclamp.v1 import generation_pb2 as pb


@dataclass(frozen=True)
class CompareText(Record):
    """Holds a chunk of one side: "edited" or "baseline"."""

    side: str
    chunk: Chunk


@dataclass(frozen=True)
class Divergence(Record):
    """KL(edited ‖ baseline) in nats: compares both at one token of the edited text, given that text so far."""

    position: int
    id: int
    text: str
    kl: float


@dataclass(frozen=True)
class CompareSummary(Record):
    """Sums a comparison up.

    top1_agreement: share of positions at which both would choose the same most likely token.
    """

    mean_kl: float
    max_kl: float
    top1_agreement: float
    positions: int

    def __str__(self) -> str:
        return (
            f"KL(edited‖baseline) mean {self.mean_kl:.4f}, max {self.max_kl:.4f} nats; "
            f"same top token at {self.top1_agreement:.0%} of {self.positions} positions"
        )


@dataclass(frozen=True)
class CompareResult(Record):
    edited: GenerateResult
    baseline: GenerateResult
    divergences: tuple[Divergence, ...]
    summary: CompareSummary


CompareEvent = CompareText | Divergence | CompareSummary


@dataclass
class CompareCollector:
    """Turns the messages of a comparison into events, and keeps them for the result."""

    sides: dict[str, GenerateCollector] = field(
        default_factory=lambda: {"edited": GenerateCollector(), "baseline": GenerateCollector()}
    )
    divergences: list[Divergence] = field(default_factory=list)
    summary: CompareSummary | None = None

    def add(self, message: pb.CompareResponse) -> CompareEvent:
        match message.WhichOneof("event"):
            case "text":
                side = name_of(pb.CompareSide.DESCRIPTOR, message.text.side)
                return CompareText(side, self.sides[side].add(message.text.response))
            case "divergence":
                at = Divergence.from_proto(message.divergence)
                self.divergences.append(at)
                return at
            case "summary":
                self.summary = CompareSummary.from_proto(message.summary)
                return self.summary
            case other:
                raise ValueError(f"a comparison sent an event this client does not know: {other}")

    def result(self) -> CompareResult | None:
        """Returns the whole; None while the summary or the end of a side has not arrived."""
        edited, baseline = self.sides["edited"].result(), self.sides["baseline"].result()
        if edited is None or baseline is None or self.summary is None:
            return None
        return CompareResult(edited, baseline, tuple(self.divergences), self.summary)

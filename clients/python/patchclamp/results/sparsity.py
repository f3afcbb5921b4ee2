"""What sparse inference did in a request, and results of SparsityService."""

from dataclasses import dataclass, field
from typing import Any

from patchclamp.results.artifacts import Artifact
from patchclamp.results.jobs import Progress
from patchclamp.results.record import Record
from patchclamp.v1 import sparsity_pb2


@dataclass(frozen=True)
class GuardReport(Record):
    """Compares sampled tokens with the dense model.

    dense_from: position from which the rest is dense; None where none is.
    """

    sampled_tokens: int
    mean_divergence: float
    top1_agreement: float
    max_divergence: float
    dense_from: int | None

    def __str__(self) -> str:
        if not self.sampled_tokens:
            return "guard: no token was sampled"
        fallback = "" if self.dense_from is None else f"; FELL BACK to dense from position {self.dense_from}"
        return (
            f"guard: KL(dense‖sparse) mean {self.mean_divergence:.4f} nats, {self.max_divergence:.4f} allowed; "
            f"same top token at {self.top1_agreement:.0%} of {self.sampled_tokens} samples{fallback}"
        )


@dataclass(frozen=True)
class SparsityReport(Record):
    """Says what sparse inference did, as the server counted it.

    active_ratio: share of neurons (or channels) that were computed for the sparse tokens.
    filled_ratio: share of the neurons of a CoreInfer set that its rule did not find in so short a prompt, and that the
    mean activation chose.
    """

    policy: str
    profile: str
    sparse_tokens: int
    dense_tokens: int
    active_ratio: float
    guard: GuardReport | None
    filled_ratio: float = 0.0

    def __str__(self) -> str:
        profile = f" ({self.profile[:19]})" if self.profile else ""
        dense = f", {self.dense_tokens} dense" if self.dense_tokens else ""
        line = f"sparsity {self.policy}{profile}: {self.sparse_tokens} sparse tokens{dense}"
        line += f", {self.active_ratio:.1%} computed"
        if self.filled_ratio:
            line += f" ({self.filled_ratio:.0%} of the set filled up by mean activation)"
        return line if self.guard is None else f"{line}\n  {self.guard}"


@dataclass(frozen=True)
class QualityCard(Record):
    """Compares a policy with the dense model on held-out text; the message of the same name describes the figures."""

    perplexity_ratio: float
    divergence: float
    top1_agreement: float
    sparsity: float
    bytes_read_16: float
    documents: int
    scored_tokens: int
    dense_perplexity: float


@dataclass(frozen=True)
class SpeedCard(Record):
    """Holds medians over the tokens of one sequence, dense and sparse by turns."""

    dense_seconds_per_token: float
    sparse_seconds_per_token: float
    speedup: float
    tokens: int


@dataclass(frozen=True)
class CalibratedProfile(Record):
    """Holds the stored profile with its quality card.

    random_control: the card of a random set of the same size on the same text.
    """

    artifact: Artifact
    quality: QualityCard
    random_control: QualityCard


@dataclass(frozen=True)
class SparsityEvaluation(Record):
    """Holds the cards of the `index`-th sparsity asked for. speed: None when it was not measured."""

    index: int
    policy: str
    keep_ratio: float
    quality: QualityCard
    random_control: QualityCard
    speed: SpeedCard | None


SparsityEvaluationEvent = Progress | SparsityEvaluation


@dataclass
class EvaluationCollector:
    """Turns the messages of an evaluation into events; the result is there when all `expected` ones are.

    expected: None when it is not known, and the end of the stream tells that all have come.
    """

    expected: int | None = None
    evaluations: list[SparsityEvaluation] = field(default_factory=list)

    def add(self, message: sparsity_pb2.EvaluateProfileResponse) -> SparsityEvaluationEvent:
        match message.WhichOneof("event"):
            case "progress":
                return Progress.from_proto(message.progress)
            case "evaluation":
                evaluation = SparsityEvaluation.from_proto(message.evaluation)
                self.evaluations.append(evaluation)
                return evaluation
            case other:
                raise ValueError(f"an evaluation sent an event this client does not know: {other}")

    def result(self) -> tuple[SparsityEvaluation, ...] | None:
        """Returns the evaluations in the order asked for; None while some are missing."""
        if len(self.evaluations) < (1 if self.expected is None else self.expected):
            return None
        return tuple(sorted(self.evaluations, key=lambda evaluation: evaluation.index))


@dataclass(frozen=True)
class CoreOverlap(Record):
    """|A and B| / |A or B|: compares the sets of two prompts, by layer."""

    first: int
    second: int
    jaccard: tuple[float, ...]
    mean_jaccard: float


@dataclass(frozen=True)
class CoreNeurons(Record):
    """Holds the neurons that are kept.

    prompts: for each prompt, the neurons of each layer. overlaps: those of every two prompts.
    """

    prompts: tuple[dict[int, tuple[int, ...]], ...]
    overlaps: tuple[CoreOverlap, ...]

    @classmethod
    def from_proto(cls, message: sparsity_pb2.PredictCoreNeuronsResponse, **given: Any) -> "CoreNeurons":
        prompts = tuple({each.layer: tuple(each.neurons) for each in prompt.layers} for prompt in message.prompts)
        return super().from_proto(message, prompts=prompts, **given)

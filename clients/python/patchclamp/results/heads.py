"""Results of HeadService."""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

from patchclamp.heads import Head
from patchclamp.results.artifacts import Artifact
from patchclamp.results.jobs import Progress
from patchclamp.results.record import Record
from patchclamp.v1 import head_pb2 as pb


@dataclass(frozen=True)
class HeadScore(Record):
    """Holds the score of one head.

    low, high: 95 % interval, None where the score is one measurement. always_on: whether it scored in every successful
    run.
    """

    head: Head
    score: float
    low: float | None = None
    high: float | None = None
    always_on: bool = False


def score_matrix(scores: Iterable[HeadScore]) -> tuple[tuple[float, ...], ...]:
    """Returns the scores as [layers][heads]. Raises ValueError unless there is one for each head of every layer."""
    by_head = {score.head: score.score for score in scores}
    layers = 1 + max((head.layer for head in by_head), default=-1)
    heads = 1 + max((head.head for head in by_head), default=-1)
    if not by_head or len(by_head) != layers * heads:
        raise ValueError(f"{len(by_head)} scores are not one for each of {layers} layers of {heads} heads")
    return tuple(tuple(by_head[Head(layer, head)] for head in range(heads)) for layer in range(layers))


@dataclass(frozen=True)
class NeedleRun(Record):
    """Holds the run of one needle at one length and depth.

    recall: ROUGE-1 recall of the answer. success: whether it is above 0.5.
    """

    needle: int
    length: int
    depth: float
    recall: float
    success: bool
    answer: str


@dataclass(frozen=True)
class NeedleGrid(Record):
    """Holds (successes, runs) at [depth][length], with depths to two digits; None where nothing was run."""

    lengths: tuple[int, ...]
    depths: tuple[float, ...]
    cells: tuple[tuple[tuple[int, int] | None, ...], ...]

    @classmethod
    def of(cls, runs: Iterable[NeedleRun]) -> "NeedleGrid":
        counts: dict[tuple[float, int], tuple[int, int]] = defaultdict(lambda: (0, 0))
        for run in runs:
            at = round(run.depth, 2), run.length
            successes, total = counts[at]
            counts[at] = successes + run.success, total + 1
        lengths = tuple(sorted({length for _, length in counts}))
        depths = tuple(sorted({depth for depth, _ in counts}))
        cells = tuple(tuple(counts.get((depth, length)) for length in lengths) for depth in depths)
        return cls(lengths, depths, cells)


@dataclass(frozen=True)
class RetrievalHeads(Record):
    """Holds what a detection found.

    scores: all heads, best first. stability: mean overlap of the ten best heads between halves of the runs.
    """

    artifact: Artifact
    scores: tuple[HeadScore, ...]
    runs: tuple[NeedleRun, ...]
    successes: int
    threshold: float
    fraction_above_threshold: float
    stability: float
    stopped_early: bool


DetectionEvent = Progress | NeedleRun | RetrievalHeads


@dataclass
class DetectionCollector:
    """Turns the messages of a detection into events, and keeps the runs and the result."""

    runs: list[NeedleRun] = field(default_factory=list)
    _result: RetrievalHeads | None = None

    def add(self, message: pb.DetectRetrievalHeadsResponse) -> DetectionEvent:
        match message.WhichOneof("event"):
            case "progress":
                return Progress.from_proto(message.progress)
            case "run":
                run = NeedleRun.from_proto(message.run)
                self.runs.append(run)
                return run
            case "result":
                self._result = RetrievalHeads.from_proto(message.result, runs=tuple(self.runs))
                return self._result
            case other:
                raise ValueError(f"a detection sent an event this client does not know: {other}")

    def result(self) -> RetrievalHeads | None:
        """Returns the result; None while it has not arrived."""
        return self._result


@dataclass(frozen=True)
class ScoredHeads(Record):
    """Holds the scores of all heads, best first."""

    artifact: Artifact
    scores: tuple[HeadScore, ...]


@dataclass(frozen=True)
class HeadMetrics(Record):
    """Holds needle success and perplexity with these heads edited."""

    runs: int
    successes: int
    mean_recall: float
    perplexity: float
    heads: tuple[Head, ...]


@dataclass(frozen=True)
class HeadEditEffect(Record):
    """Compares the edited model with the unedited one.

    random: the same edit of random sets of equal size, with mean and standard deviation over them.
    """

    unedited: HeadMetrics
    edited: HeadMetrics
    random: tuple[HeadMetrics, ...]
    random_success_mean: float
    random_success_deviation: float
    random_perplexity_mean: float
    random_perplexity_deviation: float


@dataclass(frozen=True)
class Circuit(Record):
    """Holds the effects of heads on clean/corrupt pairs.

    effects: all heads, by size. faithfulness: that of the best heads, beside random circuits of equal size.
    """

    artifact: Artifact
    effects: tuple[HeadScore, ...]
    clean_metric: float
    corrupt_metric: float
    faithfulness: float
    random_faithfulness_mean: float
    random_faithfulness_deviation: float


@dataclass(frozen=True)
class HeadSetComparison(Record):
    """Compares the head sets at `first` and `second`; the message of the same name describes the figures."""

    first: int
    second: int
    jaccard: float
    overlap_coefficient: float
    expected_common: float
    common: int
    rank_correlation: float


@dataclass(frozen=True)
class HeadAttribution(Record):
    """Says what a head adds to the logit difference.

    sources: the parts by position of the prompt; empty but for the top heads.
    """

    head: Head
    part: float
    sources: tuple[float, ...]


@dataclass(frozen=True)
class LogitAttribution(Record):
    """Holds the parts of logit(target) - logit(contrast); parts_sum is their sum."""

    logit_difference: float
    parts_sum: float
    embedding: float
    mlps: tuple[float, ...]
    biases: float
    heads: tuple[HeadAttribution, ...]

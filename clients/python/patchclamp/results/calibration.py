"""What a vector does at layers and strengths, and how well vectors, probes and features detect a concept."""

from collections.abc import Iterator
from dataclasses import dataclass

from patchclamp.results.artifacts import Artifact
from patchclamp.results.jobs import Progress
from patchclamp.results.probes import ReliabilityBin
from patchclamp.results.record import Record
from patchclamp.v1 import steering_pb2 as pb


@dataclass(frozen=True)
class Interval(Record):
    """Holds a mean with the 95 % interval of a bootstrap."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.4g} ({self.low:.4g} to {self.high:.4g})"


@dataclass(frozen=True)
class DosePoint(Record):
    """Holds what came of all prompts in one arm, at a layer and strength.

    arm: "vector", "random", "prompt" or "unsteered". perplexity: of the unsteered model on the text. repetition: share
    of 4-grams that came before. distinct: expectation-adjusted distinct tokens. divergence: KL(steered || unsteered)
    along the text, nats. example: the text after the first prompt.
    """

    arm: str
    layer: int
    strength: float
    effect: Interval
    perplexity: Interval
    repetition: Interval
    distinct: Interval
    divergence: Interval
    example: str


@dataclass(frozen=True)
class SafeRange(Record):
    """Holds the largest strengths on both sides of 0 at which the text stays within the bounds."""

    layer: int
    low: float
    high: float


@dataclass(frozen=True)
class CalibrationResult(Record):
    """Holds the vector, stored anew with its calibration, and the layer and strength at the knee.

    prompt_wins: whether the instruction had a larger effect within the same bounds. warnings: what to know first.
    """

    artifact: Artifact
    points: tuple[DosePoint, ...]
    safe: tuple[SafeRange, ...]
    layer: int
    strength: float
    prompt_wins: bool
    warnings: tuple[str, ...]

    def curve(self, arm: str, layer: int) -> tuple[DosePoint, ...]:
        """Returns the points of "vector" or "random" at a layer, by strength."""
        own = [point for point in self.points if point.arm == arm and point.layer == layer]
        return tuple(sorted(own, key=lambda point: point.strength))

    def baseline(self, arm: str) -> DosePoint | None:
        """Returns the point of "unsteered" or "prompt"; None where there was no instruction."""
        return next((point for point in self.points if point.arm == arm), None)


CalibrationEvent = Progress | DosePoint | CalibrationResult


@dataclass
class CalibrationCollector:
    """Turns the messages of a calibration into events: points as they come, then the result."""

    _result: CalibrationResult | None = None

    def add(self, message: pb.CalibrateVectorResponse) -> CalibrationEvent:
        match message.WhichOneof("event"):
            case "progress":
                return Progress.from_proto(message.progress)
            case "point":
                return DosePoint.from_proto(message.point)
            case "result":
                self._result = CalibrationResult.from_proto(message.result)
                return self._result
            case other:
                raise ValueError(f"a calibration sent an event this client does not know: {other}")

    def result(self) -> CalibrationResult | None:
        """Returns the calibration; None while it has not arrived."""
        return self._result


@dataclass(frozen=True)
class DetectedText(Record):
    """Holds the scores of one text, in the order of ConceptDetection.detectors. label: "" for a text without one."""

    text: int
    label: str
    scores: tuple[float, ...]


@dataclass(frozen=True)
class DetectorReport(Record):
    """Says how well one detector tells a label from all others, on texts that its calibration has not seen.

    detector: of a feature its autoencoder. auroc, average_precision: None without labels. random_auroc: of random
    vectors. slope, intercept: of the probability, 1 / (1 + exp(-(slope * score + intercept))). brier_base_rate: of
    always saying the share of the label.
    """

    detector: str
    feature: int | None
    layer: int
    pooling: str
    auroc: Interval | None
    average_precision: Interval | None
    random_auroc: float
    slope: float
    intercept: float
    brier: float
    brier_base_rate: float
    reliability: tuple[ReliabilityBin, ...]

    @property
    def name(self) -> str:
        """Returns the detector, of a feature with its number."""
        return self.detector if self.feature is None else f"{self.detector} feature {self.feature}"


@dataclass(frozen=True)
class ConceptDetection(Record):
    """Holds a report of each detector, layer and pooling. best: the place of the one with the largest AUROC."""

    detectors: tuple[DetectorReport, ...]
    best: int
    texts: int
    warnings: tuple[str, ...]

    def curves(self) -> Iterator[tuple[DetectorReport, ...]]:
        """Yields the reports of each detector and pooling, by layer."""
        by_kind: dict[tuple[str, int | None, str], list[DetectorReport]] = {}
        for each in self.detectors:
            by_kind.setdefault((each.detector, each.feature, each.pooling), []).append(each)
        for own in by_kind.values():
            yield tuple(sorted(own, key=lambda report: report.layer))


ConceptDetectionEvent = Progress | DetectedText | ConceptDetection


@dataclass
class ConceptDetectionCollector:
    """Turns the messages of a detection into events: texts as they have run, then the reports."""

    _result: ConceptDetection | None = None

    def add(self, message: pb.DetectConceptResponse) -> ConceptDetectionEvent:
        match message.WhichOneof("event"):
            case "progress":
                return Progress.from_proto(message.progress)
            case "text":
                return DetectedText.from_proto(message.text)
            case "result":
                self._result = ConceptDetection.from_proto(message.result)
                return self._result
            case other:
                raise ValueError(f"a detection sent an event this client does not know: {other}")

    def result(self) -> ConceptDetection | None:
        """Returns the reports; None while they have not arrived."""
        return self._result

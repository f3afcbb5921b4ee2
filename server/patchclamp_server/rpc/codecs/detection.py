"""Messages of DetectConcept ↔ analysis/steering/detection. Refusals name fields."""

from collections.abc import Sequence

from patchclamp.v1 import steering_pb2 as pb
from patchclamp_server.analysis.progress import Progress
from patchclamp_server.analysis.steering.detection.job import (
    Column,
    Detected,
    DetectedText,
    Detection,
    Detector,
    Quality,
)
from patchclamp_server.artifacts.store import ArtifactStore
from patchclamp_server.artifacts.types import ArtifactKind
from patchclamp_server.errors import InvalidArgument
from patchclamp_server.interventions.field_checks import distinct, known
from patchclamp_server.interventions.pooling import Pooling
from patchclamp_server.interventions.resolver import Resolver
from patchclamp_server.model.info import ModelInfo
from patchclamp_server.rpc.codecs.calibration import encode_interval
from patchclamp_server.rpc.codecs.neurons.texts import decode_texts
from patchclamp_server.rpc.codecs.progress import encode_progress
from patchclamp_server.text.prompt import PromptEncoder

DEFAULT_CALIBRATION_FRACTION = 0.5
# Scores of a text: detectors times layers times poolings.
MAX_COLUMNS = 2048
POOLINGS: dict[int, Pooling] = {
    pb.DetectionPooling.Value(f"DETECTION_POOLING_{pooling.name}"): pooling for pooling in Pooling
}
POOLING_NUMBERS = {pooling: pb.DetectionPooling.Value(f"DETECTION_POOLING_{pooling.name}") for pooling in Pooling}


def decode_detection(
    request: pb.DetectConceptRequest, prompts: PromptEncoder, store: ArtifactStore, info: ModelInfo
) -> Detection:
    """Returns a checked job. It loads vectors and may tokenise texts: call it in a thread.

    Raises InvalidArgument, and NotFound or FailedPrecondition for a detector.
    """
    if request.features:
        # Features of autoencoder artifacts would be read here, by their encoder rows.
        raise InvalidArgument("features", "features are not read here yet; expected vectors, in detectors")
    if not request.detectors:
        raise InvalidArgument("detectors", "expected the id or tag of at least one vector")
    resolver = Resolver(info, store)
    refs = distinct(request.detectors, "detectors")
    detectors = tuple(_detector(ref, request.layers, resolver, f"detectors[{i}]") for i, ref in enumerate(refs))
    for i, layer in enumerate(distinct(request.layers, "layers")):
        if not any(layer in detector.directions for detector in detectors):
            raise InvalidArgument(f"layers[{i}]", f"no detector has layer {layer}")
    asked = [
        known(pooling, POOLINGS, f"poolings[{i}]", pb.DetectionPooling.keys()[1:])
        for i, pooling in enumerate(request.poolings)
    ]
    fraction = DEFAULT_CALIBRATION_FRACTION
    if request.HasField("calibration_fraction"):
        fraction = request.calibration_fraction
    if not 0.0 < fraction < 1.0:
        message = f"expected a number between 0 and 1, both excluded, got {fraction:g}"
        raise InvalidArgument("calibration_fraction", message)
    texts = decode_texts(request.texts, "texts", prompts, store, info)
    target = texts.label(request.target, "target") if request.target else None
    poolings = distinct(asked, "poolings") or tuple(Pooling)
    job = Detection(detectors, texts, target, poolings, fraction, request.seed)
    if len(job.columns) > MAX_COLUMNS:
        message = f"{len(job.columns)} scores of detectors, layers and poolings; expected at most {MAX_COLUMNS}"
        raise InvalidArgument("layers", message)
    return job


def _detector(ref: str, layers: Sequence[int], resolver: Resolver, field: str) -> Detector:
    """Returns a vector; a probe would be read here by its weights, once there are probe artifacts."""
    if not ref:
        raise InvalidArgument(field, "expected the id or tag of a vector")
    vector = resolver.artifact(ref, ArtifactKind.VECTOR, field)
    site = vector.info.site
    assert site is not None
    directions = {at: vector.direction(at).float() for at in vector.info.layers if not layers or at in layers}
    if not directions:
        raise InvalidArgument(field, f"{ref} has none of these layers; it has {list(vector.info.layers)}")
    for layer, v in directions.items():
        if not float(v.norm()) > 0.0:
            raise InvalidArgument(field, f"{ref} is zero at layer {layer}, and has no direction there")
    return Detector(ref, site, directions)


def encode_detection(event: Progress | DetectedText | Detected) -> pb.DetectConceptResponse:
    match event:
        case Progress():
            return encode_progress(event, pb.DetectConceptResponse)
        case DetectedText():
            text = pb.DetectedText(text=event.text, label=event.label, scores=event.scores)
            return pb.DetectConceptResponse(text=text)
        case Detected():
            qualities: Sequence[Quality | None] = event.qualities or [None] * len(event.columns)
            result = pb.DetectionResult(
                detectors=[_report(column, own) for column, own in zip(event.columns, qualities, strict=True)],
                best=event.best,
                texts=event.texts,
                warnings=event.warnings,
            )
            return pb.DetectConceptResponse(result=result)


def _report(column: Column, quality: Quality | None) -> pb.DetectorReport:
    report = pb.DetectorReport(detector=column.detector, layer=column.layer, pooling=POOLING_NUMBERS[column.pooling])
    if quality is not None:
        report.auroc.CopyFrom(encode_interval(quality.auroc))
        report.average_precision.CopyFrom(encode_interval(quality.average_precision))
        report.random_auroc = quality.random_auroc
        report.slope, report.intercept = quality.calibration
        report.brier, report.brier_base_rate = quality.brier, quality.brier_base_rate
        for each in quality.reliability:
            report.reliability.add(
                low=each.low,
                high=each.high,
                texts=each.texts,
                mean_probability=each.mean_probability,
                share=each.share,
            )
    return report

"""Messages of DetectConcept ↔ analysis/steering/detection. Refusals name fields."""

from collections.abc import Iterator, Sequence

from patchclamp.v1 import program_pb2
from patchclamp.v1 import steering_pb2 as pb
from patchclamp_server.analysis.progress import Progress
from patchclamp_server.analysis.steering.detection.detectors import Detector, of_feature, of_probe, of_vector
from patchclamp_server.analysis.steering.detection.job import Column, Detected, DetectedText, Detection, Quality
from patchclamp_server.artifacts.store import ArtifactStore
from patchclamp_server.artifacts.types import ArtifactKind
from patchclamp_server.errors import InvalidArgument, about
from patchclamp_server.interventions.features import check_alone
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
    """Returns a checked job. It loads artifacts and may tokenise texts: call it in a thread.

    Raises InvalidArgument, and NotFound or FailedPrecondition for a detector.
    """
    if not request.detectors and not request.features:
        raise InvalidArgument("detectors", "expected the id or tag of a vector or probe, or a feature in features")
    resolver = Resolver(info, store)
    refs = distinct(request.detectors, "detectors")
    detectors = tuple(
        detector
        for i, ref in enumerate(refs)
        for detector in _detectors(ref, request.layers, store, resolver, f"detectors[{i}]")
    )
    detectors += _features(request.features, request.layers, resolver)
    for i, layer in enumerate(distinct(request.layers, "layers")):
        if not any(layer in detector.rows for detector in detectors):
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


def _detectors(
    ref: str, layers: Sequence[int], store: ArtifactStore, resolver: Resolver, field: str
) -> Iterator[Detector]:
    """Yields a vector at each of its layers that is asked for, or a probe, which reads its layers together."""
    if not ref:
        raise InvalidArgument(field, "expected the id or tag of a vector or probe")
    with about(field):
        kind = store.info(ref).kind
    if kind is ArtifactKind.PROBE:
        probe = resolver.probe(ref, field)
        if layers and not set(probe.layers) <= set(layers):
            has = f"reads layer {probe.layers[0]}" if len(probe.layers) == 1 else f"reads {list(probe.layers)} together"
            raise InvalidArgument(field, f"{ref} {has}; expected all of that among the layers, or no layers")
        yield of_probe(ref, probe)
        return
    if kind is not ArtifactKind.VECTOR:
        message = f"{ref} is a {kind.value}; expected a vector or probe. Features of autoencoders stand in features"
        raise InvalidArgument(field, message)
    vector = resolver.artifact(ref, kind, field)
    site = vector.info.site
    assert site is not None
    chosen = [at for at in vector.info.layers if not layers or at in layers]
    if not chosen:
        raise InvalidArgument(field, f"{ref} has none of these layers; it has {list(vector.info.layers)}")
    for layer in chosen:
        v = vector.direction(layer).float()
        if not float(v.norm()) > 0.0:
            raise InvalidArgument(field, f"{ref} is zero at layer {layer}, and has no direction there")
        yield of_vector(ref, site, layer, v)


def _features(
    features: Sequence[program_pb2.FeatureReference], layers: Sequence[int], resolver: Resolver
) -> tuple[Detector, ...]:
    """Returns features in their order. The rows of those of one autoencoder are read together."""
    numbers: dict[str, list[int]] = {}
    for i, each in enumerate(features):
        field = f"features[{i}]"
        if not each.autoencoder:
            raise InvalidArgument(f"{field}.autoencoder", "expected the id or tag of an autoencoder")
        autoencoder = resolver.autoencoder(each.autoencoder, f"{field}.autoencoder")
        check_alone(autoencoder, each.autoencoder, f"{field}.autoencoder")
        if each.feature >= autoencoder.n_features:
            message = f"unknown feature {each.feature}: there are {autoencoder.n_features}"
            raise InvalidArgument(f"{field}.feature", message)
        if each.feature in numbers.setdefault(each.autoencoder, []):
            raise InvalidArgument(field, f"feature {each.feature} of {each.autoencoder} is named twice")
        layer = autoencoder.spec.layer
        if layers and layer not in layers:
            raise InvalidArgument(f"{field}.autoencoder", f"{each.autoencoder} reads layer {layer}, not one of these")
        numbers[each.autoencoder].append(each.feature)
    found: dict[tuple[str, int], Detector] = {}
    for ref, own in numbers.items():
        autoencoder = resolver.autoencoder(ref, "features")
        rows = autoencoder.rows(own)
        for k, number in enumerate(own):
            found[ref, number] = of_feature(ref, autoencoder.spec.site, autoencoder.spec.layer, rows.one(k))
    return tuple(found[each.autoencoder, each.feature] for each in features)


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
    report = pb.DetectorReport(
        detector=column.detector,
        feature=column.feature,
        layer=column.layer,
        pooling=POOLING_NUMBERS[column.pooling],
    )
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

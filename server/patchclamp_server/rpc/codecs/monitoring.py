"""Messages of MonitoringService ↔ dataclasses of monitoring/. What may not be asked is refused, by field path."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from patchclamp.v1 import monitoring_pb2 as pb
from patchclamp.v1 import program_pb2
from patchclamp_server.artifacts.types import Tags
from patchclamp_server.errors import InvalidArgument, NotFound
from patchclamp_server.interventions.field_checks import chosen, count, distinct, finite, known, required
from patchclamp_server.interventions.kinds.vectors import decode_vector
from patchclamp_server.interventions.program import Phase
from patchclamp_server.interventions.tensor_messages import decode_tensor
from patchclamp_server.monitoring.activations import Activations
from patchclamp_server.monitoring.drift import Drift
from patchclamp_server.monitoring.items import (
    Encoder,
    WatchedDirection,
    WatchedFeatures,
    WatchedHeads,
    WatchedNeurons,
    WatchItem,
)
from patchclamp_server.monitoring.running import RunningWatch
from patchclamp_server.monitoring.scale import Source
from patchclamp_server.monitoring.shared import Listed
from patchclamp_server.monitoring.statistics import KindStatistics, Statistics
from patchclamp_server.monitoring.stored import WatchAsked
from patchclamp_server.monitoring.stored_tensors import check_item_name
from patchclamp_server.monitoring.watch import MAX_REFERENCE_TOKENS, Watch, WatchOptions
from patchclamp_server.rpc.codecs.artifact import decode_label
from patchclamp_server.rpc.codecs.head import decode_heads
from patchclamp_server.rpc.codecs.program import PHASES, decode_site

PHASE_NUMBERS: Mapping[Phase, "program_pb2.Phase.ValueType"] = {
    Phase.PROMPT: program_pb2.PHASE_PROMPT,
    Phase.GENERATED: program_pb2.PHASE_GENERATED,
}
KIND_NUMBERS: Mapping[str, "pb.WatchItemKind.ValueType"] = {
    "neuron": pb.WATCH_ITEM_KIND_NEURON,
    "direction": pb.WATCH_ITEM_KIND_DIRECTION,
    "feature": pb.WATCH_ITEM_KIND_FEATURE,
    "head": pb.WATCH_ITEM_KIND_HEAD,
}
SCALE_NUMBERS: Mapping[Source, "pb.WatchScale.ValueType"] = {
    Source.CHOSEN: pb.WATCH_SCALE_CHOSEN,
    Source.REFERENCE: pb.WATCH_SCALE_REFERENCE,
    Source.FIRST_TOKENS: pb.WATCH_SCALE_FIRST_TOKENS,
}
QUANTILES = (0.05, 0.5, 0.95, 0.99)
MAX_NAME_BYTES = 128


@dataclass(frozen=True)
class Recorded:
    """What a reference is recorded of, and stored with. tokens 0: the window of the watch."""

    name: str
    tokens: int
    description: str
    tags: Tags
    use: bool


@dataclass(frozen=True)
class Followed:
    """items: indices, none are all. max_events 0: without an end."""

    name: str
    items: tuple[int, ...]
    threshold: float | None
    max_events: int


def decode_items(protos: Sequence[pb.WatchItem]) -> tuple[WatchItem, ...]:
    """Whether the model has what they name is seen when they are bound."""
    if not protos:
        raise InvalidArgument("items", "expected at least one item")
    return tuple(_item(proto, f"items[{i}]") for i, proto in enumerate(protos))


def decode_start(request: pb.StartWatchRequest) -> WatchAsked:
    given: dict[str, Any] = {}
    if request.HasField("sampling_rate"):
        given["sampling_rate"] = request.sampling_rate
    if request.phases:
        phases = [
            known(phase, PHASES, f"phases[{i}]", program_pb2.Phase.keys()[1:]) for i, phase in enumerate(request.phases)
        ]
        given["phases"] = frozenset(distinct(phases, "phases"))
    if request.window_tokens:
        given["window_tokens"] = request.window_tokens
    if request.buckets:
        given["buckets"] = tuple(request.buckets)
    if request.calibration_tokens:
        given["calibration_tokens"] = request.calibration_tokens
    given["export_items"] = request.export_items
    return WatchAsked(request.watch, WatchOptions(request.name, **given), request.reference)


def decode_recording(request: pb.RecordReferenceRequest) -> Recorded:
    description, tags = decode_label(request)
    tokens = count(request.tokens, "tokens", high=MAX_REFERENCE_TOKENS)
    return Recorded(request.name, tokens, description, tags, request.use)


def decode_following(request: pb.WatchActivationsRequest, watch: Watch) -> Followed:
    threshold = finite(request.threshold, "threshold") if request.HasField("threshold") else None
    max_events = count(request.max_events, "max_events", high=2**63 - 1)
    return Followed(request.name, decode_item_names(request.items, watch), threshold, max_events)


def decode_item_names(names: Sequence[str], watch: Watch) -> tuple[int, ...]:
    """Indices. NotFound: the watch has no item of that name."""
    index = {name: i for i, name in enumerate(watch.names)}
    for i, name in enumerate(distinct(names, "items")):
        if name not in index:
            raise NotFound(f"items[{i}]", f"{name!r:.200} is no item of the watch")
    return tuple(index[name] for name in names)


def encode_running(running: RunningWatch) -> pb.RunningWatch:
    return pb.RunningWatch(
        name=running.name,
        watch=running.watch_id,
        items=running.watch.names,
        reference=running.reference_id,
        started=_timestamp(running.started),
        tokens=running.tokens,
        **_options(running.options),
        state=pb.WATCH_STATE_RUNNING,
    )


def encode_listed(listed: Listed) -> pb.RunningWatch:
    """A watch that does not run here has what its record says."""
    if listed.here is not None:
        encoded = encode_running(listed.here)
    else:
        encoded = pb.RunningWatch(name=listed.name, state=pb.WATCH_STATE_REFUSED, reason=listed.reason)
        if listed.run is not None:
            options = listed.run.options
            encoded.MergeFrom(
                pb.RunningWatch(
                    watch=listed.run.watch,
                    reference=listed.run.reference,
                    started=_timestamp(listed.run.started),
                    **_options(options),
                )
            )
    encoded.configured = listed.here is not None and listed.run is None
    for replica in listed.replicas:
        state = pb.WATCH_STATE_REFUSED if replica.said.reason else pb.WATCH_STATE_RUNNING
        encoded.replicas.add(
            replica=replica.name,
            state=state,
            reason=replica.said.reason,
            tokens=replica.said.tokens,
            reported=_timestamp(replica.reported),
        )
    return encoded


def _options(options: WatchOptions) -> dict[str, Any]:
    """Fields of RunningWatch."""
    return {
        "sampling_rate": options.sampling_rate,
        "phases": [PHASE_NUMBERS[phase] for phase in Phase if phase in options.phases],
        "window_tokens": options.window_tokens,
        "buckets": options.buckets,
        "export_items": options.export_items,
        "calibration_tokens": options.calibration_tokens,
    }


def _timestamp(seconds: float) -> Timestamp:
    stamp = Timestamp()
    stamp.FromNanoseconds(round(seconds * 1e9))
    return stamp


def encode_statistics(running: RunningWatch, seen: Statistics, items: Sequence[int]) -> pb.GetWatchStatisticsResponse:
    """`items`: indices, none are all."""
    names = running.watch.names
    quantiles = seen.quantiles(QUANTILES)
    mean, deviation, sums, drift = seen.mean, seen.deviation, seen.sums, seen.drift
    return pb.GetWatchStatisticsResponse(
        watch=encode_running(running),
        items=[
            pb.ItemStatistics(
                name=names[i],
                tokens=int(sums.tokens[i]),
                fired=int(sums.fired[i]),
                mean=float(mean[i]),
                standard_deviation=float(deviation[i]),
                # Nothing has been seen: no number is the least of none, and JSON knows no infinity.
                min=float(sums.min[i]) if sums.tokens[i] else 0.0,
                max=float(sums.max[i]) if sums.tokens[i] else 0.0,
                not_finite=int(sums.not_finite[i]),
                quantiles=[
                    pb.Quantile(probability=p, value=float(value))
                    for p, value in zip(QUANTILES, quantiles[i], strict=True)
                    if np.isfinite(value)
                ],
                drift=None if drift is None else float(drift.distance[i]),
                kind=KIND_NUMBERS[seen.kind_names[seen.kind_of[i]]],
                threshold=float(seen.scale.thresholds[i]),
                drift_noise=None if drift is None else float(drift.noise[i]),
                drift_excess=None if drift is None else float(drift.excess[i]),
                tokens_left_out=int(sums.left_out[i]),
            )
            for i in items or range(len(names))
        ],
        kinds=map(_kind, seen.kinds()),
        calibration=pb.WatchCalibration(
            scale=SCALE_NUMBERS[seen.scale.source], tokens=seen.calibrated, total=seen.calibration
        ),
        sink_tokens=seen.sinks,
        **({} if drift is None else _drift(drift)),
    )


def _kind(kind: KindStatistics) -> pb.KindStatistics:
    return pb.KindStatistics(
        kind=KIND_NUMBERS[kind.name],
        items=kind.items,
        values=kind.values,
        fired=kind.fired,
        mean=kind.mean,
        min=kind.min if kind.values else 0.0,
        max=kind.max if kind.values else 0.0,
        buckets=kind.buckets,
        values_left_out=kind.left_out,
    )


def _drift(drift: Drift) -> dict[str, Any]:
    """The fields of all items together."""
    return {
        "mean_drift": drift.mean,
        "max_drift": drift.max,
        "mean_drift_noise": drift.mean_noise,
        "max_drift_noise": drift.max_noise,
        "mean_drift_excess": drift.mean_excess,
        "max_drift_excess": drift.max_excess,
    }


def encode_activations(
    batch: Activations, names: Sequence[str], text: Mapping[int, str], dropped: int
) -> pb.WatchActivationsResponse:
    """`names` of all items of the watch, `text` of every token id in the batch."""
    columns = (batch.items, batch.values, batch.token_ids, batch.positions, batch.sequences, batch.generated)
    activations = []
    for (item, value, token, position, sequence, generated), time in zip(
        zip(*(column.tolist() for column in columns), strict=True), batch.times.tolist(), strict=True
    ):
        phase = Phase.GENERATED if generated else Phase.PROMPT
        activations.append(
            pb.Activation(
                item=names[item],
                value=value,
                token_id=token,
                token=text[token],
                position=position,
                sequence=sequence,
                phase=PHASE_NUMBERS[phase],
                time=_duration(time),
            )
        )
    return pb.WatchActivationsResponse(activations=activations, dropped=dropped)


def _item(proto: pb.WatchItem, field: str) -> WatchItem:
    check_item_name(proto.name, f"{field}.name")
    if len(proto.name.encode()) > MAX_NAME_BYTES:
        raise InvalidArgument(f"{field}.name", f"expected at most {MAX_NAME_BYTES} bytes of UTF-8")
    threshold = finite(proto.threshold, f"{field}.threshold") if proto.HasField("threshold") else None
    quantile = proto.threshold_quantile if proto.HasField("threshold_quantile") else None
    name = chosen(proto, "source", field)
    source = _SOURCES[name](getattr(proto, name), f"{field}.{name}")
    return WatchItem(proto.name, source, threshold, quantile)


def _neurons(proto: pb.WatchedNeurons, field: str) -> WatchedNeurons:
    site = decode_site(proto.site, f"{field}.site") if proto.site else None
    if proto.neuron_set:
        for name in ("neurons", "layer"):
            if getattr(proto, name):
                message = "a neuron_set is given as well; expected one of neurons, neuron_set"
                raise InvalidArgument(f"{field}.{name}", message)
        return WatchedNeurons(neuron_set=proto.neuron_set, site=site)
    if not proto.neurons:
        raise InvalidArgument(f"{field}.neurons", "expected neurons, or neuron_set")
    return WatchedNeurons(proto.layer, distinct(proto.neurons, f"{field}.neurons"), site=site)


def _direction(proto: pb.WatchedDirection, field: str) -> WatchedDirection:
    required(proto, "vector", field)
    return WatchedDirection(
        vector=decode_vector(proto.vector, f"{field}.vector"),
        site=decode_site(proto.site, f"{field}.site") if proto.site else None,
        layers=distinct(proto.layers, f"{field}.layers"),
    )


def _features(proto: pb.WatchedFeatures, field: str) -> WatchedFeatures:
    numbers = {
        name: decode_tensor(getattr(proto, name), f"{field}.{name}", ndims=(1,)) if proto.HasField(name) else None
        for name in ("bias", "jump")
    }
    return WatchedFeatures(
        encoder=_encoder(proto, field),
        layer=proto.layer,
        site=decode_site(proto.site, f"{field}.site") if proto.site else None,
        **numbers,
    )


def _encoder(proto: pb.WatchedFeatures, field: str) -> Encoder:
    """Of one of the three fields."""
    given = [name for name in _ENCODERS if proto.HasField(name)]
    if not given:
        raise InvalidArgument(f"{field}.{_ENCODERS[0]}", f"missing; expected one of {', '.join(_ENCODERS[:2])}")
    if len(given) > 1:
        raise InvalidArgument(f"{field}.{given[1]}", f"{given[0]} is given as well; expected one of both")
    [name] = given
    matrix = decode_tensor(getattr(proto, name), f"{field}.{name}", ndims=(2,))
    return Encoder(name, matrix)


def _heads(proto: pb.WatchedHeads, field: str) -> WatchedHeads:
    required(proto, "heads", field)
    return WatchedHeads(decode_heads(proto.heads, f"{field}.heads"), proto.include_sink)


_ENCODERS: tuple[Literal["encoder_features_by_width", "encoder_width_by_features", "encoder"], ...] = (
    "encoder_features_by_width",
    "encoder_width_by_features",
    "encoder",
)
_SOURCES: dict[str, Any] = {"neurons": _neurons, "direction": _direction, "features": _features, "heads": _heads}


def _duration(seconds: float) -> Duration:
    duration = Duration()
    duration.FromNanoseconds(round(seconds * 1e9))
    return duration

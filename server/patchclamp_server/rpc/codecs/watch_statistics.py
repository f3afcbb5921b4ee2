"""Turns what a watch has counted into messages."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from patchclamp.v1 import monitoring_pb2 as pb
from patchclamp_server.monitoring.drift import Drift
from patchclamp_server.monitoring.running import RunningWatch
from patchclamp_server.monitoring.scale import Source
from patchclamp_server.monitoring.statistics import KindStatistics, Statistics
from patchclamp_server.rpc.codecs.monitoring import encode_running

KIND_NUMBERS: Mapping[str, "pb.WatchItemKind.ValueType"] = {
    "neuron": pb.WATCH_ITEM_KIND_NEURON,
    "direction": pb.WATCH_ITEM_KIND_DIRECTION,
    "feature": pb.WATCH_ITEM_KIND_FEATURE,
    "head": pb.WATCH_ITEM_KIND_HEAD,
    "probe": pb.WATCH_ITEM_KIND_PROBE,
}
SCALE_NUMBERS: Mapping[Source, "pb.WatchScale.ValueType"] = {
    Source.CHOSEN: pb.WATCH_SCALE_CHOSEN,
    Source.REFERENCE: pb.WATCH_SCALE_REFERENCE,
    Source.FIRST_TOKENS: pb.WATCH_SCALE_FIRST_TOKENS,
}
QUANTILES = (0.05, 0.5, 0.95, 0.99)


def encode_statistics(running: RunningWatch, seen: Statistics, items: Sequence[int]) -> pb.GetWatchStatisticsResponse:
    """Returns the message; `items` has indices, none are all."""
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
    """Returns the fields of all items together."""
    return {
        "mean_drift": drift.mean,
        "max_drift": drift.max,
        "mean_drift_noise": drift.mean_noise,
        "max_drift_noise": drift.max_noise,
        "mean_drift_excess": drift.mean_excess,
        "max_drift_excess": drift.max_excess,
    }

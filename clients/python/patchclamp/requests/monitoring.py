"""Requests of MonitoringService."""

from collections.abc import Iterable, Sequence
from typing import TypedDict

from patchclamp.names import PHASES, PhaseName, value_of
from patchclamp.v1 import monitoring_pb2 as pb


class WatchOptions(TypedDict, total=False):
    """tags: names to store the watch under."""

    description: str
    tags: Sequence[str]
    model: str


class StartWatchOptions(TypedDict, total=False):
    """sampling_rate: share of the tokens, default 1. phases: default ("generated",). window_tokens: of drift.

    buckets: upper bounds of the histograms in Prometheus, default by the reference or the first tokens. reference: id
    or tag of a watch_reference of this watch. calibration_tokens: first tokens that what was not chosen is derived
    from. export_items: series in Prometheus for each item too.
    """

    sampling_rate: float
    phases: Iterable[PhaseName]
    window_tokens: int
    buckets: Iterable[float]
    reference: str
    calibration_tokens: int
    export_items: bool


class ReferenceOptions(TypedDict, total=False):
    """tokens: default the window of the watch. use: measure drift against it from then on."""

    tokens: int
    description: str
    tags: Sequence[str]
    use: bool


class FollowOptions(TypedDict, total=False):
    """items: names, default all. threshold: in place of the items' own. max_events: default without an end."""

    items: Iterable[str]
    threshold: float
    max_events: int


def create_watch(items: Iterable[pb.WatchItem], options: WatchOptions) -> pb.CreateWatchRequest:
    return pb.CreateWatchRequest(
        model=options.get("model", ""),
        items=items,
        description=options.get("description", ""),
        tags=options.get("tags", ()),
    )


def start_watch(watch: str, name: str, options: StartWatchOptions) -> pb.StartWatchRequest:
    """TypeError for one phase that is not in a list."""
    phases = options.get("phases", ())
    if isinstance(phases, str):
        raise TypeError(f"expected several phases: [{phases!r}]")
    return pb.StartWatchRequest(
        watch=watch,
        name=name,
        sampling_rate=options.get("sampling_rate"),
        phases=[value_of(PHASES, phase, "phase") for phase in phases],
        window_tokens=options.get("window_tokens", 0),
        buckets=options.get("buckets", ()),
        reference=options.get("reference", ""),
        calibration_tokens=options.get("calibration_tokens", 0),
        export_items=options.get("export_items", False),
    )


def record_reference(name: str, options: ReferenceOptions) -> pb.RecordReferenceRequest:
    return pb.RecordReferenceRequest(
        name=name,
        tokens=options.get("tokens", 0),
        description=options.get("description", ""),
        tags=options.get("tags", ()),
        use=options.get("use", False),
    )


def watch_activations(name: str, options: FollowOptions) -> pb.WatchActivationsRequest:
    return pb.WatchActivationsRequest(
        name=name,
        items=options.get("items", ()),
        threshold=options.get("threshold"),
        max_events=options.get("max_events", 0),
    )

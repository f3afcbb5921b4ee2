"""Requests of MonitoringService."""

from collections.abc import Iterable, Sequence
from typing import TypedDict

from patchclamp.fields import build, several
from patchclamp.names import PHASES, PhaseName, value_of
from patchclamp.requests.artifacts import StoredOptions
from patchclamp.v1 import monitoring_pb2 as pb


class WatchOptions(StoredOptions, total=False):
    """Options of a watch that is stored, besides StoredOptions."""

    model: str


class StartWatchOptions(TypedDict, total=False):
    """Options of a watch that is started.

    sampling_rate: share of the tokens, by default 1. phases: by default ("generated",). window_tokens: how many tokens
    drift is measured over. buckets: upper bounds of the histograms in Prometheus, by default derived from the reference
    or the first tokens. reference: id or tag of a watch_reference of this watch. calibration_tokens: how many first
    tokens what was not chosen is derived from. export_items: whether each item has series in Prometheus too.
    """

    sampling_rate: float | None
    phases: Iterable[PhaseName]
    window_tokens: int
    buckets: Iterable[float]
    reference: str
    calibration_tokens: int
    export_items: bool


class ReferenceOptions(StoredOptions, total=False):
    """Options of a recording, besides StoredOptions.

    tokens: how many are recorded, by default the window of the watch. use: whether drift is measured against it from
    then on.
    """

    tokens: int
    use: bool


class FollowOptions(TypedDict, total=False):
    """Options of who follows a watch.

    items: names, by default all. threshold: one in place of the items' own. max_events: by default there is no end.
    """

    items: Iterable[str]
    threshold: float | None
    max_events: int


def create_watch(
    items: Iterable[pb.WatchItem],
    *,
    description: str = "",
    tags: Sequence[str] = (),
    replace_tags: bool = False,
    model: str = "",
) -> pb.CreateWatchRequest:
    return build(
        pb.CreateWatchRequest, model=model, items=items, description=description, tags=tags, replace_tags=replace_tags
    )


def start_watch(
    watch: str,
    name: str,
    *,
    sampling_rate: float | None = None,
    phases: Iterable[PhaseName] = (),
    window_tokens: int = 0,
    buckets: Iterable[float] = (),
    reference: str = "",
    calibration_tokens: int = 0,
    export_items: bool = False,
) -> pb.StartWatchRequest:
    """Returns a request to start a watch. Raises TypeError for one phase that is not in a list."""
    listed = several(phases, "phases", f"one of {', '.join(PHASES)}")
    return build(
        pb.StartWatchRequest,
        watch=watch,
        name=name,
        sampling_rate=sampling_rate,
        phases=[value_of(PHASES, phase, f"phases[{i}]") for i, phase in enumerate(listed)],
        window_tokens=window_tokens,
        buckets=buckets,
        reference=reference,
        calibration_tokens=calibration_tokens,
        export_items=export_items,
    )


def record_reference(
    name: str,
    *,
    tokens: int = 0,
    description: str = "",
    tags: Sequence[str] = (),
    replace_tags: bool = False,
    use: bool = False,
) -> pb.RecordReferenceRequest:
    return build(
        pb.RecordReferenceRequest,
        name=name,
        tokens=tokens,
        description=description,
        tags=tags,
        replace_tags=replace_tags,
        use=use,
    )


def watch_activations(
    name: str, *, items: Iterable[str] = (), threshold: float | None = None, max_events: int = 0
) -> pb.WatchActivationsRequest:
    return build(pb.WatchActivationsRequest, name=name, items=items, threshold=threshold, max_events=max_events)

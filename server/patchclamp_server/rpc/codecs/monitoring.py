"""Turns messages of MonitoringService into dataclasses of monitoring/ and back. Refusals name fields."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from patchclamp.v1 import monitoring_pb2 as pb
from patchclamp.v1 import program_pb2
from patchclamp_server.artifacts.types import Tags
from patchclamp_server.errors import NotFound
from patchclamp_server.interventions.field_checks import count, distinct, finite, known
from patchclamp_server.interventions.program import Phase
from patchclamp_server.monitoring.activations import Activations
from patchclamp_server.monitoring.running import RunningWatch
from patchclamp_server.monitoring.shared import Listed
from patchclamp_server.monitoring.stored import WatchAsked
from patchclamp_server.monitoring.watch import MAX_REFERENCE_TOKENS, Watch, WatchOptions
from patchclamp_server.rpc.codecs.artifact import decode_label
from patchclamp_server.rpc.codecs.program import PHASES
from patchclamp_server.rpc.codecs.times import duration, timestamp

PHASE_NUMBERS: Mapping[Phase, "program_pb2.Phase.ValueType"] = {
    Phase.PROMPT: program_pb2.PHASE_PROMPT,
    Phase.GENERATED: program_pb2.PHASE_GENERATED,
}


@dataclass(frozen=True)
class Recorded:
    """What a reference is recorded of, and stored with. A `tokens` of 0 is the window of the watch."""

    name: str
    tokens: int
    description: str
    tags: Tags
    use: bool


@dataclass(frozen=True)
class Followed:
    """A followed watch. `items` has indices, none are all; a `max_events` of 0 sets no end."""

    name: str
    items: tuple[int, ...]
    threshold: float | None
    max_events: int


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
    """Returns the indices. Raises NotFound where the watch has no item of that name."""
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
        started=timestamp(running.started),
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
                    started=timestamp(listed.run.started),
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
            reported=timestamp(replica.reported),
        )
    return encoded


def _options(options: WatchOptions) -> dict[str, Any]:
    """Returns the fields of RunningWatch."""
    return {
        "sampling_rate": options.sampling_rate,
        "phases": [PHASE_NUMBERS[phase] for phase in Phase if phase in options.phases],
        "window_tokens": options.window_tokens,
        "buckets": options.buckets,
        "export_items": options.export_items,
        "calibration_tokens": options.calibration_tokens,
    }


def encode_activations(
    batch: Activations, names: Sequence[str], text: Mapping[int, str], dropped: int
) -> pb.WatchActivationsResponse:
    """Returns the message; `names` are those of all items of the watch, `text` has every token id in the batch."""
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
                time=duration(time),
            )
        )
    return pb.WatchActivationsResponse(activations=activations, dropped=dropped)

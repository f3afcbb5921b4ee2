"""Results of MonitoringService."""

from dataclasses import dataclass
from typing import Any

from patchclamp.results.artifacts import Artifact
from patchclamp.results.jobs import Progress
from patchclamp.results.record import Record
from patchclamp.v1 import monitoring_pb2 as pb


@dataclass(frozen=True)
class CreatedWatch(Record):
    """Holds the stored watch, and the names of all its items in the order of the statistics."""

    artifact: Artifact
    items: tuple[str, ...]


@dataclass(frozen=True)
class WatchReplica(Record):
    """Holds what one of the servers that share an artifact store said of a watch.

    state: "running", or "refused" for the reason given. reported: an RFC 3339 time.
    """

    replica: str
    state: str
    reason: str
    tokens: int
    reported: str


@dataclass(frozen=True)
class RunningWatch(Record):
    """Describes a watch that was started.

    watch, reference: ids of artifacts; reference is "" where there is none. started: an RFC 3339 time.

    buckets: those that were chosen; what is in use is in the statistics. configured: by the server's --watch, and not
    in the store. state: "running", or "refused" for the reason given. replicas: in a listing, of all servers of the
    store.
    """

    name: str
    watch: str
    items: tuple[str, ...]
    sampling_rate: float
    phases: tuple[str, ...]
    window_tokens: int
    buckets: tuple[float, ...]
    reference: str
    started: str
    tokens: int
    calibration_tokens: int = 0
    export_items: bool = False
    configured: bool = False
    state: str = "running"
    reason: str = ""
    replicas: tuple[WatchReplica, ...] = ()

    @classmethod
    def from_proto(cls, message: pb.RunningWatch, **given: Any) -> "RunningWatch":
        # A server that does not say so yet knows of no watch that does not run.
        known = given if message.state else {"state": "running", **given}
        return super().from_proto(message, **known)


@dataclass(frozen=True)
class RunningWatches(Record):
    """Holds the watches that run, and how many watches and items may. replica: the server that answers."""

    watches: tuple[RunningWatch, ...]
    max_watches: int
    max_items: int
    replica: str = ""


@dataclass(frozen=True)
class Quantile(Record):
    probability: float
    value: float


@dataclass(frozen=True)
class ItemStatistics(Record):
    """Describes the finite values of an item.

    drift: None without a reference, and before a window is full. drift_noise: what chance alone makes of two samples of
    the same traffic. drift_excess: the drift beyond it. threshold: the one in use, chosen or derived.
    tokens_left_out: those whose norm is an outlier, as that of attention sinks is; they are in no other figure.
    """

    name: str
    tokens: int
    fired: int
    mean: float
    standard_deviation: float
    min: float
    max: float
    not_finite: int
    quantiles: tuple[Quantile, ...]
    drift: float | None = None
    kind: str = ""
    threshold: float = 0.0
    drift_noise: float | None = None
    drift_excess: float | None = None
    tokens_left_out: int = 0


@dataclass(frozen=True)
class KindStatistics(Record):
    """Describes the items of one kind together. buckets: upper bounds of the histogram in Prometheus."""

    kind: str
    items: int
    values: int
    fired: int
    mean: float
    min: float
    max: float
    buckets: tuple[float, ...]
    values_left_out: int = 0


@dataclass(frozen=True)
class WatchCalibration(Record):
    """Says where thresholds and buckets come from that nobody chose.

    scale: "chosen" (there are none), "reference" or "first_tokens". Of the latter there are `tokens` of `total`: until
    they are all there, thresholds, buckets and what is left out as an outlier still change, and all figures with them.
    """

    scale: str
    tokens: int
    total: int


@dataclass(frozen=True)
class WatchStatistics(Record):
    """Holds what a running watch has seen.

    mean_drift, max_drift: drift over the items; None without a reference, and before a window is full. …_noise: what
    chance makes of them. …_excess: what is beyond it, which is what to alert on. sink_tokens: how many first tokens of
    sequences were seen, which are in no other figure.
    """

    watch: RunningWatch
    items: tuple[ItemStatistics, ...]
    mean_drift: float | None = None
    max_drift: float | None = None
    mean_drift_noise: float | None = None
    max_drift_noise: float | None = None
    mean_drift_excess: float | None = None
    max_drift_excess: float | None = None
    kinds: tuple[KindStatistics, ...] = ()
    calibration: WatchCalibration | None = None
    sink_tokens: int = 0


@dataclass
class ReferenceCollector:
    """Turns the messages of a recording into progress and the stored watch_reference."""

    _result: Artifact | None = None

    def add(self, message: pb.RecordReferenceResponse) -> Progress | Artifact:
        match message.WhichOneof("event"):
            case "progress":
                return Progress("tokens", message.progress.tokens, message.progress.total)
            case "result":
                self._result = Artifact.from_proto(message.result)
                return self._result
            case other:
                raise ValueError(f"a recording sent an event this client does not know: {other}")

    def result(self) -> Artifact | None:
        """Returns the reference; None while the recording goes on."""
        return self._result


@dataclass(frozen=True)
class Activation(Record):
    """Says that an item was above its threshold at a token.

    sequence: number of the request. seconds: time since the watch started.
    """

    item: str
    value: float
    token_id: int
    token: str
    position: int
    sequence: int
    phase: str
    seconds: float

    @classmethod
    def from_proto(cls, message: pb.Activation, **given: Any) -> "Activation":
        seconds = message.time.seconds + message.time.nanos * 1e-9
        return super().from_proto(message, seconds=seconds, **given)


@dataclass(frozen=True)
class Activations(Record):
    """Holds a batch of activations.

    dropped: how many were left out before these, because this client reads more slowly than they occur.
    """

    activations: tuple[Activation, ...]
    dropped: int


@dataclass(frozen=True)
class ActivationCounts(Record):
    """Counts what a stream of activations brought: it may have no end, so nothing but the counts is kept."""

    activations: int
    dropped: int


@dataclass
class ActivationCollector:
    """Turns messages into batches of activations."""

    activations: int = 0
    dropped: int = 0

    def add(self, message: pb.WatchActivationsResponse) -> Activations:
        batch = Activations.from_proto(message)
        self.activations += len(batch.activations)
        self.dropped += batch.dropped
        return batch

    def result(self) -> ActivationCounts:
        return ActivationCounts(self.activations, self.dropped)

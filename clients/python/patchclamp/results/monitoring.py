"""Results of MonitoringService."""

from dataclasses import dataclass

from patchclamp.names import PHASES, name_of
from patchclamp.results.artifacts import Artifact
from patchclamp.results.jobs import Progress
from patchclamp.results.record import Record
from patchclamp.v1 import monitoring_pb2 as pb


@dataclass(frozen=True)
class CreatedWatch(Record):
    """The stored watch, and the names of all its items in the order of the statistics."""

    artifact: Artifact
    items: tuple[str, ...]

    @classmethod
    def from_proto(cls, message: pb.CreateWatchResponse) -> "CreatedWatch":
        return cls(Artifact.from_proto(message.artifact), tuple(message.items))


WATCH_STATES = {"running": pb.WATCH_STATE_RUNNING, "refused": pb.WATCH_STATE_REFUSED}
ITEM_KINDS = {
    "neuron": pb.WATCH_ITEM_KIND_NEURON,
    "direction": pb.WATCH_ITEM_KIND_DIRECTION,
    "feature": pb.WATCH_ITEM_KIND_FEATURE,
    "head": pb.WATCH_ITEM_KIND_HEAD,
}
SCALES = {
    "chosen": pb.WATCH_SCALE_CHOSEN,
    "reference": pb.WATCH_SCALE_REFERENCE,
    "first_tokens": pb.WATCH_SCALE_FIRST_TOKENS,
}


@dataclass(frozen=True)
class WatchReplica(Record):
    """What one of the servers that share an artifact store said of a watch. state: "running" or "refused", for the
    reason given. reported: an RFC 3339 time."""

    replica: str
    state: str
    reason: str
    tokens: int
    reported: str

    @classmethod
    def from_proto(cls, message: pb.ReplicaWatch) -> "WatchReplica":
        return cls(
            message.replica,
            name_of(WATCH_STATES, message.state),
            message.reason,
            message.tokens,
            message.reported.ToJsonString(),
        )


@dataclass(frozen=True)
class RunningWatch(Record):
    """watch, reference: ids of artifacts; reference is "" where there is none. started: an RFC 3339 time.

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
    def from_proto(cls, message: pb.RunningWatch) -> "RunningWatch":
        return cls(
            name=message.name,
            watch=message.watch,
            items=tuple(message.items),
            sampling_rate=message.sampling_rate,
            phases=tuple(name_of(PHASES, phase) for phase in message.phases),
            window_tokens=message.window_tokens,
            buckets=tuple(message.buckets),
            reference=message.reference,
            started=message.started.ToJsonString(),
            tokens=message.tokens,
            calibration_tokens=message.calibration_tokens,
            export_items=message.export_items,
            configured=message.configured,
            state=name_of(WATCH_STATES, message.state) if message.state else "running",
            reason=message.reason,
            replicas=tuple(map(WatchReplica.from_proto, message.replicas)),
        )


@dataclass(frozen=True)
class RunningWatches(Record):
    """What runs, and how many watches and items may. replica: the server that answers."""

    watches: tuple[RunningWatch, ...]
    max_watches: int
    max_items: int
    replica: str = ""

    @classmethod
    def from_proto(cls, message: pb.ListWatchesResponse) -> "RunningWatches":
        watches = tuple(map(RunningWatch.from_proto, message.watches))
        return cls(watches, message.max_watches, message.max_items, message.replica)


@dataclass(frozen=True)
class Quantile(Record):
    probability: float
    value: float


@dataclass(frozen=True)
class ItemStatistics(Record):
    """Of the finite values; drift: None without a reference, and before a window is full. threshold: in use, chosen or
    derived. drift_noise: what chance alone makes of two samples of the same traffic; drift_excess: drift beyond it.
    tokens_left_out: outliers of norm, as attention sinks are, which are in no other figure."""

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

    @classmethod
    def from_proto(cls, message: pb.ItemStatistics) -> "ItemStatistics":
        return cls(
            name=message.name,
            tokens=message.tokens,
            fired=message.fired,
            mean=message.mean,
            standard_deviation=message.standard_deviation,
            min=message.min,
            max=message.max,
            not_finite=message.not_finite,
            quantiles=tuple(Quantile(each.probability, each.value) for each in message.quantiles),
            drift=message.drift if message.HasField("drift") else None,
            kind=name_of(ITEM_KINDS, message.kind) if message.kind else "",
            threshold=message.threshold,
            drift_noise=message.drift_noise if message.HasField("drift_noise") else None,
            drift_excess=message.drift_excess if message.HasField("drift_excess") else None,
            tokens_left_out=message.tokens_left_out,
        )


@dataclass(frozen=True)
class KindStatistics(Record):
    """The items of one kind together. buckets: upper bounds of the histogram in Prometheus."""

    kind: str
    items: int
    values: int
    fired: int
    mean: float
    min: float
    max: float
    buckets: tuple[float, ...]
    values_left_out: int = 0

    @classmethod
    def from_proto(cls, message: pb.KindStatistics) -> "KindStatistics":
        return cls(
            kind=name_of(ITEM_KINDS, message.kind),
            items=message.items,
            values=message.values,
            fired=message.fired,
            mean=message.mean,
            min=message.min,
            max=message.max,
            buckets=tuple(message.buckets),
            values_left_out=message.values_left_out,
        )


@dataclass(frozen=True)
class WatchCalibration(Record):
    """Where thresholds and buckets come from that nobody chose: "chosen" (there are none), "reference", "first_tokens".
    Of first tokens there are `tokens` of `total`: until they are all there, thresholds, buckets and what is left out as
    an outlier still change, and all figures with them."""

    scale: str
    tokens: int
    total: int

    @classmethod
    def from_proto(cls, message: pb.WatchCalibration) -> "WatchCalibration":
        return cls(name_of(SCALES, message.scale), message.tokens, message.total)


@dataclass(frozen=True)
class WatchStatistics(Record):
    """mean_drift, max_drift: over the items; None without a reference, and before a window is full. …_noise: what
    chance makes of them; …_excess: what is beyond it, which is what to alert on. sink_tokens: first tokens of
    sequences, which are in no other figure."""

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

    @classmethod
    def from_proto(cls, message: pb.GetWatchStatisticsResponse) -> "WatchStatistics":
        return cls(
            RunningWatch.from_proto(message.watch),
            tuple(map(ItemStatistics.from_proto, message.items)),
            message.mean_drift if message.HasField("mean_drift") else None,
            message.max_drift if message.HasField("max_drift") else None,
            message.mean_drift_noise if message.HasField("mean_drift_noise") else None,
            message.max_drift_noise if message.HasField("max_drift_noise") else None,
            message.mean_drift_excess if message.HasField("mean_drift_excess") else None,
            message.max_drift_excess if message.HasField("max_drift_excess") else None,
            kinds=tuple(map(KindStatistics.from_proto, message.kinds)),
            calibration=WatchCalibration.from_proto(message.calibration) if message.HasField("calibration") else None,
            sink_tokens=message.sink_tokens,
        )


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
        """None while the recording goes on."""
        return self._result


@dataclass(frozen=True)
class Activation(Record):
    """An item above its threshold at a token. sequence: number of the request; seconds: since the watch started."""

    item: str
    value: float
    token_id: int
    token: str
    position: int
    sequence: int
    phase: str
    seconds: float

    @classmethod
    def from_proto(cls, message: pb.Activation) -> "Activation":
        return cls(
            item=message.item,
            value=message.value,
            token_id=message.token_id,
            token=message.token,
            position=message.position,
            sequence=message.sequence,
            phase=name_of(PHASES, message.phase),
            seconds=message.time.seconds + message.time.nanos * 1e-9,
        )


@dataclass(frozen=True)
class Activations(Record):
    """dropped: that were left out before these, because this client reads more slowly than they occur."""

    activations: tuple[Activation, ...]
    dropped: int

    @classmethod
    def from_proto(cls, message: pb.WatchActivationsResponse) -> "Activations":
        return cls(tuple(map(Activation.from_proto, message.activations)), message.dropped)


@dataclass(frozen=True)
class ActivationCounts(Record):
    """What a stream of activations brought: it may have no end, so nothing but the counts is kept."""

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

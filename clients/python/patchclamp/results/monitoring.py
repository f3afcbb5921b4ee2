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


@dataclass(frozen=True)
class RunningWatch(Record):
    """watch, reference: ids of artifacts; reference is "" where there is none. started: an RFC 3339 time."""

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
        )


@dataclass(frozen=True)
class RunningWatches(Record):
    """What runs, and how many watches and items may."""

    watches: tuple[RunningWatch, ...]
    max_watches: int
    max_items: int

    @classmethod
    def from_proto(cls, message: pb.ListWatchesResponse) -> "RunningWatches":
        return cls(tuple(map(RunningWatch.from_proto, message.watches)), message.max_watches, message.max_items)


@dataclass(frozen=True)
class Quantile(Record):
    probability: float
    value: float


@dataclass(frozen=True)
class ItemStatistics(Record):
    """Of the finite values; drift: None without a reference, and before a window is full."""

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
        )


@dataclass(frozen=True)
class WatchStatistics(Record):
    """mean_drift, max_drift: over the items; None without a reference, and before a window is full."""

    watch: RunningWatch
    items: tuple[ItemStatistics, ...]
    mean_drift: float | None = None
    max_drift: float | None = None

    @classmethod
    def from_proto(cls, message: pb.GetWatchStatisticsResponse) -> "WatchStatistics":
        return cls(
            RunningWatch.from_proto(message.watch),
            tuple(map(ItemStatistics.from_proto, message.items)),
            message.mean_drift if message.HasField("mean_drift") else None,
            message.max_drift if message.HasField("max_drift") else None,
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

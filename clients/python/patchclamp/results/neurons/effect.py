"""What editing neurons does, beside random neurons."""

from collections.abc import Iterator
from dataclasses import dataclass

from patchclamp.neurons import Neuron
from patchclamp.results.jobs import Progress
from patchclamp.results.record import Record
from patchclamp.v1 import neuron_pb2 as pb


@dataclass(frozen=True)
class NeuronMeasurement(Record):
    """Compares edited and unedited model by one metric of one test; intervals are 95 %.

    side: whether it is a test of what should not change. random: the changes of the random sets. beyond_random: change
    less their mean.
    """

    test: str
    side: bool
    metric: str
    unedited: float
    edited: float
    change: float
    low: float
    high: float
    random: tuple[float, ...]
    random_mean: float
    random_deviation: float
    beyond_random: float
    beyond_random_low: float
    beyond_random_high: float


@dataclass(frozen=True)
class NeuronEditPoint(Record):
    """Holds all tests with this fraction of the set edited."""

    fraction: float
    neurons: int
    measurements: tuple[NeuronMeasurement, ...]


@dataclass(frozen=True)
class NeuronEditEffect(Record):
    """Holds the tests at growing fractions of `neurons`, the whole set in the order in which it was edited."""

    points: tuple[NeuronEditPoint, ...]
    neurons: tuple[Neuron, ...]

    def curves(self) -> Iterator[tuple[tuple[float, NeuronMeasurement], ...]]:
        """Yields (fraction, measurement) at all points, for each metric of each test."""
        by_metric: dict[tuple[str, str], list[tuple[float, NeuronMeasurement]]] = {}
        for point in self.points:
            for each in point.measurements:
                by_metric.setdefault((each.test, each.metric), []).append((point.fraction, each))
        yield from map(tuple, by_metric.values())


NeuronEditEvent = Progress | NeuronEditPoint | NeuronEditEffect


@dataclass
class NeuronEditCollector:
    """Turns the messages of an evaluation into events: points as they come, then the effect."""

    _result: NeuronEditEffect | None = None

    def add(self, message: pb.EvaluateNeuronEditResponse) -> NeuronEditEvent:
        match message.WhichOneof("event"):
            case "progress":
                return Progress.from_proto(message.progress)
            case "point":
                return NeuronEditPoint.from_proto(message.point)
            case "result":
                self._result = NeuronEditEffect.from_proto(message.result)
                return self._result
            case other:
                raise ValueError(f"an evaluation sent an event this client does not know: {other}")

    def result(self) -> NeuronEditEffect | None:
        """Returns the effect; None while it has not arrived."""
        return self._result

"""Results that come in parts: neurons that are decoded or described as they are done."""

from dataclasses import dataclass, field

from patchclamp.results.jobs import Progress
from patchclamp.results.neurons.corpus import NeuronDescription
from patchclamp.results.neurons.weights import DecodedNeuron, DecodedNeurons
from patchclamp.v1 import neuron_pb2 as pb


@dataclass
class DecodeCollector:
    """Turns the messages of a decoding into events, and keeps all neurons."""

    _decoded: list[DecodedNeuron] = field(default_factory=list)

    def add(self, message: pb.DecodeNeuronsResponse) -> Progress | DecodedNeurons:
        match message.WhichOneof("event"):
            case "progress":
                return Progress.from_proto(message.progress)
            case "decoded":
                batch = DecodedNeurons.from_proto(message.decoded)
                self._decoded.extend(batch.neurons)
                return batch
            case other:
                raise ValueError(f"a decoding sent an event this client does not know: {other}")

    def result(self) -> tuple[DecodedNeuron, ...] | None:
        """Returns the neurons; None where none has arrived."""
        return tuple(self._decoded) or None


@dataclass
class DescribeCollector:
    """Turns the messages of a description into events, and keeps the descriptions."""

    _described: list[NeuronDescription] = field(default_factory=list)

    def add(self, message: pb.DescribeNeuronsResponse) -> Progress | NeuronDescription:
        match message.WhichOneof("event"):
            case "progress":
                return Progress.from_proto(message.progress)
            case "description":
                description = NeuronDescription.from_proto(message.description)
                self._described.append(description)
                return description
            case other:
                raise ValueError(f"a description sent an event this client does not know: {other}")

    def result(self) -> tuple[NeuronDescription, ...] | None:
        """Returns the descriptions; None where none has arrived."""
        return tuple(self._described) or None

"""Messages of DecodeNeurons ↔ analysis/neurons/decode.py."""

from collections.abc import Sequence

from patchclamp.v1 import neuron_pb2 as pb
from patchclamp_server.analysis.neurons.decode import DecodedNeuron, DecodedRow, DecodedToken, Decoding
from patchclamp_server.analysis.neurons.weights import NeuronWeights, weights_of
from patchclamp_server.analysis.progress import Progress
from patchclamp_server.artifacts.neuron_sets import select
from patchclamp_server.artifacts.store import ArtifactStore
from patchclamp_server.errors import InvalidArgument
from patchclamp_server.interventions.field_checks import count, distinct, known
from patchclamp_server.model.info import ModelInfo
from patchclamp_server.model.spec import DecoderSpec
from patchclamp_server.rpc.codecs.neurons.common import decode_layers, decode_selection, encode_neuron
from patchclamp_server.rpc.codecs.progress import encode_progress
from patchclamp_server.text.prompt import PromptEncoder

DEFAULT_TOKENS, MAX_TOKENS = 10, 100
WEIGHTS: dict[int, NeuronWeights] = {pb.NeuronWeights.Value(f"NEURON_WEIGHTS_{w.name}"): w for w in NeuronWeights}
WEIGHT_NUMBERS: dict[NeuronWeights, "pb.NeuronWeights.ValueType"] = {
    w: pb.NeuronWeights.Value(f"NEURON_WEIGHTS_{w.name}") for w in NeuronWeights
}


def decode_decoding(
    request: pb.DecodeNeuronsRequest, store: ArtifactStore, info: ModelInfo, spec: DecoderSpec
) -> Decoding:
    """Returns a checked job. It may load a neuron set: call it in a thread."""
    top_k = count(request.top_k or DEFAULT_TOKENS, "top_k", low=1, high=MAX_TOKENS)
    weights = _weights(request.weights, spec)
    if not request.HasField("neurons"):
        return Decoding(decode_layers(request.layers, info), weights, top_k=top_k)
    if request.layers:
        raise InvalidArgument("layers", "neurons are given, which name their layers; expected one of neurons, layers")
    selection = decode_selection(request.neurons, "neurons")
    return Decoding((), weights, select(selection, store, info, "neurons").neurons, top_k)


def encode_decoding(event: Progress | list[DecodedNeuron], *, prompts: PromptEncoder) -> pb.DecodeNeuronsResponse:
    if isinstance(event, Progress):
        return encode_progress(event, pb.DecodeNeuronsResponse)
    neurons = [
        pb.DecodedNeuron(neuron=encode_neuron(n.neuron), rows=[_row(row, prompts) for row in n.rows]) for n in event
    ]
    return pb.DecodeNeuronsResponse(decoded=pb.DecodedNeurons(neurons=neurons))


def encode_token(token: DecodedToken, prompts: PromptEncoder) -> pb.DecodedToken:
    return pb.DecodedToken(id=token.id, text=prompts.piece(token.id), product=token.product, effect=token.effect)


def _row(row: DecodedRow, prompts: PromptEncoder) -> pb.DecodedRow:
    return pb.DecodedRow(
        weights=WEIGHT_NUMBERS[row.weights],
        top=[encode_token(token, prompts) for token in row.top],
        bottom=[encode_token(token, prompts) for token in row.bottom],
        top_z=row.top_z,
        bottom_z=row.bottom_z,
    )


def _weights(numbers: Sequence[int], spec: DecoderSpec) -> tuple[NeuronWeights, ...]:
    has = weights_of(spec)
    chosen = []
    for i, number in enumerate(distinct(numbers, "weights")):
        weights = known(number, WEIGHTS, f"weights[{i}]", pb.NeuronWeights.keys()[1:])
        if weights not in has:
            message = f"{spec.architecture} has no {weights.value} rows; it has {', '.join(w.value for w in has)}"
            raise InvalidArgument(f"weights[{i}]", message)
        chosen.append(weights)
    return tuple(chosen) or has

"""Messages of MatchNeurons ↔ analysis/neurons/match.py."""

from collections.abc import Mapping

from patchclamp.v1 import neuron_pb2 as pb
from patchclamp_server.analysis.neurons.match import Matched, Matching
from patchclamp_server.analysis.progress import Progress
from patchclamp_server.artifacts.store import ArtifactStore
from patchclamp_server.errors import FailedPrecondition, InvalidArgument, NotFound
from patchclamp_server.interventions.field_checks import required
from patchclamp_server.model.info import ModelInfo
from patchclamp_server.rpc.codecs.artifact import decode_label
from patchclamp_server.rpc.codecs.neurons.common import decode_layers, decode_selection, encode_neuron, encode_stored
from patchclamp_server.rpc.codecs.neurons.texts import decode_texts
from patchclamp_server.rpc.codecs.progress import encode_progress
from patchclamp_server.text.prompt import PromptEncoder

MAX_MATCHES = 10_000


def decode_matching(
    request: pb.MatchNeuronsRequest,
    prompts: PromptEncoder,
    store: ArtifactStore,
    info: ModelInfo,
    models: Mapping[str, str],
) -> Matching:
    """Returns a checked job. `models`: paths of checkpoints by the name that the operator gave. It tokenises and may
    load a corpus: call it in a thread."""
    path = _path(request.other, models)
    required(request, "texts", "")
    named = request.HasField("neurons")
    if named and request.layers:
        raise InvalidArgument("layers", "are not taken with neurons, which name theirs")
    description, tags = decode_label(request)
    return Matching(
        request.other,
        path,
        decode_texts(request.texts, "texts", prompts, store, info),
        decode_selection(request.neurons, "neurons") if named else None,
        decode_layers(request.layers, info),
        request.any_layer,
        request.seed,
        description,
        tags,
    )


def encode_matching(event: Progress | Matched) -> pb.MatchNeuronsResponse:
    if isinstance(event, Progress):
        return encode_progress(event, pb.MatchNeuronsResponse)
    matches = [
        pb.NeuronMatch(
            neuron=encode_neuron(match.neuron),
            other=encode_neuron(match.other),
            correlation=match.correlation,
            mutual=match.mutual,
        )
        for match in event.matches[:MAX_MATCHES]
    ]
    result = pb.MatchedNeurons(
        ported=None if event.ported is None else encode_stored(event.ported),
        matches=matches,
        neurons=event.neurons,
        mutual=len(event.mutual),
        tokens=event.tokens,
        mean_correlation=event.mean_correlation,
        shuffled_mean_correlation=event.shuffled_mean_correlation,
    )
    return pb.MatchNeuronsResponse(result=result)


def _path(name: str, models: Mapping[str, str]) -> str:
    if not name:
        raise InvalidArgument("other", "expected the name of a checkpoint that the server was started with")
    if not models:
        raise FailedPrecondition("other", "the server was started without a checkpoint: --match-model NAME=PATH")
    if name not in models:
        message = f"{name!r:.80} is none of those named with --match-model: {', '.join(sorted(models))}"
        raise NotFound("other", message)
    return models[name]

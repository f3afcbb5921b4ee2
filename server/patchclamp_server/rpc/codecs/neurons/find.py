"""Messages of FindNeurons ↔ analysis/neurons/find.py."""

import torch

from patchclamp.v1 import neuron_pb2 as pb
from patchclamp_server.analysis.neurons.find import Finding
from patchclamp_server.analysis.neurons.find_job import FoundSet
from patchclamp_server.analysis.progress import Progress
from patchclamp_server.artifacts.store import ArtifactStore
from patchclamp_server.errors import InvalidArgument
from patchclamp_server.interventions.field_checks import chosen, count, distinct, finite
from patchclamp_server.interventions.kinds.vectors import decode_vector
from patchclamp_server.interventions.resolver import Resolver
from patchclamp_server.model.info import ModelInfo
from patchclamp_server.model.sites import Site
from patchclamp_server.rpc.codecs.artifact import decode_label
from patchclamp_server.rpc.codecs.neurons.common import decode_layers, encode_stored
from patchclamp_server.rpc.codecs.neurons.decode import encode_token
from patchclamp_server.rpc.codecs.progress import encode_progress
from patchclamp_server.text.prompt import PromptEncoder

DEFAULT_NEURONS, MAX_NEURONS = 20, 10_000
DEFAULT_VALUE, MAX_VALUE = 20.0, 1e4
MAX_WORDS = 64


def decode_finding(
    request: pb.FindNeuronsRequest, prompts: PromptEncoder, store: ArtifactStore, info: ModelInfo
) -> Finding:
    """Returns a checked job. It tokenises and may load a vector: call it in a thread."""
    concept = chosen(request, "concept", "")
    layers = decode_layers(request.layers, info)
    value = finite(request.value if request.HasField("value") else DEFAULT_VALUE, "value", high=MAX_VALUE)
    if value <= 0:
        raise InvalidArgument("value", f"expected a size above 0, whose sign is that of each effect, got {value:g}")
    description, tags = decode_label(request)
    words: tuple[str, ...] = ()
    tokens: tuple[int, ...] = ()
    vector = None
    if concept == "words":
        words = _words(request.words)
        tokens = tuple(_first_token(word, i, prompts) for i, word in enumerate(words))
    else:
        rows = Resolver(info, store).vectors(
            decode_vector(request.vector, "vector"), Site.RESID_POST, layers, info.d_model, "vector", unit=True
        )
        vector = torch.stack([rows[layer][0] for layer in layers])
    top_k = count(request.top_k or DEFAULT_NEURONS, "top_k", low=1, high=min(MAX_NEURONS, len(layers) * info.d_ff))
    return Finding(layers, tokens, words, vector, top_k, value, description, tags)


def encode_finding(event: Progress | FoundSet, *, prompts: PromptEncoder) -> pb.FindNeuronsResponse:
    if isinstance(event, Progress):
        return encode_progress(event, pb.FindNeuronsResponse)
    tokens = [encode_token(token, prompts) for token in event.tokens]
    return pb.FindNeuronsResponse(result=pb.FoundNeurons(found=encode_stored(event.stored), tokens=tokens))


def _words(proto: pb.Words) -> tuple[str, ...]:
    if not 1 <= len(proto.words) <= MAX_WORDS:
        raise InvalidArgument("words.words", f"expected 1 to {MAX_WORDS} words, got {len(proto.words)}")
    return distinct(proto.words, "words.words")


def _first_token(word: str, i: int, prompts: PromptEncoder) -> int:
    """Returns the first token of a word as it is spelled after a space."""
    field = f"words.words[{i}]"
    ids = prompts.encode_continuation(" " + word.lstrip(" "), field, None) if word.strip() else ()
    if not ids:
        raise InvalidArgument(field, "expected a word, got nothing that has a token")
    return ids[0]

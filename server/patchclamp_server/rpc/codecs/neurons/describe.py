"""Messages of DescribeNeurons ↔ analysis/neurons/describe.py."""

from patchclamp.v1 import neuron_pb2 as pb
from patchclamp_server.analysis.neurons.contexts import NeuronContext
from patchclamp_server.analysis.neurons.describe import Describing, NeuronDescription
from patchclamp_server.analysis.neurons.description_scores import Description, DescriptionScore
from patchclamp_server.analysis.progress import Progress
from patchclamp_server.artifacts.store import ArtifactStore
from patchclamp_server.errors import InvalidArgument
from patchclamp_server.interventions.field_checks import count, distinct, required
from patchclamp_server.model.info import ModelInfo
from patchclamp_server.rpc.codecs.neurons.common import decode_neuron_site, decode_selection, encode_neuron
from patchclamp_server.rpc.codecs.neurons.texts import decode_texts
from patchclamp_server.rpc.codecs.progress import encode_progress
from patchclamp_server.text.prompt import PromptEncoder

DEFAULT_CONTEXTS, MAX_CONTEXTS = 10, 100
DEFAULT_CONTEXT_TOKENS, MAX_CONTEXT_TOKENS = 12, 256
MAX_DESCRIPTIONS = 64
# A deviation needs two.
DEFAULT_RANDOM_NEURONS, MIN_RANDOM_NEURONS, MAX_RANDOM_NEURONS = 20, 2, 1000


def decode_describing(
    request: pb.DescribeNeuronsRequest, prompts: PromptEncoder, store: ArtifactStore, info: ModelInfo
) -> Describing:
    """Returns a checked job. It tokenises and may load a corpus: call it in a thread."""
    required(request, "neurons", "")
    required(request, "texts", "")
    around = request.context_tokens if request.HasField("context_tokens") else DEFAULT_CONTEXT_TOKENS
    descriptions = _descriptions(request, prompts)
    if request.causal and not descriptions:
        raise InvalidArgument("descriptions", "expected at least one, whose causal score is asked for")
    random = count(
        request.random_neurons or DEFAULT_RANDOM_NEURONS,
        "random_neurons",
        low=MIN_RANDOM_NEURONS,
        high=MAX_RANDOM_NEURONS,
    )
    return Describing(
        decode_selection(request.neurons, "neurons"),
        decode_texts(request.texts, "texts", prompts, store, info),
        decode_neuron_site(request.site, info),
        count(request.contexts or DEFAULT_CONTEXTS, "contexts", low=1, high=MAX_CONTEXTS),
        count(around, "context_tokens", high=MAX_CONTEXT_TOKENS),
        descriptions,
        request.causal,
        random,
        request.seed,
    )


def encode_describing(event: Progress | NeuronDescription, *, prompts: PromptEncoder) -> pb.DescribeNeuronsResponse:
    if isinstance(event, Progress):
        return encode_progress(event, pb.DescribeNeuronsResponse)
    activity = event.activity
    return pb.DescribeNeuronsResponse(
        description=pb.NeuronDescription(
            neuron=encode_neuron(event.neuron),
            contexts=[_context(context, prompts) for context in event.contexts],
            scores=map(_score, event.scores),
            tokens_seen=activity.tokens,
            rate=activity.rate,
            mean=activity.mean,
            max=activity.max,
        )
    )


def _descriptions(request: pb.DescribeNeuronsRequest, prompts: PromptEncoder) -> tuple[Description, ...]:
    if len(request.descriptions) > MAX_DESCRIPTIONS:
        raise InvalidArgument("descriptions", f"expected at most {MAX_DESCRIPTIONS}, got {len(request.descriptions)}")
    found = []
    for i, text in enumerate(distinct(request.descriptions, "descriptions")):
        if not text.strip():
            raise InvalidArgument(f"descriptions[{i}]", "is empty; expected words")
        found.append(Description(text, prompts.encode_continuation(" " + text.strip(), f"descriptions[{i}]")))
    return tuple(found)


def _context(context: NeuronContext, prompts: PromptEncoder) -> pb.NeuronContext:
    tokens = [
        pb.ContextToken(id=id, text=prompts.piece(id), value=value)
        for id, value in zip(context.ids, context.values.tolist(), strict=True)
    ]
    return pb.NeuronContext(text_index=context.document, position=context.position, value=context.value, tokens=tokens)


def _score(score: DescriptionScore) -> pb.DescriptionScore:
    return pb.DescriptionScore(
        description=score.description, pmi=score.pmi, causal=score.causal, causal_z=score.causal_z
    )

"""Turns messages of circuits and logit attribution into dataclasses of analysis/heads/, and results into messages."""

from dataclasses import dataclass

from patchclamp.v1 import generation_pb2
from patchclamp.v1 import head_pb2 as pb
from patchclamp_server.analysis.heads.circuits.attribution import LogitAttribution
from patchclamp_server.analysis.heads.circuits.circuit import CircuitSearch
from patchclamp_server.analysis.heads.circuits.job import Circuit
from patchclamp_server.analysis.heads.circuits.methods import CIRCUIT_METHODS
from patchclamp_server.analysis.heads.circuits.runs import CleanCorruptPair
from patchclamp_server.analysis.progress import Progress
from patchclamp_server.errors import InvalidArgument
from patchclamp_server.interventions.field_checks import count, known
from patchclamp_server.model.info import ModelInfo
from patchclamp_server.rpc.codecs.artifact import decode_label, encode_artifact
from patchclamp_server.rpc.codecs.generation import decode_prompt
from patchclamp_server.rpc.codecs.head import encode_head, encode_score
from patchclamp_server.rpc.codecs.message_size import CLIENT_MESSAGE_BYTES
from patchclamp_server.rpc.codecs.progress import encode_progress
from patchclamp_server.text.prompt import PromptEncoder

MAX_PAIRS = 1024
# This bounds the activations of both runs of a pair: residual stream and head outputs of every token at every layer.
MAX_ACTIVATION_BYTES = 2 << 30
# The artifact keeps the heads of a circuit one by one.
MAX_CIRCUIT_SIZE = 1000
MAX_RANDOM_SETS = 100
DEFAULT_CIRCUIT_SIZE = 10
DEFAULT_RANDOM_SETS = 10
# One pass takes so many tokens at most.
MAX_ATTRIBUTED_TOKENS = 4096
DEFAULT_TOP_HEADS = 10
# A part without sources takes fewer bytes of a message than this.
PART_BYTES = 32

METHOD_NAMES: dict[int, str] = {
    pb.CircuitMethod.Value(f"CIRCUIT_METHOD_{name.upper()}"): name for name in CIRCUIT_METHODS
}


@dataclass(frozen=True)
class Attribution:
    """The arguments of attribution.attribute."""

    tokens: tuple[int, ...]
    target: int
    contrast: int | None
    top_heads: int


def decode_circuit(request: pb.FindCircuitRequest, prompts: PromptEncoder, info: ModelInfo) -> CircuitSearch:
    """Returns a job whose sizes are checked; whether its pairs fit each other shows when they are run. Tokenises: call
    it in a thread."""
    method = known(request.method, METHOD_NAMES, "method", pb.CircuitMethod.keys()[1:])
    n_heads = info.n_layers * info.n_heads
    size = count(
        request.circuit_size or min(DEFAULT_CIRCUIT_SIZE, n_heads),
        "circuit_size",
        low=1,
        high=min(MAX_CIRCUIT_SIZE, n_heads),
    )
    random_sets = count(request.random_sets or DEFAULT_RANDOM_SETS, "random_sets", low=1, high=MAX_RANDOM_SETS)
    description, tags = decode_label(request)
    if not 1 <= len(request.pairs) <= MAX_PAIRS:
        raise InvalidArgument("pairs", f"expected 1 to {MAX_PAIRS}, got {len(request.pairs)}")
    pairs = tuple(_pair(pair, prompts, info, f"pairs[{i}]") for i, pair in enumerate(request.pairs))
    return CircuitSearch(method, pairs, size, random_sets, request.seed, description, tags)


def encode_circuit(event: Progress | Circuit) -> pb.FindCircuitResponse:
    if isinstance(event, Progress):
        return encode_progress(event, pb.FindCircuitResponse)
    circuit = pb.Circuit(
        artifact=encode_artifact(event.artifact),
        effects=[encode_score((e.layer, e.head), e.effect, e.low, e.high) for e in event.effects],
        clean_metric=event.clean_metric,
        corrupt_metric=event.corrupt_metric,
        faithfulness=event.faithfulness,
        random_faithfulness_mean=event.random_faithfulness_mean,
        random_faithfulness_deviation=event.random_faithfulness_deviation,
    )
    return pb.FindCircuitResponse(result=circuit)


def decode_attribution(request: pb.AttributeLogitsRequest, prompts: PromptEncoder, info: ModelInfo) -> Attribution:
    """Returns the arguments. Tokenises: call it in a thread."""
    tokens = decode_prompt(request.prompt, prompts).ids
    if len(tokens) > MAX_ATTRIBUTED_TOKENS:
        raise InvalidArgument("prompt", f"has {len(tokens)} tokens; at most {MAX_ATTRIBUTED_TOKENS} are attributed")
    target = _first_token(request.target, prompts, "target", tokens)
    contrast = _first_token(request.contrast, prompts, "contrast", tokens) if request.contrast else None
    top_heads = request.top_heads if request.HasField("top_heads") else DEFAULT_TOP_HEADS
    n_heads = info.n_layers * info.n_heads
    # The other parts are those of embedding and biases, of each MLP and of each head.
    room = CLIENT_MESSAGE_BYTES - PART_BYTES * (2 + info.n_layers + n_heads)
    most = max(0, room // (8 * len(tokens)))
    if min(top_heads, n_heads) > most:
        message = f"expected at most {most} for a prompt of {len(tokens)} tokens, got {top_heads}"
        raise InvalidArgument("top_heads", message)
    return Attribution(tokens, target, contrast, top_heads)


def encode_attribution(found: LogitAttribution) -> pb.AttributeLogitsResponse:
    return pb.AttributeLogitsResponse(
        logit_difference=found.logit_difference,
        parts_sum=found.parts_sum,
        embedding=found.embedding,
        mlps=found.mlps,
        biases=found.biases,
        heads=[
            pb.HeadAttribution(head=encode_head((head.layer, head.head)), part=head.part, sources=head.sources)
            for head in found.heads
        ],
    )


def _pair(proto: pb.CleanCorruptPair, prompts: PromptEncoder, info: ModelInfo, field: str) -> CleanCorruptPair:
    clean = _prompt(proto.clean, prompts, info, f"{field}.clean")
    corrupt = _prompt(proto.corrupt, prompts, info, f"{field}.corrupt")
    # Both answers are looked for after either prompt.
    return CleanCorruptPair(
        clean,
        corrupt,
        _first_token(proto.clean_answer, prompts, f"{field}.clean_answer", clean),
        _first_token(proto.corrupt_answer, prompts, f"{field}.corrupt_answer", clean),
    )


def _prompt(proto: generation_pb2.Prompt, prompts: PromptEncoder, info: ModelInfo, field: str) -> tuple[int, ...]:
    ids = decode_prompt(proto, prompts, field).ids
    of_token = 2 * 4 * info.n_layers * (info.d_model + info.n_heads * info.head_dim)
    if len(ids) * of_token > MAX_ACTIVATION_BYTES:
        most = MAX_ACTIVATION_BYTES // of_token
        raise InvalidArgument(field, f"has {len(ids)} tokens; activations of {most} are held")
    return ids


def _first_token(text: str, prompts: PromptEncoder, field: str, after: tuple[int, ...]) -> int:
    ids = prompts.encode_continuation(text, field, after)
    if not ids:
        raise InvalidArgument(field, "is empty; its first token is needed")
    return ids[0]

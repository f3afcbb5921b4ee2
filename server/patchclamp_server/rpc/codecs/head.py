"""Messages of HeadService ↔ dataclasses of analysis/heads/: what its jobs share, and scoring and comparison.

The other jobs: codecs/needle.py and codecs/circuit.py. What may not be asked is refused, by field path.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict

from patchclamp.v1 import head_pb2 as pb
from patchclamp_server.analysis.heads.scores.job import Result
from patchclamp_server.analysis.heads.scores.registry import SCORING_METHODS
from patchclamp_server.analysis.heads.scores.scoring import Fact, Scoring
from patchclamp_server.analysis.heads.sets.overlap import HeadSetOverlap
from patchclamp_server.analysis.progress import Progress
from patchclamp_server.artifacts.head_sets import Head, HeadSelection, ranked
from patchclamp_server.errors import InvalidArgument, about
from patchclamp_server.interventions.field_checks import chosen, count, known
from patchclamp_server.model.info import ModelInfo
from patchclamp_server.rpc.codecs.artifact import decode_label, encode_artifact
from patchclamp_server.rpc.codecs.progress import encode_progress
from patchclamp_server.text.prompt import PromptEncoder

MAX_NGRAM = 64
MAX_SEQUENCE_TOKENS = 1024
# This bounds all random sequences, before they repeat.
MAX_RANDOM_TOKENS = 16_384
MAX_FACTS = 256
# The facts are kept with the scores.
MAX_FACTS_BYTES = 128 * 1024

METHOD_NAMES: dict[int, str] = {
    pb.HeadScoreMethod.Value(f"HEAD_SCORE_METHOD_{name.upper()}"): name for name in SCORING_METHODS
}
# Some fields of ScoreHeadsRequest are parameters of these methods only.
RANDOM_TEXT = ("induction", "previous_token", "ngram")
METHODS_WITH: Mapping[str, tuple[str, ...]] = {
    "ngram": ("ngram",),
    "sequence_tokens": RANDOM_TEXT,
    "sequences": RANDOM_TEXT,
    "facts": ("temporal",),
}


def decode_heads(proto: pb.HeadSelection, field: str) -> HeadSelection:
    """Returns heads that are named here, or in a head set; whether the model has them shows when they are selected."""
    if chosen(proto, "source", field) == "heads":
        if not proto.heads.heads:
            raise InvalidArgument(f"{field}.heads.heads", "expected at least one head")
        return HeadSelection(tuple(Head(id.layer, id.head) for id in proto.heads.heads), top_k=proto.top_k)
    if not proto.head_set:
        raise InvalidArgument(f"{field}.head_set", "expected the id or tag of a head_set artifact")
    return HeadSelection(head_set=proto.head_set, top_k=proto.top_k)


def decode_scoring(request: pb.ScoreHeadsRequest, prompts: PromptEncoder, info: ModelInfo) -> Scoring:
    """Returns a checked job. Tokenises the facts: call it in a thread."""
    method = known(request.method, METHOD_NAMES, "method", pb.HeadScoreMethod.keys()[1:])
    for field, methods in METHODS_WITH.items():
        if getattr(request, field) and method not in methods:
            raise InvalidArgument(field, f"is a parameter of {', '.join(methods)}; the method is {method}")
    description, tags = decode_label(request)
    default = Scoring(method)
    tokens = count(
        request.sequence_tokens or default.sequence_tokens, "sequence_tokens", low=2, high=MAX_SEQUENCE_TOKENS
    )
    return Scoring(
        method,
        ngram=count(request.ngram or default.ngram, "ngram", low=1, high=MAX_NGRAM),
        sequence_tokens=tokens,
        sequences=count(request.sequences or default.sequences, "sequences", low=1, high=MAX_RANDOM_TOKENS // tokens),
        seed=request.seed,
        facts=_facts(request.facts, prompts, info),
        description=description,
        tags=tags,
    )


def encode_scoring(event: Progress | Result) -> pb.ScoreHeadsResponse:
    if isinstance(event, Progress):
        return encode_progress(event, pb.ScoreHeadsResponse)
    found = event.found
    scores = [
        encode_score(
            head,
            float(found.scores[head]),
            None if found.low is None else float(found.low[head]),
            None if found.high is None else float(found.high[head]),
        )
        for head in ranked(found.scores)
    ]
    return pb.ScoreHeadsResponse(result=pb.ScoredHeads(artifact=encode_artifact(event.artifact), scores=scores))


def encode_overlaps(overlaps: Iterable[HeadSetOverlap]) -> pb.CompareHeadSetsResponse:
    return pb.CompareHeadSetsResponse(comparisons=[pb.HeadSetComparison(**asdict(overlap)) for overlap in overlaps])


def encode_head(head: tuple[int, int]) -> pb.HeadId:
    """Returns the message of (layer, head)."""
    return pb.HeadId(layer=head[0], head=head[1])


def encode_score(
    head: tuple[int, int], score: float, low: float | None, high: float | None, *, always_on: bool = False
) -> pb.HeadScore:
    return pb.HeadScore(head=encode_head(head), score=score, low=low, high=high, always_on=always_on)


def _facts(protos: Sequence[pb.TemporalFact], prompts: PromptEncoder, info: ModelInfo) -> tuple[Fact, ...]:
    if len(protos) > MAX_FACTS:
        raise InvalidArgument("facts", f"expected at most {MAX_FACTS}, got {len(protos)}")
    facts = tuple(Fact(proto.prompt, proto.answer, proto.time_conditioned) for proto in protos)
    for i, fact in enumerate(facts):
        _check_fact(fact, prompts, info, f"facts[{i}]")
    size = len(json.dumps([asdict(fact) for fact in facts]))
    if size > MAX_FACTS_BYTES:
        raise InvalidArgument("facts", f"{size} bytes as JSON; at most {MAX_FACTS_BYTES} are kept with the scores")
    return facts


def _check_fact(fact: Fact, prompts: PromptEncoder, info: ModelInfo, field: str) -> None:
    with about(f"{field}.prompt"):
        prompt = prompts.encode_text(fact.prompt).ids
    answer = prompts.encode_continuation(fact.answer, f"{field}.answer", prompt)
    if not answer:
        raise InvalidArgument(f"{field}.answer", "is empty; at least one token is scored")
    if len(prompt) + len(answer) > info.context_length:
        message = f"has {len(prompt)} + {len(answer)} tokens, more than the context of {info.context_length}"
        raise InvalidArgument(field, message)

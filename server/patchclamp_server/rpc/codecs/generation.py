"""Turns generation messages into the engine's words, its usage and finish into messages. Refusals name fields."""

from collections.abc import Callable, Mapping

from patchclamp.v1 import generation_pb2 as pb
from patchclamp_server.artifacts.head_sets import HeadSelection
from patchclamp_server.engine.request import (
    Finished,
    FinishReason,
    Priority,
    PromptToken,
    SamplingParams,
    StopParams,
    Token,
    Usage,
)
from patchclamp_server.errors import InvalidArgument, fields_as
from patchclamp_server.interventions.field_checks import chosen, count, finite, known
from patchclamp_server.rpc.call.grounding import CopySource, GroundingReport
from patchclamp_server.rpc.codecs.program import encode_receipt
from patchclamp_server.rpc.codecs.sparsity import encode_report
from patchclamp_server.text.prompt import EncodedPrompt, PromptEncoder
from patchclamp_server.text.vocabulary import check_ids

MAX_LOGPROBS = 20
MAX_LOGIT_BIASES = 1024
MAX_SAMPLES = 128
MAX_STOP_STRINGS = 16
# Each string has an automaton, which is built between two steps of all streams.
MAX_STOP_STRING_CHARACTERS = 4096
# The context of no model is as long; whoever prepares a request bounds it by that.
UNLIMITED = 2**31 - 1
# float32 logits stay finite under this penalty, however often a token was seen.
LARGEST_PENALTY = 1e6

PRIORITIES: dict[int, Priority] = {
    # A request that does not say otherwise is served.
    pb.PRIORITY_UNSPECIFIED: Priority.INTERACTIVE,
    pb.PRIORITY_INTERACTIVE: Priority.INTERACTIVE,
    pb.PRIORITY_BATCH: Priority.BATCH,
    pb.PRIORITY_ANALYSIS: Priority.ANALYSIS,
}
FINISH_REASONS: dict[FinishReason, "pb.FinishReason.ValueType"] = {
    reason: pb.FinishReason.Value(f"FINISH_REASON_{reason.name}") for reason in FinishReason
}


def decode_prompt(proto: pb.Prompt, encoder: PromptEncoder, field: str = "prompt") -> EncodedPrompt:
    """Returns the tokens of a prompt in any of its forms, with the role of each where it is a chat.

    Raises InvalidArgument or FailedPrecondition for what the encoder refuses, with paths below `field`.
    """
    form = chosen(proto, "form", field)
    # The encoder names its fields from "prompt" on.
    with fields_as(lambda name: (field + name.removeprefix("prompt")).removeprefix(".")):
        if form == "text":
            return encoder.encode_text(proto.text)
        if form == "tokens":
            return encoder.encode_tokens(proto.tokens.ids)
        messages = [(message.role, message.content) for message in proto.chat.messages]
        return encoder.encode_chat(messages, proto.chat.continue_final_message)


def decode_sampling(
    proto: pb.Sampling, vocab_size: int, logprobs: int | None, path: str = "sampling"
) -> SamplingParams:
    """Returns the parameters; `logprobs` is checked already, see decode_logprobs."""
    top_p = proto.top_p if proto.HasField("top_p") else 1.0
    if not 0.0 < top_p <= 1.0:
        raise InvalidArgument(f"{path}.top_p", f"expected a number above 0 and at most 1, got {top_p:g}")
    repetition = proto.repetition_penalty if proto.HasField("repetition_penalty") else 1.0
    return SamplingParams(
        temperature=finite(proto.temperature, f"{path}.temperature", low=0.0),
        top_k=count(proto.top_k, f"{path}.top_k"),
        top_p=top_p,
        min_p=finite(proto.min_p, f"{path}.min_p", low=0.0, high=1.0),
        repetition_penalty=finite(
            repetition, f"{path}.repetition_penalty", low=1.0 / LARGEST_PENALTY, high=LARGEST_PENALTY
        ),
        presence_penalty=_penalty(proto.presence_penalty, f"{path}.presence_penalty"),
        frequency_penalty=_penalty(proto.frequency_penalty, f"{path}.frequency_penalty"),
        seed=proto.seed if proto.HasField("seed") else None,
        logit_bias=_logit_bias(proto.logit_bias, vocab_size, f"{path}.logit_bias"),
        logprobs=logprobs,
    )


def _logit_bias(proto: Mapping[int, float], vocab_size: int, field: str) -> tuple[tuple[int, float], ...]:
    if len(proto) > MAX_LOGIT_BIASES:
        raise InvalidArgument(field, f"expected at most {MAX_LOGIT_BIASES} token ids, got {len(proto)}")
    for id in proto:
        if id >= vocab_size:
            raise InvalidArgument(f"{field}[{id}]", f"{id} is outside the vocabulary [0, {vocab_size})")
    return tuple((id, _penalty(proto[id], f"{field}[{id}]")) for id in sorted(proto))


def _penalty(value: float, field: str) -> float:
    return finite(value, field, low=-LARGEST_PENALTY, high=LARGEST_PENALTY)


def decode_logprobs(n: int, field: str) -> int:
    return count(n, field, high=MAX_LOGPROBS)


def decode_stop(proto: pb.StopConditions, vocab_size: int, field: str = "stop") -> StopParams:
    if len(proto.strings) > MAX_STOP_STRINGS:
        message = f"expected at most {MAX_STOP_STRINGS} strings, got {len(proto.strings)}"
        raise InvalidArgument(f"{field}.strings", message)
    for i, string in enumerate(proto.strings):
        if not string:
            raise InvalidArgument(f"{field}.strings[{i}]", "expected a string that is not empty")
        if len(string) > MAX_STOP_STRING_CHARACTERS:
            message = f"expected at most {MAX_STOP_STRING_CHARACTERS} characters, got {len(string)}"
            raise InvalidArgument(f"{field}.strings[{i}]", message)
    check_ids(proto.token_ids, vocab_size, f"{field}.token_ids")
    max_tokens = proto.max_tokens if proto.HasField("max_tokens") else StopParams().max_tokens
    if proto.to_context_end:
        if proto.HasField("max_tokens"):
            raise InvalidArgument(f"{field}.to_context_end", "expected without max_tokens")
        max_tokens = UNLIMITED
    if proto.min_tokens > max_tokens:
        raise InvalidArgument(
            f"{field}.min_tokens", f"expected at most max_tokens, {max_tokens}, got {proto.min_tokens}"
        )
    return StopParams(
        max_tokens=count(max_tokens, f"{field}.max_tokens"),
        strings=tuple(proto.strings),
        token_ids=frozenset(proto.token_ids),
        ignore_eos=proto.ignore_eos,
        include_stop_string=proto.include_stop_string,
        min_tokens=proto.min_tokens,
    )


def decode_samples(number: int, field: str = "samples") -> int:
    return count(number, field, high=MAX_SAMPLES) or 1


def decode_priority(number: int, field: str = "priority") -> Priority:
    return known(number, PRIORITIES, field, pb.Priority.keys()[1:])


def decode_grounding(proto: pb.Grounding, field: str = "grounding") -> HeadSelection:
    if not proto.head_set:
        raise InvalidArgument(f"{field}.head_set", "expected the id or tag of a head_set artifact")
    return HeadSelection(head_set=proto.head_set, top_k=proto.top_k)


def encode_token(token: Token | PromptToken, piece: Callable[[int], str]) -> pb.GeneratedToken:
    """Returns the message; `piece` gives the text of a token."""
    return pb.GeneratedToken(
        id=token.id,
        position=token.position,
        logprob=token.logprob,
        top_logprobs=[pb.TokenLogprob(id=id_, logprob=value, text=piece(id_)) for id_, value in token.top_logprobs],
        text=piece(token.id),
    )


def encode_usage(usage: Usage) -> pb.Usage:
    return pb.Usage(
        prompt_tokens=usage.prompt_tokens,
        cached_prompt_tokens=usage.cached_prompt_tokens,
        generated_tokens=usage.generated_tokens,
        time_to_first_token_seconds=usage.time_to_first_token_seconds,
        total_seconds=usage.total_seconds,
        preemptions=usage.preemptions,
    )


def encode_finished(finished: Finished) -> pb.Finished:
    return pb.Finished(
        reason=FINISH_REASONS[finished.reason],
        stop_string=finished.stop_string,
        receipt=encode_receipt(finished.receipt),
        usage=encode_usage(finished.usage),
        seed=finished.seed,
        sparsity=None if finished.sparsity is None else encode_report(finished.sparsity),
    )


def encode_source(source: CopySource) -> pb.CopySource:
    return pb.CopySource(position=source.position, layer=source.layer, head=source.head, probability=source.probability)


def encode_grounding(report: GroundingReport) -> pb.GroundingReport:
    return pb.GroundingReport(
        grounded_ratio=report.grounded_ratio,
        grounded_tokens=report.grounded_tokens,
        ranges=[pb.GroundedRange(start=r.start, end=r.end, tokens=r.tokens, text=r.text) for r in report.ranges],
    )

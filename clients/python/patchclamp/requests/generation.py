"""Requests of GenerationService and of ModelService."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Unpack

from patchclamp.confidence import ConfidenceLike, confidence_message
from patchclamp.fields import build, build_as, one_text_or_several
from patchclamp.heads import GroundingLike, grounding_message
from patchclamp.keywords import takes_options_of
from patchclamp.names import PRIORITIES, PriorityName, value_or_unspecified
from patchclamp.programs import ProgramLike, program_message
from patchclamp.prompts import Messages, PromptLike, PromptOptions, prompt
from patchclamp.sparsity import SparsityLike, sparsity_message
from patchclamp.v1 import generation_pb2, model_pb2


class GenerateOptions(PromptOptions, total=False):
    """Options of a generation; Sampling and StopConditions of the contract describe those that are not here.

    None is the server's default. program: edits, readouts and conditions (patchclamp.programs), or one edit.
    temperature: 0 (default) is greedy. logprobs: how many likely tokens are told beside the chosen one.
    seed: by default one that the server draws, and tells. max_tokens: by default 256. to_context_end: instead, as many
    as the context of the model has room for. min_tokens: before so many, nothing else ends the text.
    logit_bias: {token id: what is added to its logit}.
    sparsity: a policy, a profile or both (patchclamp.sparsity); by default everything is computed.
    grounding: a head set (patchclamp.heads) that says which prompt tokens each generated token was copied from.
    confidence: True, or a Confidence (patchclamp.confidence): how far the layers agree on the answer.
    prompt_logprobs: how many likely tokens are told beside each of the prompt.
    samples: how many are drawn of the prompt, by `generate` alone; each has a seed of its own.
    """

    program: ProgramLike | None
    temperature: float
    top_k: int
    top_p: float | None
    min_p: float
    repetition_penalty: float | None
    presence_penalty: float
    frequency_penalty: float
    seed: int | None
    logit_bias: Mapping[int, float]
    max_tokens: int | None
    stop: str | Sequence[str]
    stop_token_ids: Sequence[int]
    ignore_eos: bool
    include_stop_string: bool
    to_context_end: bool
    min_tokens: int
    priority: PriorityName | None
    logprobs: int | None
    sparsity: SparsityLike | None
    grounding: GroundingLike | None
    confidence: ConfidenceLike | None
    samples: int
    prompt_logprobs: int | None


class ScoreOptions(PromptOptions, total=False):
    """Options of a score.

    top_logprobs: how many likely tokens are told at each position. sparsity: one without a guard.
    """

    program: ProgramLike | None
    top_logprobs: int
    priority: PriorityName | None
    sparsity: SparsityLike | None
    confidence: ConfidenceLike | None


def generate(
    source: PromptLike | None,
    *,
    messages: Messages | None = None,
    continue_final_message: bool = False,
    model: str = "",
    program: ProgramLike | None = None,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float | None = None,
    min_p: float = 0.0,
    repetition_penalty: float | None = None,
    presence_penalty: float = 0.0,
    frequency_penalty: float = 0.0,
    seed: int | None = None,
    logit_bias: Mapping[int, float] = MappingProxyType({}),
    max_tokens: int | None = None,
    stop: str | Sequence[str] = (),
    stop_token_ids: Sequence[int] = (),
    ignore_eos: bool = False,
    include_stop_string: bool = False,
    to_context_end: bool = False,
    min_tokens: int = 0,
    priority: PriorityName | None = None,
    logprobs: int | None = None,
    sparsity: SparsityLike | None = None,
    grounding: GroundingLike | None = None,
    confidence: ConfidenceLike | None = None,
    samples: int = 0,
    prompt_logprobs: int | None = None,
) -> generation_pb2.GenerateRequest:
    sampling = build(
        generation_pb2.Sampling,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        seed=seed,
        logit_bias=logit_bias,
    )
    conditions = build_as(
        {"strings": "stop", "token_ids": "stop_token_ids"},
        generation_pb2.StopConditions,
        max_tokens=max_tokens,
        strings=one_text_or_several(stop),
        token_ids=stop_token_ids,
        ignore_eos=ignore_eos,
        include_stop_string=include_stop_string,
        to_context_end=to_context_end,
        min_tokens=min_tokens,
    )
    return build(
        generation_pb2.GenerateRequest,
        model=model,
        prompt=prompt(source, messages=messages, continue_final_message=continue_final_message),
        program=program_message(program),
        sampling=sampling,
        stop=conditions,
        priority=value_or_unspecified(PRIORITIES, priority, "priority"),
        logprobs=logprobs,
        sparsity=sparsity_message(sparsity),
        grounding=grounding_message(grounding),
        confidence=confidence_message(confidence),
        samples=samples,
        prompt_logprobs=prompt_logprobs,
    )


@takes_options_of(generate)
def compare(source: PromptLike | None, **options: Unpack[GenerateOptions]) -> generation_pb2.CompareRequest:
    return generation_pb2.CompareRequest(request=generate(source, **options))


@takes_options_of(generate)
def session_start(
    source: PromptLike | None, *, lockstep: bool = False, **options: Unpack[GenerateOptions]
) -> generation_pb2.SessionRequest:
    start = build(generation_pb2.SessionStart, request=generate(source, **options), lockstep=lockstep)
    return generation_pb2.SessionRequest(start=start)


def set_strength(edit: str, strength: float) -> generation_pb2.SessionRequest:
    return generation_pb2.SessionRequest(set_strength=build(generation_pb2.SetStrength, edit=edit, strength=strength))


def advance(tokens: int) -> generation_pb2.SessionRequest:
    return generation_pb2.SessionRequest(advance=build(generation_pb2.Advance, tokens=tokens))


def stop_session() -> generation_pb2.SessionRequest:
    return generation_pb2.SessionRequest(stop=generation_pb2.Stop())


def score(
    source: PromptLike | None,
    continuation: str | Sequence[int],
    *,
    messages: Messages | None = None,
    continue_final_message: bool = False,
    model: str = "",
    program: ProgramLike | None = None,
    top_logprobs: int = 0,
    priority: PriorityName | None = None,
    sparsity: SparsityLike | None = None,
    confidence: ConfidenceLike | None = None,
) -> generation_pb2.ScoreRequest:
    request = build(
        generation_pb2.ScoreRequest,
        model=model,
        prompt=prompt(source, messages=messages, continue_final_message=continue_final_message),
        program=program_message(program),
        priority=value_or_unspecified(PRIORITIES, priority, "priority"),
        top_logprobs=top_logprobs,
        sparsity=sparsity_message(sparsity),
        confidence=confidence_message(confidence),
    )
    if isinstance(continuation, str):
        text = build_as({"text": "continuation"}, generation_pb2.ScoreRequest, text=continuation)
        request.MergeFrom(text)
    else:
        request.tokens.CopyFrom(build_as({"ids": "continuation"}, generation_pb2.TokenIds, ids=continuation))
    return request


def tokenize(
    source: PromptLike | None,
    *,
    messages: Messages | None = None,
    continue_final_message: bool = False,
    model: str = "",
) -> model_pb2.TokenizeRequest:
    form = prompt(source, messages=messages, continue_final_message=continue_final_message)
    return build(model_pb2.TokenizeRequest, model=model, prompt=form)


def detokenize(ids: Sequence[int], skip_special_tokens: bool, model: str) -> model_pb2.DetokenizeRequest:
    return build(model_pb2.DetokenizeRequest, ids=ids, skip_special_tokens=skip_special_tokens, model=model)

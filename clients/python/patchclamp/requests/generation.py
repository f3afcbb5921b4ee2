"""Requests of GenerationService and of Tokenize."""

from collections.abc import Sequence

from patchclamp.heads import GroundingLike, grounding_message
from patchclamp.names import PRIORITIES, PriorityName, value_or_unspecified
from patchclamp.programs import ProgramLike, program_message
from patchclamp.prompts import PromptLike, PromptOptions, prompt
from patchclamp.sparsity import SparsityLike, sparsity_message
from patchclamp.v1 import generation_pb2, model_pb2


class GenerateOptions(PromptOptions, total=False):
    """Fields and defaults of the messages Sampling and StopConditions.

    temperature 0 (default) is greedy. logprobs n: the chosen token's and the n most likely ones'.
    sparsity: a policy, a profile or both (patchclamp.sparsity); default dense.
    grounding: a head set; says which prompt tokens its heads copied each generated token from (patchclamp.heads).
    """

    program: ProgramLike | None
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    seed: int
    max_tokens: int
    stop: str | Sequence[str]
    stop_token_ids: Sequence[int]
    ignore_eos: bool
    include_stop_string: bool
    priority: PriorityName
    logprobs: int
    sparsity: SparsityLike | None
    grounding: GroundingLike | None


class ScoreOptions(PromptOptions, total=False):
    """top_logprobs n: also the n most likely tokens at each position. sparsity: without a guard."""

    program: ProgramLike | None
    top_logprobs: int
    priority: PriorityName
    sparsity: SparsityLike | None


def generate(source: PromptLike | None, options: GenerateOptions) -> generation_pb2.GenerateRequest:
    stop = options.get("stop", ())
    return generation_pb2.GenerateRequest(
        model=options.get("model", ""),
        prompt=prompt(source, options),
        program=program_message(options.get("program")),
        sampling=generation_pb2.Sampling(
            temperature=options.get("temperature", 0.0),
            top_k=options.get("top_k", 0),
            top_p=options.get("top_p"),
            min_p=options.get("min_p", 0.0),
            repetition_penalty=options.get("repetition_penalty"),
            presence_penalty=options.get("presence_penalty", 0.0),
            frequency_penalty=options.get("frequency_penalty", 0.0),
            seed=options.get("seed"),
        ),
        stop=generation_pb2.StopConditions(
            max_tokens=options.get("max_tokens"),
            strings=[stop] if isinstance(stop, str) else stop,
            token_ids=options.get("stop_token_ids", ()),
            ignore_eos=options.get("ignore_eos", False),
            include_stop_string=options.get("include_stop_string", False),
        ),
        priority=value_or_unspecified(PRIORITIES, options.get("priority"), "priority"),
        logprobs=options.get("logprobs"),
        sparsity=sparsity_message(options.get("sparsity")),
        grounding=grounding_message(options.get("grounding")),
    )


def compare(source: PromptLike | None, options: GenerateOptions) -> generation_pb2.CompareRequest:
    return generation_pb2.CompareRequest(request=generate(source, options))


def session_start(source: PromptLike | None, lockstep: bool, options: GenerateOptions) -> generation_pb2.SessionRequest:
    start = generation_pb2.SessionStart(request=generate(source, options), lockstep=lockstep)
    return generation_pb2.SessionRequest(start=start)


def set_strength(edit: str, strength: float) -> generation_pb2.SessionRequest:
    return generation_pb2.SessionRequest(set_strength=generation_pb2.SetStrength(edit=edit, strength=strength))


def advance(tokens: int) -> generation_pb2.SessionRequest:
    return generation_pb2.SessionRequest(advance=generation_pb2.Advance(tokens=tokens))


def stop_session() -> generation_pb2.SessionRequest:
    return generation_pb2.SessionRequest(stop=generation_pb2.Stop())


def score(
    source: PromptLike | None, continuation: str | Sequence[int], options: ScoreOptions
) -> generation_pb2.ScoreRequest:
    request = generation_pb2.ScoreRequest(
        model=options.get("model", ""),
        prompt=prompt(source, options),
        program=program_message(options.get("program")),
        priority=value_or_unspecified(PRIORITIES, options.get("priority"), "priority"),
        top_logprobs=options.get("top_logprobs", 0),
        sparsity=sparsity_message(options.get("sparsity")),
    )
    if isinstance(continuation, str):
        request.text = continuation
    else:
        request.tokens.CopyFrom(generation_pb2.TokenIds(ids=continuation))
    return request


def tokenize(source: PromptLike | None, options: PromptOptions) -> model_pb2.TokenizeRequest:
    return model_pb2.TokenizeRequest(model=options.get("model", ""), prompt=prompt(source, options))

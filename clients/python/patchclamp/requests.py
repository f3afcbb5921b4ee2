"""Arguments of the clients → request messages. Everything the sync and the async client share about what is sent."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict, cast

from google.protobuf import json_format, struct_pb2

from patchclamp.names import (
    ARTIFACT_FORMATS,
    ARTIFACT_KINDS,
    METHODS,
    POOLINGS,
    PRIORITIES,
    SITES,
    ArtifactFormatName,
    ArtifactKindName,
    MethodName,
    PoolingName,
    PriorityName,
    SiteName,
    value_of,
    value_or_unspecified,
)
from patchclamp.programs import ProgramLike, program_message
from patchclamp.v1 import artifact_pb2, generation_pb2, model_pb2, steering_pb2

Message = tuple[str, str] | Mapping[str, str]
Messages = Sequence[Message]
PromptLike = str | Sequence[int] | Messages

CHUNK_BYTES = 1 << 20


class PromptOptions(TypedDict, total=False):
    """messages: chat turns, (role, content) or {"role", "content"}, instead of a prompt.

    continue_final_message: do not open a new assistant turn. model: default the server's model.
    """

    messages: Messages
    continue_final_message: bool
    model: str


class GenerateOptions(PromptOptions, total=False):
    """Fields and defaults of the messages Sampling and StopConditions.

    temperature 0 (default) is greedy. logprobs n: the chosen token's and the n most likely ones'.
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


class ScoreOptions(PromptOptions, total=False):
    """top_logprobs n: also the n most likely tokens at each position."""

    program: ProgramLike | None
    top_logprobs: int
    priority: PriorityName


class ExtractOptions(TypedDict, total=False):
    """site: a residual site, default resid_post. layers: default every layer. tags: names to store the vector under."""

    site: SiteName
    layers: Iterable[int]
    pooling: PoolingName
    holdout_fraction: float
    seed: int
    description: str
    tags: Sequence[str]
    model: str


class UploadOptions(TypedDict, total=False):
    """site: of a vector, default resid_post. model_fingerprint: default the server's model."""

    kind: ArtifactKindName
    format: ArtifactFormatName
    site: SiteName
    model_fingerprint: str
    description: str
    tags: Sequence[str]
    provenance: Mapping[str, Any]


def prompt(source: PromptLike | None, options: PromptOptions) -> generation_pb2.Prompt:
    """Text, token ids or chat turns. ValueError unless exactly one of `source` and options["messages"] is given."""
    messages = options.get("messages")
    if (source is None) == (messages is None):
        raise ValueError("give either a prompt or messages")
    form = source if source is not None else messages
    if isinstance(form, str):
        return generation_pb2.Prompt(text=form)
    items = [] if form is None else list(form)
    if messages is None and not (items and isinstance(items[0], tuple | Mapping)):
        return generation_pb2.Prompt(tokens=generation_pb2.TokenIds(ids=cast(list[int], items)))
    chat = generation_pb2.ChatMessages(
        messages=[_message(turn) for turn in cast(Messages, items)],
        continue_final_message=options.get("continue_final_message", False),
    )
    return generation_pb2.Prompt(chat=chat)


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
    )
    if isinstance(continuation, str):
        request.text = continuation
    else:
        request.tokens.CopyFrom(generation_pb2.TokenIds(ids=continuation))
    return request


def tokenize(source: PromptLike | None, options: PromptOptions) -> model_pb2.TokenizeRequest:
    return model_pb2.TokenizeRequest(model=options.get("model", ""), prompt=prompt(source, options))


def extract_vectors(
    pairs: Iterable[tuple[PromptLike, PromptLike]], method: MethodName, options: ExtractOptions
) -> steering_pb2.ExtractVectorsRequest:
    """pairs: (positive, negative)."""
    return steering_pb2.ExtractVectorsRequest(
        model=options.get("model", ""),
        method=value_of(METHODS, method, "method"),
        pairs=[
            steering_pb2.ContrastPair(positive=prompt(positive, {}), negative=prompt(negative, {}))
            for positive, negative in pairs
        ],
        site=value_or_unspecified(SITES, options.get("site"), "site"),
        layers=list(options.get("layers", ())),
        pooling=value_or_unspecified(POOLINGS, options.get("pooling"), "pooling"),
        holdout_fraction=options.get("holdout_fraction"),
        seed=options.get("seed", 0),
        description=options.get("description", ""),
        tags=options.get("tags", ()),
    )


def upload(source: bytes | Path, options: UploadOptions) -> Iterator[artifact_pb2.UploadRequest]:
    """The header, then chunks of at most 1 MiB."""
    data = source.read_bytes() if isinstance(source, Path) else source
    header = artifact_pb2.UploadHeader(
        kind=value_of(ARTIFACT_KINDS, options.get("kind", "vector"), "kind"),
        format=artifact_format(options.get("format", "safetensors")),
        site=value_or_unspecified(SITES, options.get("site"), "site"),
        model_fingerprint=options.get("model_fingerprint", ""),
        description=options.get("description", ""),
        tags=options.get("tags", ()),
        size_bytes=len(data),
        provenance=json_format.ParseDict(dict(options.get("provenance", {})), struct_pb2.Struct()),
    )
    return _upload_messages(header, data)


def list_artifacts(
    kind: ArtifactKindName | None, model_fingerprint: str, page_token: str
) -> artifact_pb2.ListArtifactsRequest:
    return artifact_pb2.ListArtifactsRequest(
        kind=value_or_unspecified(ARTIFACT_KINDS, kind, "kind"),
        model_fingerprint=model_fingerprint,
        page_token=page_token,
    )


def download(ref: str, format: ArtifactFormatName, layers: Iterable[int]) -> artifact_pb2.DownloadRequest:
    return artifact_pb2.DownloadRequest(ref=ref, format=artifact_format(format), layers=layers)


def artifact_format(name: ArtifactFormatName) -> artifact_pb2.ArtifactFormat.ValueType:
    return value_of(ARTIFACT_FORMATS, name, "format")


def _upload_messages(header: artifact_pb2.UploadHeader, data: bytes) -> Iterator[artifact_pb2.UploadRequest]:
    yield artifact_pb2.UploadRequest(header=header)
    for start in range(0, len(data), CHUNK_BYTES):
        yield artifact_pb2.UploadRequest(chunk=data[start : start + CHUNK_BYTES])


def _message(turn: Message) -> generation_pb2.ChatMessage:
    role, content = turn if isinstance(turn, tuple) else (turn["role"], turn["content"])
    return generation_pb2.ChatMessage(role=role, content=content)

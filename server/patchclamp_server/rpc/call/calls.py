"""The calls that run the model share this: decoding a request, running it, and following its events."""

import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from patchclamp.v1 import generation_pb2 as pb
from patchclamp.v1 import program_pb2, sparse_policy_pb2
from patchclamp_server.artifacts.head_sets import select
from patchclamp_server.artifacts.store import ArtifactStore
from patchclamp_server.engine.call_observer import OBSERVER
from patchclamp_server.engine.engine import Engine
from patchclamp_server.engine.request import Event, Priority, Request, SamplingParams, SparseInference, StopParams
from patchclamp_server.errors import NotFound
from patchclamp_server.interventions.bind import bind
from patchclamp_server.interventions.bound import BoundProgram
from patchclamp_server.interventions.request_warnings import RequestWarning, WarningCode
from patchclamp_server.interventions.safe_strengths import beyond_safe_range
from patchclamp_server.model.info import ModelInfo
from patchclamp_server.rpc.call.confidence import AnswerConfidence, Confidence
from patchclamp_server.rpc.call.grounding import GroundedTokens, Grounding
from patchclamp_server.rpc.call.response_builder import ResponseBuilder
from patchclamp_server.rpc.codecs.confidence import decode_confidence
from patchclamp_server.rpc.codecs.generation import (
    decode_grounding,
    decode_logprobs,
    decode_priority,
    decode_prompt,
    decode_sampling,
    decode_stop,
)
from patchclamp_server.rpc.codecs.program import decode_program, token_readouts
from patchclamp_server.rpc.codecs.sparsity import decode_sparsity
from patchclamp_server.rpc.streams.stream import EventStream
from patchclamp_server.sparsity.binder import Binder
from patchclamp_server.text.prompt import EncodedPrompt, PromptEncoder


@dataclass(frozen=True, eq=False)
class Prepared:
    """A GenerateRequest that has passed every check that needs no engine."""

    prompt: EncodedPrompt
    program: BoundProgram
    sampling: SamplingParams
    stop: StopParams
    priority: Priority
    sparsity: SparseInference | None
    grounding: Grounding | None
    confidence: Confidence | None
    prompts: PromptEncoder
    prompt_logprobs: int | None = None
    warnings: tuple[RequestWarning, ...] = ()

    def observed(self, program: BoundProgram) -> BoundProgram:
        """Returns the program with what grounding and confidence read, where they are asked for."""
        for own in (self.grounding, self.confidence):
            if own is not None:
                program = own.added_to(program)
        return program

    def builder(self, *, wait_for_readouts: bool = True, edited: bool = True) -> ResponseBuilder:
        """Returns the builder of the responses. Nothing waits for readouts where the client asked for none. `edited`:
        whether the program runs, so that its strengths are warned of before the first token."""
        grounded = None
        if self.grounding is not None:
            grounded = GroundedTokens(self.grounding, self.prompt.ids, self.prompts.text_of)
        wait = wait_for_readouts and bool(self.program.readouts)
        return ResponseBuilder(
            len(self.prompt.ids),
            wait_for_readouts=wait,
            piece=self.prompts.piece,
            token_readouts=token_readouts(self.program),
            grounded=grounded,
            confidence=None if self.confidence is None else AnswerConfidence(self.confidence),
            warnings=(*self.warnings, *(_beyond_safe_ranges(self.program) if edited else ())),
        )

    def to_request(self, on_event: Callable[[Event], None], deadline: float | None, **changes: Any) -> Request:
        """Returns the engine's request. `changes` are further fields of Request, or replace those of the message."""
        fields: dict[str, Any] = {
            "tokens": self.prompt.ids,
            "on_event": on_event,
            "program": self.observed(self.program),
            "sampling": self.sampling,
            "stop": self.stop,
            "priority": self.priority,
            "deadline": deadline,
            "roles": self.prompt.roles,
            "sparsity": self.sparsity,
            "prompt_logprobs": self.prompt_logprobs,
            "warnings": self.warnings,
        }
        return Request(**{**fields, **changes})


class Preparation:
    """Turns messages into what the engine runs. Tokenises and may load artifacts: call it in a thread."""

    def __init__(self, prompts: PromptEncoder, store: ArtifactStore, model: ModelInfo, binder: Binder) -> None:
        self.prompts = prompts
        self._store = store
        self.model = model
        self._binder = binder

    def generate(self, proto: pb.GenerateRequest) -> Prepared:
        """Raises InvalidArgument, FailedPrecondition or NotFound."""
        check_model(proto.model, self.model)
        logprobs = decode_logprobs(proto.logprobs, "logprobs") if proto.HasField("logprobs") else None
        has_prompt_logprobs = proto.HasField("prompt_logprobs")
        prompt_logprobs = decode_logprobs(proto.prompt_logprobs, "prompt_logprobs") if has_prompt_logprobs else None
        sampling = decode_sampling(proto.sampling, self.model.vocab_size, logprobs)
        stop = decode_stop(proto.stop, self.model.vocab_size)
        priority = decode_priority(proto.priority)
        prompt = decode_prompt(proto.prompt, self.prompts)
        # A prompt as long as the context still has a token after it.
        room = max(1, self.model.context_length - len(prompt.ids))
        warnings = _beyond_context(stop.max_tokens, room) if proto.stop.HasField("max_tokens") else ()
        stop = replace(stop, max_tokens=min(stop.max_tokens, room))
        program = self.program(proto.program, prompt)
        sparsity = self.sparsity(proto.sparsity) if proto.HasField("sparsity") else None
        grounding = self.grounding(proto.grounding, program) if proto.HasField("grounding") else None
        confidence = self.confidence(proto.confidence, prompt.ids) if proto.HasField("confidence") else None
        return Prepared(
            prompt,
            program,
            sampling,
            stop,
            priority,
            sparsity,
            grounding,
            confidence,
            self.prompts,
            prompt_logprobs,
            warnings,
        )

    def program(self, proto: program_pb2.Program, prompt: EncodedPrompt) -> BoundProgram:
        roles, length = prompt.roles, len(prompt.ids)
        return bind(decode_program(proto), self.model, self._store, prompt_roles=roles, prompt_length=length)

    def grounding(self, proto: pb.Grounding, program: BoundProgram) -> Grounding:
        return Grounding.by(select(decode_grounding(proto), self._store, self.model, "grounding"), program)

    def confidence(self, proto: pb.Confidence, prompt: Sequence[int]) -> Confidence:
        return decode_confidence(proto, self.model, self.prompts, prompt)

    def sparsity(self, proto: sparse_policy_pb2.Sparsity, *, guarded: bool = True) -> SparseInference:
        return decode_sparsity(proto, self._binder, guarded=guarded)


def _beyond_context(max_tokens: int, room: int) -> tuple[RequestWarning, ...]:
    if max_tokens <= room:
        return ()
    message = f"the context has room for {room} tokens after the prompt, not for {max_tokens}: generation ends there"
    return (RequestWarning(WarningCode.BEYOND_CONTEXT, "stop.max_tokens", message),)


def _beyond_safe_ranges(program: BoundProgram) -> tuple[RequestWarning, ...]:
    """Returns what the receipt will say of the strengths that the program begins with."""
    edits = enumerate(program.edits)
    return tuple(w for i, edit in edits for w in beyond_safe_range(i, edit.name, edit.safe, (edit.strength,)))


def check_model(name: str, model: ModelInfo) -> None:
    if name not in ("", model.name):
        raise NotFound("model", f"{name!r} is not served here; {model.name!r} is")


def deadline_of(context: Any) -> float | None:
    """Returns the call's deadline on the clock of time.monotonic(); None where it has none."""
    remaining = context.time_remaining()
    return None if remaining is None else time.monotonic() + remaining


@contextmanager
def running(engine: Engine, request: Request) -> Iterator[int]:
    """Submits a request, and leaves nothing running behind: cancelling a request that has ended does nothing."""
    observer = OBSERVER.get()
    request_id = engine.submit(request) if observer is None else observer.submit(engine, request)
    try:
        yield request_id
    finally:
        engine.cancel(request_id)


async def responses_of(stream: EventStream[Event], builder: ResponseBuilder) -> AsyncIterator[pb.GenerateResponse]:
    """Yields responses up to and including the one that has `finished`. Raises the error of a request that failed."""
    while True:
        for response in builder.responses(await stream.batch()):
            yield response
            if response.HasField("finished"):
                return

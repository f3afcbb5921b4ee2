"""GenerationService: Generate, Session, Score and Compare."""

import asyncio
import math
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack
from typing import Any

from patchclamp.v1 import generation_pb2 as pb
from patchclamp.v1.generation_pb2_grpc import GenerationServiceServicer
from patchclamp_server.artifacts.store import ArtifactStore
from patchclamp_server.engine.engine import Engine
from patchclamp_server.engine.request import Event, Request, SamplingParams, StopParams
from patchclamp_server.errors import InvalidArgument, within
from patchclamp_server.interventions.field_checks import chosen
from patchclamp_server.model.info import ModelInfo
from patchclamp_server.rpc.call.calls import Preparation, Prepared, check_model, deadline_of, responses_of, running
from patchclamp_server.rpc.call.confidence import AnswerConfidence, Confidence
from patchclamp_server.rpc.call.response_builder import ResponseBuilder
from patchclamp_server.rpc.codecs.generation import (
    decode_logprobs,
    decode_priority,
    decode_prompt,
    decode_samples,
)
from patchclamp_server.rpc.codecs.message_size import CLIENT_MESSAGE_BYTES
from patchclamp_server.rpc.codecs.program import token_readouts
from patchclamp_server.rpc.streams.comparison import EDITED, Comparison, Side
from patchclamp_server.rpc.streams.samples import Samples
from patchclamp_server.rpc.streams.session import SessionControl
from patchclamp_server.rpc.streams.stream import EventBridge, EventStream
from patchclamp_server.sparsity.binder import Binder
from patchclamp_server.text.prompt import PromptEncoder

Context = Any


class GenerationService(GenerationServiceServicer):
    """Raises the errors of errors.py; an interceptor turns them into statuses.

    `on_grounded` is told the grounded ratio of every request that asked for it and finished.
    """

    def __init__(
        self,
        engine: Engine,
        prompts: PromptEncoder,
        store: ArtifactStore,
        model: ModelInfo,
        binder: Binder,
        on_grounded: Callable[[float], None],
    ) -> None:
        self._engine = engine
        self._on_grounded = on_grounded
        self._prepare = Preparation(prompts, store, model, binder)
        self._threads = prompts.serving
        self._bridge: EventBridge | None = None

    async def Generate(self, request: pb.GenerateRequest, context: Context) -> AsyncIterator[pb.GenerateResponse]:
        self._engine.check_room()
        samples = decode_samples(request.samples)
        prepared = await self._threads.run(self._prepare.generate, request)
        if samples > 1:
            async for response in self._samples(prepared, samples, context):
                yield response
            return
        stream = self._stream()
        with running(self._engine, prepared.to_request(stream.put, deadline_of(context), held=stream.is_full)):
            async for response in responses_of(stream, prepared.builder()):
                self._observe(response)
                yield response

    async def _samples(self, prepared: Prepared, samples: int, context: Context) -> AsyncIterator[pb.GenerateResponse]:
        stream: EventStream[tuple[int, Event]] = EventStream(self._bridge_of_loop(), self._engine.wake)
        drawn = Samples(prepared, samples, stream, deadline_of(context))
        with ExitStack() as stack:
            for request in drawn.requests:
                stack.enter_context(running(self._engine, request))
            async for response in drawn.responses():
                self._observe(response)
                yield response

    async def Session(self, request_iterator: Any, context: Context) -> AsyncIterator[pb.GenerateResponse]:
        messages: AsyncIterator[pb.SessionRequest] = aiter(request_iterator)
        first = await anext(messages, None)
        if first is None or not first.HasField("start"):
            raise InvalidArgument("start", "expected as the first message of a session")
        self._engine.check_room()
        lockstep = first.start.lockstep
        stream = self._stream()
        with within("start.request"):
            _one_sample(first.start.request)
            prepared = await self._threads.run(self._prepare.generate, first.start.request)
        builder = prepared.builder(wait_for_readouts=not lockstep)
        credits = 0 if lockstep else None
        request = prepared.to_request(stream.put, deadline_of(context), credits=credits, held=stream.is_full)
        with ExitStack() as stack:
            with within("start.request"):
                request_id = stack.enter_context(running(self._engine, request))
            control = SessionControl(self._engine, request_id, stream, lockstep=lockstep)
            stack.enter_context(control.following(messages))
            async for response in responses_of(stream, builder):
                control.delivered(len(response.tokens))
                self._observe(response)
                yield response

    async def Score(self, request: pb.ScoreRequest, context: Context) -> pb.ScoreResponse:
        self._engine.check_room()
        stream = self._stream()
        score, confidence = await self._threads.run(self._score_request, request, stream, deadline_of(context))
        response = pb.ScoreResponse()
        assert score.score_from is not None
        builder = ResponseBuilder(
            score.score_from,
            wait_for_readouts=True,
            piece=self._prepare.prompts.piece,
            token_readouts=frozenset() if score.program is None else token_readouts(score.program),
            confidence=None if confidence is None else AnswerConfidence(confidence),
        )
        size = 0
        with running(self._engine, score):
            async for part in responses_of(stream, builder):
                size += part.ByteSize()
                if size > CLIENT_MESSAGE_BYTES:
                    message = f"the answer has more than {CLIENT_MESSAGE_BYTES} bytes: score or read less"
                    raise InvalidArgument("program.readouts" if request.program.readouts else "top_logprobs", message)
                response.tokens.extend(part.tokens)
                response.prompt_readouts.extend(part.prompt_readouts)
                if part.HasField("finished"):
                    response.receipt.CopyFrom(part.finished.receipt)
                    response.usage.CopyFrom(part.finished.usage)
                    if part.finished.HasField("sparsity"):
                        response.sparsity.CopyFrom(part.finished.sparsity)
                    if part.finished.HasField("confidence"):
                        response.confidence.CopyFrom(part.finished.confidence)
        response.total_logprob = math.fsum(token.logprob for token in response.tokens)
        response.perplexity = _exp(-response.total_logprob / len(response.tokens))
        return response

    async def Compare(self, request: pb.CompareRequest, context: Context) -> AsyncIterator[pb.CompareResponse]:
        self._engine.check_room()
        with within("request"):
            _one_sample(request.request)
            prepared = await self._threads.run(self._prepare.generate, request.request)
            stream: EventStream[tuple[Side, Event]] = EventStream(self._bridge_of_loop(), self._engine.wake)
            comparison = Comparison(prepared, stream, deadline_of(context))
            with running(self._engine, comparison.edited), running(self._engine, comparison.baseline):
                async for response in comparison.responses():
                    if response.text.side == EDITED:
                        self._observe(response.text.response)
                    yield response

    def _observe(self, response: pb.GenerateResponse) -> None:
        if response.finished.HasField("grounding"):
            self._on_grounded(response.finished.grounding.grounded_ratio)

    def _score_request(
        self, proto: pb.ScoreRequest, stream: EventStream[Event], deadline: float | None
    ) -> tuple[Request, Confidence | None]:
        """Prompt and continuation as one sequence, scored from where the continuation begins, and the confidence that
        is asked for."""
        model = self._prepare.model
        check_model(proto.model, model)
        logprobs = decode_logprobs(proto.top_logprobs, "top_logprobs")
        priority = decode_priority(proto.priority)
        prompt = decode_prompt(proto.prompt, self._prepare.prompts)
        form = chosen(proto, "continuation", "")
        if form == "text":
            continuation = self._prepare.prompts.encode_continuation(proto.text, form, prompt.ids)
        else:
            continuation = decode_prompt(pb.Prompt(tokens=proto.tokens), self._prepare.prompts, "").ids
        if not continuation:
            raise InvalidArgument(form, "expected at least one token to score")
        tokens = prompt.ids + continuation
        if len(tokens) > model.context_length:
            message = f"prompt and continuation have {len(tokens)} tokens, the model's context {model.context_length}"
            raise InvalidArgument(form, message)
        sparsity = self._prepare.sparsity(proto.sparsity, guarded=False) if proto.HasField("sparsity") else None
        program, confidence = self._prepare.program(proto.program, prompt), None
        if proto.HasField("confidence"):
            confidence = self._prepare.confidence(proto.confidence, prompt.ids)
            program = confidence.added_to(program)
        request = Request(
            tokens=tokens,
            on_event=stream.put,
            program=program,
            sampling=SamplingParams(logprobs=logprobs),
            stop=StopParams(max_tokens=0, ignore_eos=True),
            priority=priority,
            deadline=deadline,
            roles=prompt.roles,
            score_from=len(prompt.ids),
            sparsity=sparsity,
        )
        return request, confidence

    def _stream(self) -> EventStream[Event]:
        return EventStream(self._bridge_of_loop(), self._engine.wake)

    def _bridge_of_loop(self) -> EventBridge:
        """One for all calls: the service runs in one loop."""
        if self._bridge is None:
            self._bridge = EventBridge(asyncio.get_running_loop())
        return self._bridge


def _one_sample(request: pb.GenerateRequest) -> None:
    if decode_samples(request.samples) > 1:
        raise InvalidArgument("samples", f"expected 1 here, got {request.samples}: Generate draws several")


def _exp(x: float) -> float:
    """exp(x), infinite where it exceeds a double."""
    return math.exp(x) if x < 709.0 else math.inf

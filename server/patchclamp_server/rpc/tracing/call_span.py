"""A call has its own span, and below it spans of what the engine did for it and of the stages of its analysis job.

They are made of times that the engine notes anyway, after the fact and in the event loop. No attribute holds a prompt,
a token or the text of an error, which may quote what a client sent.
"""

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TypeAlias

import grpc
from opentelemetry.context import Context
from opentelemetry.trace import Span, SpanKind, StatusCode, Tracer, set_span_in_context

from patchclamp_server.callers import CALLER
from patchclamp_server.engine.engine import Engine
from patchclamp_server.engine.request import (
    Event,
    Failed,
    Finished,
    Request,
    SamplingParams,
    SparseInference,
    SparsityReport,
    Usage,
)

Attributes: TypeAlias = Mapping[str, str | bool | int | float | tuple[str, ...]]

# These codes are the server's fault, by the semantic conventions of gRPC servers; others leave the span's status unset.
SERVER_ERRORS = frozenset(
    {
        grpc.StatusCode.UNKNOWN,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.UNIMPLEMENTED,
        grpc.StatusCode.INTERNAL,
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.DATA_LOSS,
    }
)


@dataclass(frozen=True)
class Refusal:
    """Holds what the details of a status name: a reason of a closed set, and the path of a field."""

    reason: str = ""
    field: str = ""


@dataclass
class _Stage:
    """One stage of a job. It ends with its last progress, since each is reported when its work is done."""

    name: str
    began: float
    ended: float
    done: int = 0
    total: int = 0


class CallSpan:
    """A SERVER span named by the method. It is a CallObserver.

    It ends with the call, and is exported once every request of the call has had its last event: those of a cancelled
    call have it a step later.
    """

    def __init__(self, tracer: Tracer, path: str, parent: Context, model: str) -> None:
        self._tracer = tracer
        self._model = model
        self._loop = asyncio.get_running_loop()
        self._began = time.monotonic()
        # Added to times of time.monotonic(), in nanoseconds, this gives nanoseconds since 1970, as spans have them.
        self._epoch = time.time_ns() - int(self._began * 1e9)
        self.span: Span = tracer.start_span(
            path,
            parent,
            SpanKind.SERVER,
            {"rpc.system.name": "grpc", "rpc.method": path.removeprefix("/")},
            start_time=self._at(self._began),
        )
        self.context = set_span_in_context(self.span, parent)
        self._requests = 0
        self._open = 0
        self._stage: _Stage | None = None
        self._job_began = self._began
        self._ended: float | None = None

    def submit(self, engine: Engine, request: Request) -> int:
        number = self._requests
        submitted = time.monotonic()
        emit = request.on_event
        ended = False

        def on_event(event: Event) -> None:
            nonlocal ended
            if isinstance(event, Finished | Failed) and not ended:
                ended = True
                self._loop.call_soon_threadsafe(self._request_ended, number, request, submitted, event)
            emit(event)

        request_id = engine.submit(replace(request, on_event=on_event))
        self._requests += 1
        self._open += 1
        if number == 0:
            # The first request speaks for the call: in a comparison it is the edited one.
            self.span.set_attributes(request_attributes(request, self._model))
            self._name_caller()
        return request_id

    def job_begins(self) -> None:
        self._job_began = time.monotonic()
        self._name_caller()
        self._child("queue", self._began, self._job_began)

    def progress(self, name: str, done: int, total: int) -> None:
        """Notes progress. A stage begins where the one before it ended, the first one with the job."""
        now = time.monotonic()
        if self._stage is None or self._stage.name != name:
            began = self._job_began if self._stage is None else self._stage.ended
            self._end_stage()
            self._stage = _Stage(name, began, now)
        self._stage.ended, self._stage.done, self._stage.total = now, done, total

    def end(self, code: grpc.StatusCode, refusal: Refusal) -> None:
        self._ended = time.monotonic()
        self.span.set_attribute("rpc.response.status_code", code.name)
        if code is not grpc.StatusCode.OK:
            self._fail(code, refusal)
            if self._stage is not None:
                self._stage.ended = self._ended
        self._end_stage()
        self._give_out()

    def _fail(self, code: grpc.StatusCode, refusal: Refusal) -> None:
        self.span.set_attribute("error.type", code.name)
        attributes = {"exception.type": refusal.reason or code.name}
        if refusal.field:
            attributes["patchclamp.error.field"] = refusal.field
        self.span.add_event("exception", attributes, self._at(self._ended or self._began))
        if code in SERVER_ERRORS:
            self.span.set_status(StatusCode.ERROR)

    def _request_ended(self, number: int, request: Request, submitted: float, event: Finished | Failed) -> None:
        self._open -= 1
        if number == 0:
            self.span.set_attributes(outcome_attributes(event))
        self._request_spans(number, request, submitted, event)
        self._give_out()

    def _request_spans(self, number: int, request: Request, submitted: float, event: Finished | Failed) -> None:
        """Makes the spans queue, prefill and decode, as far as the request came."""
        timeline, usage = event.timeline, event.usage
        if timeline is None or usage is None:
            return
        which: Attributes = {"patchclamp.request": number, **program_attributes(request)}
        self._child("queue", submitted, timeline.admitted or timeline.ended, which)
        if timeline.admitted is None:
            return
        prefilled = timeline.first_token or timeline.ended
        preempted = [t for t in timeline.preempted if t <= prefilled]
        read = {
            "gen_ai.usage.input_tokens": usage.prompt_tokens,
            "gen_ai.usage.cache_read.input_tokens": usage.cached_prompt_tokens,
        }
        self._child("prefill", timeline.admitted, prefilled, {**which, **read}, preempted)
        if timeline.first_token is not None:
            preempted = [t for t in timeline.preempted if t > prefilled]
            written = {"gen_ai.usage.output_tokens": usage.generated_tokens}
            self._child("decode", timeline.first_token, timeline.ended, {**which, **written}, preempted)

    def _end_stage(self) -> None:
        if self._stage is not None:
            stage = self._stage
            attributes = {"patchclamp.progress.done": stage.done, "patchclamp.progress.total": stage.total}
            self._child(stage.name, stage.began, stage.ended, attributes)

    def _child(
        self,
        name: str,
        began: float,
        ended: float,
        attributes: Attributes | None = None,
        preempted: list[float] | None = None,
    ) -> None:
        span = self._tracer.start_span(name, self.context, attributes=attributes, start_time=self._at(began))
        for time_of_it in preempted or ():
            span.add_event("preempted", timestamp=self._at(time_of_it))
        span.end(self._at(ended))

    def _give_out(self) -> None:
        if self._ended is not None and self._open == 0:
            self.span.end(self._at(self._ended))

    def _name_caller(self) -> None:
        if tenant := CALLER.get().tenant:
            self.span.set_attribute("patchclamp.tenant", tenant)

    def _at(self, seconds: float) -> int:
        return self._epoch + int(seconds * 1e9)


def request_attributes(request: Request, model: str) -> Attributes:
    """Returns what was asked for, without any words of the client."""
    found: dict[str, str | bool | int | float | tuple[str, ...]] = {
        "gen_ai.provider.name": "patchclamp",
        "gen_ai.request.model": model,
        "gen_ai.response.model": model,
        "patchclamp.priority": request.priority.name.lower(),
        **program_attributes(request),
    }
    if request.score_from is None:
        found["gen_ai.operation.name"] = "text_completion" if request.roles is None else "chat"
        found["gen_ai.request.max_tokens"] = request.stop.max_tokens
        found.update(sampling_attributes(request.sampling))
    if request.sparsity is not None:
        found.update(sparsity_attributes(request.sparsity))
    return found


def sampling_attributes(sampling: SamplingParams) -> Attributes:
    found: dict[str, str | bool | int | float | tuple[str, ...]] = {
        "gen_ai.request.temperature": sampling.temperature,
        "gen_ai.request.top_p": sampling.top_p,
        "gen_ai.request.top_k": sampling.top_k,
        "gen_ai.request.presence_penalty": sampling.presence_penalty,
        "gen_ai.request.frequency_penalty": sampling.frequency_penalty,
    }
    if sampling.seed is not None:
        # A span holds 64 bits with a sign.
        found["gen_ai.request.seed"] = sampling.seed if sampling.seed < 2**63 else str(sampling.seed)
    return found


def program_attributes(request: Request) -> Attributes:
    if request.program is None:
        return {}
    return {
        "patchclamp.program.fingerprint": request.program.fingerprint,
        "patchclamp.program.edits": len(request.program.edits),
    }


def sparsity_attributes(sparsity: SparseInference) -> Attributes:
    return {"patchclamp.sparsity.policy": sparsity.policy, "patchclamp.sparsity.profile": sparsity.profile}


def outcome_attributes(event: Finished | Failed) -> Attributes:
    """Returns what came of the request."""
    found: dict[str, str | bool | int | float | tuple[str, ...]] = {}
    if event.usage is not None:
        found.update(usage_attributes(event.usage))
    if isinstance(event, Finished):
        found["gen_ai.response.finish_reasons"] = (event.reason.value,)
        if event.sparsity is not None:
            found.update(report_attributes(event.sparsity))
    return found


def usage_attributes(usage: Usage) -> Attributes:
    return {
        "gen_ai.usage.input_tokens": usage.prompt_tokens,
        "gen_ai.usage.cache_read.input_tokens": usage.cached_prompt_tokens,
        "gen_ai.usage.output_tokens": usage.generated_tokens,
        "patchclamp.preemptions": usage.preemptions,
    }


def report_attributes(report: SparsityReport) -> Attributes:
    return {
        "patchclamp.sparsity.active_ratio": report.active_ratio,
        "patchclamp.sparsity.guard_fallback": report.guard is not None and report.guard.dense_from is not None,
    }

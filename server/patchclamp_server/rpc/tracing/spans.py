"""OpenTelemetry traces are sent to a collector by OTLP over gRPC. This is imported only where tracing is asked for.

The parent of a call's span comes out of its metadata, by the propagators of the library (traceparent, tracestate and
baggage, unless OTEL_PROPAGATORS names others). Sampling, batches, headers and certificates are set by the OTEL_*
variables of the SDK. Spans wait in a bounded queue for a thread of their own: where the collector is down or slow, the
oldest are lost.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import aclosing, contextmanager
from functools import cache
from threading import Thread
from typing import Any

import grpc
from google.protobuf import descriptor_pool
from google.rpc import error_details_pb2, status_pb2
from opentelemetry import propagate, trace
from opentelemetry.context import attach, detach
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.propagators.textmap import Getter
from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor

from patchclamp_server.engine.call_observer import OBSERVER
from patchclamp_server.model.info import ModelInfo
from patchclamp_server.rpc.call.interceptors import code_of_cancelled, code_set_by_handler, write_all
from patchclamp_server.rpc.tracing.call_span import CallSpan, Refusal

logger = logging.getLogger(__name__)

Context = Any
Handler = Any
Metadata = tuple[tuple[str, str | bytes], ...]

# This is the standard metadata key of a google.rpc.Status.
STATUS_DETAILS = "grpc-status-details-bin"


class Tracing:
    """Makes and sends the spans of one server. With an empty `endpoint` they go to OTEL_EXPORTER_OTLP_ENDPOINT, or to
    port 4317 of this machine. Calls of `services` are traced; the probes of health are not."""

    def __init__(self, endpoint: str, model: ModelInfo, version: str, services: frozenset[str]) -> None:
        self._exporter = OTLPSpanExporter(endpoint=endpoint or None)
        self._provider = TracerProvider(resource=_resource(model, version), shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(self._exporter))
        self.tracer = self._provider.get_tracer("patchclamp", version)
        # It comes before all others, so that what they refuse has its span too.
        self.outermost = CallSpanInterceptor(self.tracer, model.name, services)
        # It comes after all others: it sees what handlers say, and not how it is sent.
        self.innermost = StageInterceptor()

    def close(self, seconds: float) -> None:
        """Sends what waits, for at most `seconds`, and ends."""
        # The SDK's own shutdown waits for up to 30 s, and a thread that may be left behind must not hold up the exit.
        sending = Thread(target=self._provider.shutdown, name="patchclamp-last-spans", daemon=True)
        sending.start()
        sending.join(seconds)
        if sending.is_alive():
            logger.warning("the collector did not take the last spans within %g s; they are lost", seconds)
            self._exporter.shutdown()


class CallSpanInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]
    def __init__(self, tracer: trace.Tracer, model: str, services: frozenset[str]) -> None:
        self._tracer = tracer
        self._model = model
        self._services = services

    async def intercept_service(
        self, continuation: Callable[[Any], Awaitable[Handler]], handler_call_details: Any
    ) -> Handler:
        handler = await continuation(handler_call_details)
        path: str = handler_call_details.method
        if handler is None or path.strip("/").rpartition("/")[0] not in self._services:
            return handler
        metadata: Metadata = handler_call_details.invocation_metadata or ()
        if handler.response_streaming:
            behaviour = handler.stream_stream if handler.request_streaming else handler.unary_stream

            async def stream(request: Any, context: Context) -> None:
                with self._span(path, metadata, context):
                    await write_all(behaviour, request, context)

            make = (
                grpc.stream_stream_rpc_method_handler
                if handler.request_streaming
                else grpc.unary_stream_rpc_method_handler
            )
            return make(stream, handler.request_deserializer, handler.response_serializer)
        behaviour = handler.stream_unary if handler.request_streaming else handler.unary_unary

        async def unary(request: Any, context: Context) -> Any:
            with self._span(path, metadata, context):
                return await behaviour(request, context)

        make = (
            grpc.stream_unary_rpc_method_handler if handler.request_streaming else grpc.unary_unary_rpc_method_handler
        )
        return make(unary, handler.request_deserializer, handler.response_serializer)

    @contextmanager
    def _span(self, path: str, metadata: Metadata, context: Context) -> Iterator[None]:
        """Opens the span of a call that is answered inside, current for logs and for what the call starts."""
        call = CallSpan(self._tracer, path, propagate.extract(metadata, getter=METADATA), self._model)
        # A trace that is not sampled costs nothing more.
        observing = OBSERVER.set(call if call.span.is_recording() else None)
        current = attach(call.context)
        code = grpc.StatusCode.UNKNOWN
        try:
            yield
            code = code_set_by_handler(context)
        except asyncio.CancelledError:
            code = code_of_cancelled(context)
            raise
        except grpc.aio.AbortError:
            code = code_set_by_handler(context)
            raise
        finally:
            detach(current)
            OBSERVER.reset(observing)
            call.end(code, refusal_of(context))


class StageInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]
    """Tells the span of a call about the progress that its responses report."""

    async def intercept_service(
        self, continuation: Callable[[Any], Awaitable[Handler]], handler_call_details: Any
    ) -> Handler:
        handler = await continuation(handler_call_details)
        if handler is None or not handler.unary_stream or not reports_stages(handler_call_details.method):
            return handler

        async def stream(request: Any, context: Context) -> AsyncIterator[Any]:
            call = OBSERVER.get()
            async with aclosing(handler.unary_stream(request, context)) as responses:
                async for response in responses:
                    if isinstance(call, CallSpan) and response.HasField("progress"):
                        progress = response.progress
                        call.progress(progress.stage, progress.done, progress.total)
                    yield response

        return grpc.unary_stream_rpc_method_handler(stream, handler.request_deserializer, handler.response_serializer)


@cache
def reports_stages(path: str) -> bool:
    """Returns whether the contract's responses of a method have a `progress` with a `stage`."""
    try:
        method = descriptor_pool.Default().FindMethodByName(path.strip("/").replace("/", "."))
    except KeyError:
        return False
    progress = method.output_type.fields_by_name.get("progress")
    stages = None if progress is None else progress.message_type
    return stages is not None and "stage" in stages.fields_by_name


def refusal_of(context: Context) -> Refusal:
    """Returns the ErrorInfo of the status with which the call was ended; an empty Refusal where it has none."""
    for key, value in context.trailing_metadata() or ():
        if key == STATUS_DETAILS:
            for detail in status_pb2.Status.FromString(value).details:
                info = error_details_pb2.ErrorInfo()
                if detail.Unpack(info):
                    return Refusal(info.reason, info.metadata.get("field", ""))
    return Refusal()


class _Metadata(Getter[Metadata]):
    """Reads gRPC metadata as a carrier; its keys are in lower case."""

    def get(self, carrier: Metadata, key: str) -> list[str] | None:
        values = [v for k, v in carrier if k == key.lower() and isinstance(v, str)]
        return values or None

    def keys(self, carrier: Metadata) -> list[str]:
        return [key for key, _ in carrier]


METADATA = _Metadata()


def put_trace_ids_on_log_records() -> None:
    """Gives every log record a `trace_id` from now on: that of its call, else "-". It holds for the whole process."""
    make = logging.getLogRecordFactory()

    def with_trace_id(*args: Any, **kwargs: Any) -> logging.LogRecord:
        record = make(*args, **kwargs)
        current = trace.get_current_span().get_span_context()
        record.trace_id = trace.format_trace_id(current.trace_id) if current.is_valid else "-"
        return record

    logging.setLogRecordFactory(with_trace_id)


def _resource(model: ModelInfo, version: str) -> Resource:
    """Returns the resource; OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES take precedence."""
    ours = Resource(
        {
            SERVICE_NAME: "patchclamp",
            SERVICE_VERSION: version,
            "patchclamp.model.name": model.name,
            "patchclamp.model.fingerprint": model.fingerprint,
        }
    )
    given = Resource.create()
    if str(given.attributes.get(SERVICE_NAME, "")).startswith("unknown_service"):
        given = Resource({k: v for k, v in given.attributes.items() if k != SERVICE_NAME})
    return ours.merge(given)

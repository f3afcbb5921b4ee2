"""A collector that speaks real OTLP over gRPC, and keeps what it is sent."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.collector.trace.v1.trace_service_pb2_grpc import (
    TraceServiceServicer,
    add_TraceServiceServicer_to_server,
)
from opentelemetry.proto.common.v1.common_pb2 import KeyValue
from opentelemetry.proto.trace.v1.trace_pb2 import Span
from patience import PATIENCE_SECONDS

# Far longer than anything takes here: what waits that long has failed.


class Collector(TraceServiceServicer):
    """Use as a context manager. While `taking` is cleared it answers nobody."""

    def __init__(self) -> None:
        self.requests: list[ExportTraceServiceRequest] = []
        self.taking = threading.Event()
        self.taking.set()
        self._asked = 0
        self._changed = threading.Condition()
        self._server = grpc.server(ThreadPoolExecutor(4))
        add_TraceServiceServicer_to_server(self, self._server)
        self.endpoint = f"http://127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"

    def Export(self, request: ExportTraceServiceRequest, context: Any) -> ExportTraceServiceResponse:
        with self._changed:
            self._asked += 1
            self._changed.notify_all()
        self.taking.wait()
        with self._changed:
            self.requests.append(request)
            self._changed.notify_all()
        return ExportTraceServiceResponse()

    def __enter__(self) -> "Collector":
        self._server.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.taking.set()
        self._server.stop(None).wait()

    @property
    def spans(self) -> list[Span]:
        scopes = [scope for r in self.requests for resource in r.resource_spans for scope in resource.scope_spans]
        return [span for scope in scopes for span in scope.spans]

    def wait_until_asked(self) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: self._asked > 0, PATIENCE_SECONDS)

    def call(self, of: Callable[[Span], bool]) -> "Call":
        """The call whose SERVER span is `of` that kind, once it has come: the spans below it come before it."""

        def served() -> Span | None:
            return next((s for s in self.spans if s.kind == Span.SPAN_KIND_SERVER and of(s)), None)

        with self._changed:
            assert self._changed.wait_for(served, PATIENCE_SECONDS), "no such call was traced"
            span = served()
            assert span is not None
            return Call(span, [s for s in self.spans if s.parent_span_id == span.span_id])

    def trace(self, trace_id: str) -> "Call":
        return self.call(lambda span: span.trace_id.hex() == trace_id)


class Call:
    """A SERVER span, and those below it in their order."""

    def __init__(self, span: Span, below: list[Span]) -> None:
        self.span = span
        self.below = sorted(below, key=lambda s: s.start_time_unix_nano)
        self.attributes = values(span.attributes)

    @property
    def names(self) -> list[str]:
        return [s.name for s in self.below]

    def child(self, name: str) -> Span:
        [span] = [s for s in self.below if s.name == name]
        return span


def values(attributes: Any) -> dict[str, Any]:
    return {a.key: value(a) for a in attributes}


def value(attribute: KeyValue) -> Any:
    kind = attribute.value.WhichOneof("value")
    if kind == "array_value":
        return [getattr(v, v.WhichOneof("value")) for v in attribute.value.array_value.values]
    return getattr(attribute.value, kind)

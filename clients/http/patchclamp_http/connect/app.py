"""JSON for every RPC by the Connect protocol: POST /patchclamp.v1.Service/Method, streams included.

A call of one message each way is plain JSON, so that curl and fetch suffice; streams are enveloped as the protocol has
it. Both are connectrpc's work: here is only how a call of it becomes one of gRPC.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from typing import Any

import grpc
from connectrpc.code import Code
from connectrpc.codec import Codec
from connectrpc.compat import google_protobuf_binary_codec
from connectrpc.errors import ConnectError, ErrorDetail
from connectrpc.method import IdempotencyLevel, MethodInfo, StreamType
from connectrpc.request import RequestContext
from connectrpc.server import ConnectASGIApplication, Endpoint
from google.protobuf import json_format
from google.protobuf.message import Message
from protobuf.wkt import Any as Packed
from starlette.types import Receive, Scope, Send

from patchclamp.standard_messages import CLASSES
from patchclamp_http.connect.methods import Rpc, rpcs
from patchclamp_http.errors import ApiError
from patchclamp_http.http import Call
from patchclamp_http.upstream import PASSED_ON, Upstream

_DETAILS_KEY = "grpc-status-details-bin"
_STREAM_TYPES = {
    (False, False): StreamType.UNARY,
    (False, True): StreamType.SERVER_STREAM,
    (True, False): StreamType.CLIENT_STREAM,
    (True, True): StreamType.BIDI_STREAM,
}
# By the names of gRPC, which spells one of them otherwise.
_CODES = {code.name: code for code in Code} | {"CANCELLED": Code.CANCELED}
_RETRY_INFO = "google.rpc.RetryInfo"


class ConnectApp(ConnectASGIApplication[Upstream]):
    """Serves every RPC under its path."""

    path = ""

    def __init__(self, upstream: Upstream, max_body_bytes: int) -> None:
        super().__init__(
            service=upstream,
            endpoints=lambda service: {rpc.path: _endpoint(service, rpc) for rpc in rpcs()},
            read_max_bytes=max_body_bytes,
            codecs=[google_protobuf_binary_codec(), _JsonCodec()],
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        call = Call(scope, receive, send)
        kind = call.headers.get("content-type", "")
        if kind.startswith("application/grpc"):
            message = f"content-type {kind} belongs to the port of gRPC; here are application/json and connect"
            await call.refuse(ApiError(415, message, code="unsupported_media_type"))
            return
        if not all(value.isascii() for value in call.headers.values()):
            # connectrpc would fail on them, as a fault of its own.
            await call.answer({"code": "invalid_argument", "message": "expected headers in ASCII"}, status=400)
            return
        await super().__call__(scope, receive, send)


class _JsonCodec(Codec[Message, Any]):
    """The JSON of protobuf in one line. A field that is not known is refused: what was meant by it would not happen."""

    def name(self) -> str:
        return "json"

    def encode(self, message: Message) -> bytes:
        return json.dumps(json_format.MessageToDict(message), separators=(",", ":")).encode()

    def decode(self, data: bytes | bytearray, message_class: type[Any]) -> Any:
        # Without a body every field has its default.
        return json_format.Parse(bytes(data) or b"{}", message_class())


def _endpoint(upstream: Upstream, rpc: Rpc) -> Any:
    kind = _STREAM_TYPES[rpc.takes_stream, rpc.gives_stream]
    info: MethodInfo[Any, Any] = MethodInfo(
        name=rpc.name,
        service_name=rpc.service,
        input=rpc.request,
        output=rpc.response,
        idempotency_level=IdempotencyLevel.UNKNOWN,
        stream_type=kind,
    )
    sides = ("stream" if rpc.takes_stream else "unary", "stream" if rpc.gives_stream else "unary")

    def begin(request: Any, context: RequestContext[Any, Any]) -> Any:
        """Begins the call of gRPC."""
        make = getattr(upstream.stubs.channel, "_".join(sides))
        method = make(rpc.path, rpc.request.SerializeToString, rpc.response.FromString)
        return method(request, **_arguments(upstream, context))

    async def one(request: Any, context: RequestContext[Any, Any]) -> Any:
        with _Requests(request, context) as requests:
            call = begin(requests.passed_on, context)
            try:
                return await call
            finally:
                call.cancel()

    async def several(request: Any, context: RequestContext[Any, Any]) -> AsyncIterator[Any]:
        with _Requests(request, context) as requests:
            call = begin(requests.passed_on, context)
            try:
                async for message in call:
                    yield message
            finally:
                call.cancel()

    make_endpoint: Any = getattr(Endpoint, kind.name.lower())
    return make_endpoint(info, several if rpc.gives_stream else one)


class _Requests:
    """What is asked for, one message or a stream of them, while a call of gRPC runs on it. Failures of both are raised
    as Connect has them."""

    def __init__(self, request: Any, context: RequestContext[Any, Any]) -> None:
        self._context = context
        self._failure: Exception | None = None
        self.passed_on = self._messages(request) if isinstance(request, AsyncIterator) else request

    async def _messages(self, received: AsyncIterator[Any]) -> AsyncIterator[Any]:
        try:
            async for message in received:
                yield message
        except Exception as error:
            # gRPC cancels the call of a stream that fails, and tells nobody why.
            self._failure = error
            raise

    def __enter__(self) -> "_Requests":
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if self._failure is not None and isinstance(error, asyncio.CancelledError | grpc.aio.AioRpcError):
            raise self._failure from None
        if isinstance(error, grpc.aio.AioRpcError):
            raise _connect_error(error, self._context) from None


def _arguments(upstream: Upstream, context: RequestContext[Any, Any]) -> dict[str, Any]:
    given = context.request_headers
    headers: Mapping[str, str] = {name: given[name] for name in PASSED_ON if name in given}
    try:
        arguments = upstream.options(headers).arguments()
    except ApiError as error:
        raise ConnectError(Code.INVALID_ARGUMENT, error.message) from None
    if context.timeout_ms is not None:
        arguments["timeout"] = context.timeout_ms / 1000
    return arguments


def _connect_error(error: grpc.aio.AioRpcError, context: RequestContext[Any, Any]) -> ConnectError:
    """Returns the same status with the same details."""
    metadata: Any = error.trailing_metadata()
    encoded = dict(metadata or ()).get(_DETAILS_KEY)
    details = []
    if isinstance(encoded, bytes):
        for packed in CLASSES["google.rpc.Status"].FromString(encoded).details:
            details.append(ErrorDetail(Packed(type_url=packed.type_url, value=packed.value)))
            if packed.type_url.endswith(_RETRY_INFO):
                delay = CLASSES[_RETRY_INFO].FromString(packed.value).retry_delay
                context.response_headers["retry-after"] = str(delay.seconds + (delay.nanos > 0))
    return ConnectError(_CODES[error.code().name], error.details() or "", details)

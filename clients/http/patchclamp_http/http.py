"""Requests and responses of HTTP over ASGI, as far as they are needed here."""

import asyncio
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

import orjson
from starlette.types import Receive, Scope, Send

from patchclamp_http.errors import ApiError, invalid

DEFAULT_MAX_BODY_BYTES = 16 * 1024 * 1024


class Disconnected(Exception):
    """The caller has gone: there is nobody to answer."""


class Call:
    """One request of HTTP and its answer."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.scope = scope
        self.receive = receive
        self._send = send
        # Headers of one name are joined, as HTTP has it.
        self.headers: dict[str, str] = {}
        for name, value in scope["headers"]:
            key, text = name.decode("latin-1").lower(), value.decode("latin-1")
            self.headers[key] = f"{self.headers[key]}, {text}" if key in self.headers else text
        self.has_begun = False

    async def body(self, limit: int) -> bytes:
        parts: list[bytes] = []
        size = 0
        while True:
            message = await self.receive()
            if message["type"] == "http.disconnect":
                raise Disconnected
            part = message.get("body", b"")
            size += len(part)
            if size > limit:
                raise ApiError(413, f"the body has more than {limit} bytes", code="body_too_large")
            parts.append(part)
            if not message.get("more_body", False):
                return b"".join(parts)

    async def json(self, limit: int) -> dict[str, Any]:
        """Returns the body, which must be an object."""
        kind = self.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise ApiError(415, f"expected content-type application/json, got {kind}", code="unsupported_media_type")
        try:
            value = orjson.loads(await self.body(limit))
        except orjson.JSONDecodeError as error:
            raise ApiError(400, f"the body is no JSON: {error}", code="invalid_json") from None
        if not isinstance(value, dict):
            raise invalid("", f"expected a JSON object, got {type(value).__name__}")
        return value

    async def begin(self, status: int, content_type: str, headers: Mapping[str, str] | None = None) -> None:
        fields = {"content-type": content_type, **(headers or {})}
        self.has_begun = True
        encoded = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in fields.items()]
        await self._send({"type": "http.response.start", "status": status, "headers": encoded})

    async def write(self, body: bytes, *, more: bool = True) -> None:
        """Returns when the connection has room for more: a caller who reads slowly is waited for here."""
        await self._send({"type": "http.response.body", "body": body, "more_body": more})

    async def answer(self, value: object, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        await self.answer_bytes(orjson.dumps(value), status=status, headers=headers)

    async def answer_bytes(
        self,
        body: bytes,
        content_type: str = "application/json",
        *,
        status: int = 200,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        await self.begin(status, content_type, {"content-length": str(len(body)), **(headers or {})})
        await self.write(body, more=False)

    async def refuse(self, error: ApiError) -> None:
        await self.answer_bytes(error.body(), status=error.status, headers=error.headers)

    def while_connected(self) -> "_WhileConnected":
        """Cancels the block when the caller goes away, and raises Disconnected then. The body must have been read."""
        return _WhileConnected(self.receive)


class _WhileConnected:
    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._has_left = False

    async def __aenter__(self) -> Self:
        task = asyncio.current_task()
        assert task is not None
        self._task = task
        self._watching = asyncio.create_task(self._watch())
        return self

    async def _watch(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._has_left = True
        self._task.cancel()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._watching.cancel()
        if self._has_left and kind is not None and issubclass(kind, asyncio.CancelledError):
            self._task.uncancel()
            raise Disconnected from error

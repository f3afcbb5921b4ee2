"""The front as an application of ASGI: OpenAI's API, JSON for every RPC, health, and the schema of it all."""

import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route
from starlette.types import Receive, Scope, Send

from patchclamp.connection import Connection
from patchclamp.errors import PatchclampError
from patchclamp_http.connect.app import ConnectApp
from patchclamp_http.connect.methods import rpcs
from patchclamp_http.errors import ApiError, from_grpc
from patchclamp_http.health import Health
from patchclamp_http.http import DEFAULT_MAX_BODY_BYTES, Call, Disconnected
from patchclamp_http.openai.embeddings import Embeddings
from patchclamp_http.openai.generate import Generate
from patchclamp_http.openai.models import Models
from patchclamp_http.openai.tokens import Detokenize, Tokenize
from patchclamp_http.schema.openapi import Schema
from patchclamp_http.upstream import Upstream

logger = logging.getLogger(__name__)
Handler = Callable[[Call], Awaitable[None]]


def create_app(
    connection: Connection, *, max_body_bytes: int = DEFAULT_MAX_BODY_BYTES, allow_origins: Sequence[str] = ()
) -> Starlette:
    """Returns the application. `allow_origins`: whose pages may call it, besides its own.

    Raises ValueError where the tokens of callers would travel in clear to another host.
    """
    upstream = Upstream(connection)
    models = Models(upstream)
    connect = ConnectApp(upstream, max_body_bytes)
    routes: list[BaseRoute] = [
        _route("POST", "/v1/completions", Generate(upstream, max_body_bytes, is_chat=False)),
        _route("POST", "/v1/chat/completions", Generate(upstream, max_body_bytes, is_chat=True)),
        _route("POST", "/v1/embeddings", Embeddings(upstream, max_body_bytes)),
        _route("GET", "/v1/models", models),
        _route("GET", "/v1/models/{name:path}", models.one),
        _route("POST", "/tokenize", Tokenize(upstream, max_body_bytes)),
        _route("POST", "/detokenize", Detokenize(upstream, max_body_bytes)),
        _route("GET", "/health", Health(upstream)),
        _route("GET", "/openapi.json", Schema()),
        *(Route(rpc.path, connect, methods=["POST"]) for rpc in rpcs()),
    ]
    origins = [Middleware(CORSMiddleware, allow_origins=list(allow_origins), allow_methods=["*"], allow_headers=["*"])]

    @asynccontextmanager
    async def closing(app: Starlette) -> AsyncIterator[None]:
        yield
        await upstream.close()

    return Starlette(
        routes=routes,
        middleware=origins if allow_origins else [],
        exception_handlers={HTTPException: _no_route},
        lifespan=closing,
    )


class _Endpoint:
    """Answers one route; every failure is answered in the form that callers read."""

    def __init__(self, handler: Handler) -> None:
        self._handler = handler

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        call = Call(scope, receive, send)
        try:
            await self._handler(call)
        except ApiError as error:
            await call.refuse(error)
        except PatchclampError as error:
            await call.refuse(from_grpc(error, {}))
        except Disconnected:
            return
        except Exception:
            logger.exception("%s %s failed", scope["method"], scope["path"])
            if call.has_begun:
                raise
            message = "internal error; the log of the front has the details"
            await call.refuse(ApiError(500, message, "server_error", code="internal"))


def _route(method: str, path: str, handler: Handler) -> Route:
    return Route(path, _Endpoint(handler), methods=[method])


async def _no_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    told = {404: "nothing is here", 405: f"{request.method} is not served here"}.get(error.status_code, error.detail)
    body = ApiError(error.status_code, f"{request.url.path}: {told}", code="no_such_route").body()
    return Response(body, error.status_code, error.headers, media_type="application/json")

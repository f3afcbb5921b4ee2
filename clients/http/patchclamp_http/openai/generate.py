"""POST /v1/completions and /v1/chat/completions."""

import secrets
import time
from collections.abc import Callable, Mapping
from typing import Any

import orjson

from patchclamp.errors import PatchclampError
from patchclamp.v1 import generation_pb2 as pb
from patchclamp_http.errors import from_grpc
from patchclamp_http.http import Call
from patchclamp_http.openai import requests
from patchclamp_http.openai.choices import Pieces, Usage, Whole
from patchclamp_http.openai.echo import echoes
from patchclamp_http.openai.requests import Asked
from patchclamp_http.openai.samples import responses
from patchclamp_http.upstream import Options, Upstream

EVENT_STREAM = "text/event-stream; charset=utf-8"
STREAM_HEADERS = {"cache-control": "no-store", "x-accel-buffering": "no"}
DONE = b"data: [DONE]\n\n"


class Generate:
    """Answers both: they differ in what is read, and in how choices look."""

    def __init__(self, upstream: Upstream, max_body_bytes: int, *, is_chat: bool) -> None:
        self._upstream = upstream
        self._max_body_bytes = max_body_bytes
        self._read: Callable[[Mapping[str, Any]], Asked] = requests.chat if is_chat else requests.completion
        self._prefix = "chatcmpl" if is_chat else "cmpl"
        self._object = "chat.completion" if is_chat else "text_completion"
        self._chunk_object = "chat.completion.chunk" if is_chat else "text_completion"

    async def __call__(self, call: Call) -> None:
        body = await call.json(self._max_body_bytes)
        asked = self._read(body)
        options = self._upstream.options(call.headers)
        async with call.while_connected():
            try:
                await self._answer(call, asked, options)
            except PatchclampError as error:
                refusal = from_grpc(error, asked.names)
                if not call.has_begun:
                    raise refusal from None
                # The status of HTTP has been sent: the error is an event too.
                await call.write(b"data: " + refusal.body() + b"\n\n", more=False)

    async def _answer(self, call: Call, asked: Asked, options: Options) -> None:
        head = {
            "id": f"{self._prefix}-{secrets.token_hex(12)}",
            "object": self._chunk_object if asked.stream else self._object,
            "created": int(time.time()),
            "model": asked.requests[0].model or await self._upstream.model_name(options),
        }
        echoed = await echoes(self._upstream, asked, options)
        if asked.stream:
            await self._stream(call, asked, options, head, echoed)
        else:
            await self._whole(call, asked, options, head, echoed)

    async def _whole(self, call: Call, asked: Asked, options: Options, head: dict[str, Any], echoed: list[str]) -> None:
        usage = Usage()
        wholes = [Whole(asked, index, echo) for index, echo in enumerate(echoed)]
        async for index, response in responses(self._upstream, asked, options):
            _finish(asked, index, response, usage)
            wholes[index].add(response)
        await call.answer({**head, "choices": [whole.choice() for whole in wholes], "usage": usage.json()})

    async def _stream(
        self, call: Call, asked: Asked, options: Options, head: dict[str, Any], echoed: list[str]
    ) -> None:
        usage = Usage()
        if asked.include_usage:
            head = {**head, "usage": None}
        pieces = [Pieces(asked, index, echo) for index, echo in enumerate(echoed)]
        begun: set[int] = set()
        async for index, response in responses(self._upstream, asked, options):
            _finish(asked, index, response, usage)
            chunks = []
            if index not in begun:
                begun.add(index)
                if not call.has_begun:
                    await call.begin(200, EVENT_STREAM, STREAM_HEADERS)
                if asked.is_chat:
                    chunks.append(pieces[index].first())
            piece = pieces[index].piece(response)
            if piece is not None:
                chunks.append(piece)
            if chunks:
                await call.write(b"".join([_event({**head, "choices": [chunk]}) for chunk in chunks]))
        last = DONE
        if asked.include_usage:
            last = _event({**head, "choices": [], "usage": usage.json()}) + DONE
        await call.write(last, more=False)


def _event(value: object) -> bytes:
    return b"data: " + orjson.dumps(value) + b"\n\n"


def _finish(asked: Asked, index: int, response: pb.GenerateResponse, usage: Usage) -> None:
    if response.HasField("finished"):
        usage.add(response.finished.usage, is_first=index % asked.samples == 0)

"""A web service that streams a steered generation as server-sent events.

    pip install fastapi uvicorn
    PATCHCLAMP_ADDRESS=localhost:50051 uvicorn --app-dir examples fastapi_sse:app
    curl -N 'http://localhost:8000/generate?prompt=My+day+was&vector=joyful_sad&layer=12&strength=2'

Events: `text` with a piece of the answer, then one `receipt`; or `error`, with code and fields as the server gave them.
Every datum is JSON. A browser that goes away cancels the generation.
"""

import json
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse

from patchclamp import AsyncClient, PatchclampError
from patchclamp.programs import add


@asynccontextmanager
async def one_client(app: FastAPI) -> AsyncIterator[None]:
    """One channel for all requests: gRPC runs many calls on it at once."""
    async with AsyncClient(os.environ.get("PATCHCLAMP_ADDRESS", "localhost:50051")) as client:
        app.state.client = client
        yield


app = FastAPI(title="Steered answers", lifespan=one_client)


@app.get("/generate")
async def generate(
    request: Request, prompt: str, vector: str, layer: int, strength: float = 1.0, max_tokens: int = 64
) -> StreamingResponse:
    program = add(vector, layers=layer, strength=strength, name=vector)

    async def events() -> AsyncIterator[str]:
        try:
            # Where the caller goes away, this generator is cancelled, and leaving the block cancels the call.
            async with request.app.state.client.generate(prompt, program=program, max_tokens=max_tokens) as stream:
                async for text in stream.text:
                    yield event("text", text)
                result = await stream.result()
            yield event("receipt", result.receipt.to_dict())
        except PatchclampError as error:
            # The status of HTTP has been sent with the first event: an error is an event too.
            yield event("error", error.to_dict())

    return StreamingResponse(events(), media_type="text/event-stream", headers={"Cache-Control": "no-store"})


def event(kind: str, data: object) -> str:
    # JSON has no line ends of its own, which would end the field `data`.
    return f"event: {kind}\ndata: {json.dumps(data)}\n\n"

"""The calls of Generate behind one request of OpenAI's API, and their responses as they come."""

import asyncio
from collections.abc import AsyncIterator

from patchclamp.v1 import generation_pb2 as pb
from patchclamp_http.openai.requests import Asked
from patchclamp_http.upstream import Options, Upstream, messages

# Responses of one call that may wait for the caller to read; beyond, gRPC holds them back, and the engine the sequence.
WAITING_RESPONSES = 4


async def responses(
    upstream: Upstream, asked: Asked, options: Options
) -> AsyncIterator[tuple[int, pb.GenerateResponse]]:
    """Yields each response with the index of its choice. Raises PatchclampError of the first call that fails, and
    cancels the others."""
    calls = []
    for request in asked.requests:
        request.samples = asked.samples
        calls.append(upstream.stubs.generation.Generate(request, **options.arguments()))
    if len(calls) == 1:
        async for response in messages(calls[0]):
            yield response.sample, response
        return
    queue: asyncio.Queue[tuple[int, pb.GenerateResponse] | None] = asyncio.Queue(WAITING_RESPONSES * len(calls))

    async def read(index: int) -> None:
        async for response in messages(calls[index]):
            await queue.put((index * asked.samples + response.sample, response))
        await queue.put(None)

    readers = [asyncio.create_task(read(index)) for index in range(len(calls))]
    failed = asyncio.create_task(_failure(readers))
    try:
        left = len(calls)
        while left:
            taking = asyncio.create_task(queue.get())
            await asyncio.wait((taking, failed), return_when=asyncio.FIRST_COMPLETED)
            if not taking.done():
                taking.cancel()
                failed.result()
                continue
            item = taking.result()
            if item is None:
                left -= 1
            else:
                yield item
    finally:
        failed.cancel()
        for reader in readers:
            reader.cancel()
        await asyncio.gather(failed, *readers, return_exceptions=True)


async def _failure(readers: "list[asyncio.Task[None]]") -> None:
    """Raises the first failure of a reader, and never returns otherwise."""
    await asyncio.gather(*readers)
    await asyncio.Event().wait()

"""Calls that a full server refuses, sent again when it says so."""

import asyncio
import random
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from threading import Event
from typing import Generic

import grpc

from patchclamp.async_streams import AsyncCall
from patchclamp.collectors import MessageT
from patchclamp.errors import PatchclampError
from patchclamp.streams import Call


@dataclass(frozen=True)
class Retry:
    """What is refused with RESOURCE_EXHAUSTED and a time to retry after is sent again after that time.

        wait = retry_after · U(1, 1 + jitter)

    seconds: no attempt begins later than this after the first, nor after the timeout of the call, which holds for all
    attempts together. jitter: how far clients that were refused together are spread. A stream is sent again only before
    its first message; a session never.
    """

    seconds: float = 60.0
    jitter: float = 0.5

    def __post_init__(self) -> None:
        if self.seconds < 0 or self.jitter < 0:
            raise ValueError(f"expected seconds and jitter of at least 0, got {self.seconds} and {self.jitter}")


# Every call once.
NEVER = Retry(seconds=0.0)


class Attempts:
    """Of one call with a deadline of `seconds` from now, or none."""

    def __init__(self, retry: Retry, seconds: float | None) -> None:
        self._retry = retry
        now = time.monotonic()
        self._deadline = None if seconds is None else now + seconds
        self._last = now + retry.seconds

    def seconds_left(self) -> float | None:
        return None if self._deadline is None else max(0.0, self._deadline - time.monotonic())

    def delay(self, error: grpc.RpcError) -> float | None:
        """Seconds until the next attempt; None when there is none."""
        refusal = PatchclampError.from_rpc(error)
        if refusal.code != "RESOURCE_EXHAUSTED" or refusal.retry_after is None:
            return None
        delay = refusal.retry_after * random.uniform(1.0, 1.0 + self._retry.jitter)
        begin = time.monotonic() + delay
        return None if begin > self._last or (self._deadline is not None and begin >= self._deadline) else delay


class RepeatedCall(Generic[MessageT]):
    """A call that streams, begun again by `begin` (with the seconds it has left) until its first message has come."""

    def __init__(self, begin: Callable[[float | None], Call[MessageT]], attempts: Attempts) -> None:
        self._begin = begin
        self._attempts = attempts
        self._cancelled = Event()
        self._call = begin(attempts.seconds_left())

    def __iter__(self) -> Iterator[MessageT]:
        while True:
            messages = iter(self._call)
            try:
                first = next(messages)
            except StopIteration:
                return
            except grpc.RpcError as error:
                delay = self._attempts.delay(error)
                if delay is None or self._cancelled.wait(delay):
                    raise
                self._call = self._begin(self._attempts.seconds_left())
                if self._cancelled.is_set():
                    self._call.cancel()
                continue
            yield first
            yield from messages
            return

    def cancel(self) -> object:
        self._cancelled.set()
        return self._call.cancel()

    def add_callback(self, callback: Callable[[], None]) -> bool:
        return self._call.add_callback(callback)


class AsyncRepeatedCall(Generic[MessageT]):
    """As RepeatedCall, in an event loop."""

    def __init__(self, begin: Callable[[float | None], AsyncCall[MessageT]], attempts: Attempts) -> None:
        self._begin = begin
        self._attempts = attempts
        self._cancelled = asyncio.Event()
        self._call = begin(attempts.seconds_left())

    async def __aiter__(self) -> AsyncIterator[MessageT]:
        while True:
            messages = aiter(self._call)
            try:
                first = await anext(messages)
            except StopAsyncIteration:
                return
            except grpc.aio.AioRpcError as error:
                delay = self._attempts.delay(error)
                if delay is None or await self._is_cancelled_within(delay):
                    raise
                self._call = self._begin(self._attempts.seconds_left())
                continue
            yield first
            async for message in messages:
                yield message
            return

    def cancel(self) -> bool:
        self._cancelled.set()
        return self._call.cancel()

    async def _is_cancelled_within(self, seconds: float) -> bool:
        try:
            await asyncio.wait_for(self._cancelled.wait(), seconds)
        except TimeoutError:
            return False
        return True

"""Uploads are bounded in how large they are, how many bytes arrive at once, and how slowly.

An upload takes the bytes that it announces when it begins, and gives them back when it has been stored, refused or
abandoned. They are bytes of temporary files, and then of tensors that are checked; a client that announces much has to
send it too, and is refused once it is behind. Kinds that are never whole in memory take bytes of disk alone, which
are counted apart.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TypeVar

from patchclamp_server.errors import DeadlineExceeded, ResourceExhausted

M = TypeVar("M")
MIN_RETRY_SECONDS, MAX_RETRY_SECONDS = 0.1, 60.0
# The last upload counts so much in the time that uploads are known to take.
LAST_WEIGHT = 0.3


@dataclass(frozen=True)
class UploadLimits:
    """`idle_seconds` is the longest wait for the next chunk, and how far a file may be behind what `bytes_per_second`
    would have brought."""

    max_bytes: int = 256 * 1024 * 1024
    max_concurrent_bytes: int = 1024 * 1024 * 1024
    idle_seconds: float = 30.0
    bytes_per_second: float = 64 * 1024
    # Of kinds that are never whole in memory: one of them, and all that arrive at once.
    max_row_bytes: int = 64 * 1024 * 1024 * 1024

    @property
    def largest(self) -> int:
        return min(self.max_bytes, self.max_concurrent_bytes)

    def of_rows(self) -> "UploadLimits":
        """Returns the limits of kinds that are never whole in memory."""
        return replace(self, max_bytes=self.max_row_bytes, max_concurrent_bytes=self.max_row_bytes)


class UploadSpace:
    """The bytes of the uploads of one server, for one event loop."""

    def __init__(self, limits: UploadLimits) -> None:
        self.limits = limits
        self.bytes = 0
        # This is the time that uploads have taken lately.
        self._seconds = 1.0

    @contextmanager
    def taken(self, size: int) -> Iterator[None]:
        """Takes room for one upload. Raises ResourceExhausted when there is none now."""
        if self.bytes + size > self.limits.max_concurrent_bytes:
            message = f"{self.bytes} bytes are arriving, {self.limits.max_concurrent_bytes} may at once"
            raise ResourceExhausted("header.size_bytes", message, self._retry_after())
        self.bytes += size
        started = time.monotonic()
        try:
            yield
        finally:
            self.bytes -= size
            self._seconds += LAST_WEIGHT * (time.monotonic() - started - self._seconds)

    async def in_time(self, messages: AsyncIterator[M], size_of: Callable[[M], int]) -> AsyncIterator[M]:
        """Yields the messages while they come fast enough, by the bytes of each. Raises DeadlineExceeded when they do
        not: bytes that nobody sends would keep others out."""
        limits, received = self.limits, 0
        started = last = time.monotonic()
        while True:
            due = started + received / limits.bytes_per_second
            try:
                async with asyncio.timeout(max(0.0, min(due, last) + limits.idle_seconds - time.monotonic())):
                    message = await anext(messages, None)
            except TimeoutError:
                why = f"nothing came for {limits.idle_seconds:g} s"
                if due < last:
                    took = time.monotonic() - started
                    why = f"{received} bytes in {took:.0f} s; expected {limits.bytes_per_second:g} in a second"
                raise DeadlineExceeded("chunk", why) from None
            if message is None:
                return
            received += size_of(message)
            yield message
            last = time.monotonic()

    def _retry_after(self) -> float:
        """Returns the seconds after which an upload that has just begun is over, if it is like those before."""
        return min(max(self._seconds, MIN_RETRY_SECONDS), MAX_RETRY_SECONDS)

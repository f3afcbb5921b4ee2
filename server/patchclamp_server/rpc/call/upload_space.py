"""Uploads are bounded in how large they are, how many bytes arrive at once, and how slowly.

An upload takes the bytes that it announces when it begins, and gives them back when it has been stored, refused or
abandoned. They are bytes of temporary files, and then of tensors that are checked; a client that announces much and
sends little holds them for at most `seconds_for`. Kinds that are never whole in memory take bytes of disk alone, which
are counted apart.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
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
    """`idle_seconds` is the longest wait for the next chunk. A whole file may take that long besides what it takes at
    `bytes_per_second`."""

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

    def seconds_for(self, size: int) -> float:
        return self.idle_seconds + size / self.bytes_per_second


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

    async def in_time(self, messages: AsyncIterator[M], size: int) -> AsyncIterator[M]:
        """Yields the messages while they come fast enough. Raises DeadlineExceeded when they do not."""
        limits = self.limits
        end = time.monotonic() + limits.seconds_for(size)
        while True:
            left = end - time.monotonic()
            try:
                async with asyncio.timeout(max(0.0, min(left, limits.idle_seconds))):
                    message = await anext(messages, None)
            except TimeoutError:
                if left < limits.idle_seconds:
                    why = f"{size} bytes have not come in {limits.seconds_for(size):.0f} s"
                else:
                    why = f"nothing came for {limits.idle_seconds:g} s"
                raise DeadlineExceeded("chunk", why) from None
            if message is None:
                return
            yield message

    def _retry_after(self) -> float:
        """Returns the seconds after which an upload that has just begun is over, if it is like those before."""
        return min(max(self._seconds, MIN_RETRY_SECONDS), MAX_RETRY_SECONDS)

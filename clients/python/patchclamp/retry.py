"""Calls that are sent again: those that a full server refuses when it says so, and those that found no server.

gRPC could repeat the latter itself, but a stream of its synchronous API that it repeats while the server leaves never
ends, whatever its deadline (seen with grpcio 1.85). So it repeats nothing, and all attempts are made here.
"""

import math
import random
import time
from dataclasses import dataclass

import grpc

from patchclamp.errors import PatchclampError

# How long a call that finds no server is sent again: until the server has been left for another, or is found again.
UNAVAILABLE_SECONDS = 5.0
FIRST_WAIT_SECONDS, LONGEST_WAIT_SECONDS = 0.1, 1.0
# Code and message of calls that ended without a status of the server. A stream that it resets without a word, as it
# does in the moment in which it closes its port, is the first; our own cancellation has other words. The second is a
# session of the asyncio API that was refused while it still wrote.
WITHOUT_STATUS = frozenset({("CANCELLED", "CANCELLED"), ("INTERNAL", "Internal error from Core")})


@dataclass(frozen=True)
class Retry:
    """Says how often and how long a call is sent again.

    What is refused with RESOURCE_EXHAUSTED and a time to retry after is sent again after that time, which doubles:

        n-th wait = min(retry_after · 2ⁿ⁻¹, max(retry_after, half of the time that is left)) · U(1, 1 + jitter)

    seconds: no attempt begins later than this after the first, nor after the timeout of the call, which holds for all
    attempts together. jitter: how far clients that were refused together are spread. A stream, and a session with all
    that it has sent, is sent again only before its first message.

    What is UNAVAILABLE is sent again in the same way, without being asked to and for 5 seconds at least, after
    min(0.1 · 2ⁿ⁻¹, 1) · U(1, 1 + jitter) seconds: more `seconds` span the restart of a server that is the only one.
    """

    seconds: float = 60.0
    jitter: float = 0.5

    def __post_init__(self) -> None:
        if self.seconds < 0 or self.jitter < 0:
            raise ValueError(f"expected seconds and jitter of at least 0, got {self.seconds} and {self.jitter}")


# What a full server refuses is refused.
NEVER = Retry(seconds=0.0)


class Attempts:
    """Counts the attempts of one call, which has a deadline of `seconds` from now, or none."""

    def __init__(self, retry: Retry, seconds: float | None) -> None:
        self._retry = retry
        self._began = time.monotonic()
        self._deadline = math.inf if seconds is None else self._began + seconds
        self._made = 0

    def seconds_left(self) -> float | None:
        return None if math.isinf(self._deadline) else max(0.0, self._deadline - time.monotonic())

    def delay(self, error: grpc.RpcError) -> float | None:
        """Returns the seconds until the next attempt; None when there is none."""
        refusal = PatchclampError.from_rpc(error)
        growth = 2.0 ** min(self._made, 30)
        self._made += 1
        if refusal.code == "UNAVAILABLE" or (refusal.code, refusal.message) in WITHOUT_STATUS:
            lasting = max(self._retry.seconds, UNAVAILABLE_SECONDS)
            least, wait = 0.0, min(FIRST_WAIT_SECONDS * growth, LONGEST_WAIT_SECONDS)
        elif refusal.code == "RESOURCE_EXHAUSTED" and refusal.retry_after is not None:
            lasting = self._retry.seconds
            least, wait = refusal.retry_after, refusal.retry_after * growth
        else:
            return None
        left = min(self._began + lasting, self._deadline) - time.monotonic()
        # The last attempts come closer together: a wait that only grew would leave a part of the time unused.
        delay = min(wait, max(least, left / 2)) * random.uniform(1.0, 1.0 + self._retry.jitter)
        return delay if delay < left else None

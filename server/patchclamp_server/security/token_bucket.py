"""Tokens per minute are limited by a bucket that fills at a steady rate and whose balance may become negative.

What a call will cost is known only when it has ended. So a call may begin while the bucket is not empty, is charged as
it goes, and owes what it takes beyond: nobody begins again before the rate has paid it.
"""

import threading
import time


class TokenBucket:
    """The bucket is full at first: it holds what a minute brings. It may be used from any thread."""

    def __init__(self, per_minute: int) -> None:
        self._lock = threading.Lock()
        self.per_minute = per_minute
        self._balance = float(per_minute)
        self._at = time.monotonic()

    def charge(self, tokens: int) -> None:
        with self._lock:
            self._fill()
            self._balance -= tokens

    def seconds_until_ready(self) -> float:
        """Returns 0 while there is at least one token, else the seconds until there is one."""
        with self._lock:
            self._fill()
            return max(0.0, (1.0 - self._balance) * 60 / self.per_minute)

    def _fill(self) -> None:
        now = time.monotonic()
        self._balance = min(self._balance + (now - self._at) * self.per_minute / 60, float(self.per_minute))
        self._at = now

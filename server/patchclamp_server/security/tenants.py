"""The tenants of a running server: their rules, their buckets, their calls. They belong to the event loop.

Calls beyond a tenant's `max_concurrent` wait in a queue of its own, first come, first served, as long as their
deadlines let them. The queue is bounded too. A call that finds it full is told when half of it will be gone, by the
measured length L of calls and the w that wait:

    retry_after = w / 2 · L / max_concurrent
"""

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

from patchclamp_server.engine.admission import MAX_RETRY_SECONDS, MIN_RETRY_SECONDS, UNMEASURED_RETRY_SECONDS, Ratio
from patchclamp_server.errors import PermissionDenied, QuotaExceeded
from patchclamp_server.security.metrics import OTHER_TENANT
from patchclamp_server.security.policy import Policy, TenantRules
from patchclamp_server.security.running_call import RunningCall
from patchclamp_server.security.token_bucket import TokenBucket

# So many calls may take no place for each place that there is; all together they use up what the server can answer.
BESIDE_PER_PLACE = 16


class Tenant:
    """`rules` changes when the policy does, so ask for it anew each time, also within a call."""

    def __init__(self, name: str, rules: TenantRules) -> None:
        self.name = name
        self.bucket: TokenBucket | None = None
        self.running: set[RunningCall] = set()
        # Calls wait in the order in which they came.
        self.waiting: dict[RunningCall, asyncio.Future[None]] = {}
        self._beside = 0
        self._seconds = Ratio()
        self.apply(rules)

    def apply(self, rules: TenantRules) -> None:
        self.rules = rules
        if rules.tokens_per_minute is None:
            self.bucket = None
        elif self.bucket is None:
            self.bucket = TokenBucket(rules.tokens_per_minute)
        else:
            # A new rate keeps the tokens that are owed.
            self.bucket.per_minute = rules.tokens_per_minute
        self._let_in()

    @asynccontextmanager
    async def call(self, call: RunningCall) -> AsyncIterator[None]:
        """Waits for a place. Raises QuotaExceeded when as many calls wait as may."""
        place = asyncio.get_running_loop().create_future()
        began: float | None = None
        try:
            if self._has_place() and not self.waiting:
                self.running.add(call)
            else:
                self._check_line()
                self.waiting[call] = place
                await place
            began = time.monotonic()
            yield
        finally:
            if began is not None:
                self._seconds.add(time.monotonic() - began, 1)
            self.waiting.pop(call, None)
            self.running.discard(call)
            self._let_in()

    @contextmanager
    def beside(self) -> Iterator[None]:
        """Holds a call that takes no place. Raises QuotaExceeded when there are as many such calls as may be."""
        limit = self.rules.max_concurrent
        if limit is not None and self._beside >= BESIDE_PER_PLACE * limit:
            message = f"tenant {self.name!r} starts, follows or asks for jobs in {self._beside} calls, as many as may"
            raise QuotaExceeded("", message).after(UNMEASURED_RETRY_SECONDS)
        self._beside += 1
        try:
            yield
        finally:
            self._beside -= 1

    def kill(self) -> None:
        """Ends the tenant's calls, those that wait too."""
        for call in (*self.running, *self.waiting):
            call.kill()

    def _has_place(self) -> bool:
        limit = self.rules.max_concurrent
        return limit is None or len(self.running) < limit

    def _check_line(self) -> None:
        limit, line = self.rules.max_concurrent, self.rules.line
        if limit is None or len(self.waiting) < line:
            return
        message = (
            f"{len(self.running)} calls of tenant {self.name!r} run and {len(self.waiting)} wait; "
            f"its max_concurrent is {limit}, its max_waiting {line}"
        )
        seconds = self._seconds.value()
        if seconds is None:
            raise QuotaExceeded("", message).after(UNMEASURED_RETRY_SECONDS)
        half = max(line, 1) / 2 * seconds / limit
        raise QuotaExceeded("", message).after(min(max(half, MIN_RETRY_SECONDS), MAX_RETRY_SECONDS))

    def _let_in(self) -> None:
        """Starts the calls that have waited longest, as far as there are places."""
        while self.waiting and self._has_place():
            call = next(iter(self.waiting))
            place = self.waiting.pop(call)
            # A call whose client has left meanwhile leaves by itself.
            if not place.done():
                self.running.add(call)
                place.set_result(None)


class Tenants:
    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._tenants: dict[str, Tenant] = {}

    def get(self, name: str) -> Tenant:
        """Returns a tenant. Raises PermissionDenied for one that the policy refuses, or whose calls it has stopped."""
        rules = self._rules(name)
        if rules is None:
            raise PermissionDenied("", f"tenant {name!r} is not in the policy of this server", "TENANT_UNKNOWN")
        if self._policy.kill or rules.kill:
            raise killed()
        if name not in self._tenants:
            self._tenants[name] = Tenant(name, rules)
        return self._tenants[name]

    def label(self, name: str) -> str:
        """Returns the label for metrics: a name from the policy file, or one that stands for all others."""
        return name if name in self._policy.tenants else OTHER_TENANT

    def is_listed(self, name: str) -> bool:
        return name in self._policy.tenants

    def apply(self, policy: Policy) -> None:
        """Sets new rules for all, running calls included; ends the calls of tenants that are killed or not listed."""
        self._policy = policy
        for name, tenant in list(self._tenants.items()):
            rules = self._rules(name)
            if rules is not None:
                tenant.apply(rules)
            else:
                del self._tenants[name]
            if rules is None or policy.kill or rules.kill:
                tenant.kill()

    def _rules(self, name: str) -> TenantRules | None:
        return self._policy.tenants.get(name, self._policy.default)


def killed() -> PermissionDenied:
    return PermissionDenied("", "the calls of this tenant have been stopped by the operator", "KILLED")

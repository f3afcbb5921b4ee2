"""The tenants of a server while it runs: their rules, their buckets, their calls. Belongs to the event loop."""

from collections.abc import Iterator
from contextlib import contextmanager

from patchclamp_server.errors import PermissionDenied, QuotaExceeded
from patchclamp_server.security.metrics import OTHER_TENANT
from patchclamp_server.security.policy import Policy, TenantRules
from patchclamp_server.security.running_call import RunningCall
from patchclamp_server.security.token_bucket import TokenBucket

# When a call of the tenant ends is not known; a client that waits so long finds room in most cases.
RETRY_CONCURRENT_SECONDS = 1.0


class Tenant:
    """`rules` changes when the policy does: always ask for it, also within a call."""

    def __init__(self, name: str, rules: TenantRules) -> None:
        self.name = name
        self.bucket: TokenBucket | None = None
        self.running: set[RunningCall] = set()
        self.apply(rules)

    def apply(self, rules: TenantRules) -> None:
        self.rules = rules
        if rules.tokens_per_minute is None:
            self.bucket = None
        elif self.bucket is None:
            self.bucket = TokenBucket(rules.tokens_per_minute)
        else:
            # What is owed stays owed.
            self.bucket.per_minute = rules.tokens_per_minute

    @contextmanager
    def call(self, running: RunningCall) -> Iterator[None]:
        """Raises QuotaExceeded when as many run as may."""
        limit = self.rules.max_concurrent
        if limit is not None and len(self.running) >= limit:
            message = f"{len(self.running)} calls of tenant {self.name!r} run; its max_concurrent is {limit}"
            raise QuotaExceeded("", message).after(RETRY_CONCURRENT_SECONDS)
        self.running.add(running)
        try:
            yield
        finally:
            self.running.remove(running)


class Tenants:
    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._tenants: dict[str, Tenant] = {}

    def get(self, name: str) -> Tenant:
        """Raises PermissionDenied for a tenant that the policy refuses, or whose calls it has stopped."""
        rules = self._rules(name)
        if rules is None:
            raise PermissionDenied("", f"tenant {name!r} is not in the policy of this server", "TENANT_UNKNOWN")
        if self._policy.kill or rules.kill:
            raise killed()
        if name not in self._tenants:
            self._tenants[name] = Tenant(name, rules)
        return self._tenants[name]

    def label(self, name: str) -> str:
        """For metrics: a name from the policy file, or that of all others."""
        return name if name in self._policy.tenants else OTHER_TENANT

    def is_listed(self, name: str) -> bool:
        return name in self._policy.tenants

    def apply(self, policy: Policy) -> None:
        """New rules for all, running calls included; ends the calls of tenants that are killed or no longer there."""
        self._policy = policy
        for name, tenant in list(self._tenants.items()):
            rules = self._rules(name)
            if rules is not None:
                tenant.apply(rules)
            else:
                del self._tenants[name]
            if rules is None or policy.kill or rules.kill:
                for call in tenant.running:
                    call.kill()

    def _rules(self, name: str) -> TenantRules | None:
        return self._policy.tenants.get(name, self._policy.default)


def killed() -> PermissionDenied:
    return PermissionDenied("", "the calls of this tenant have been stopped by the operator", "KILLED")

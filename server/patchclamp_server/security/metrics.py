"""Prometheus metrics of security. Labels are from closed sets: tenants are those that the policy file lists."""

from prometheus_client import CollectorRegistry, Counter

OTHER_TENANT = "other"
FILES = ("tls", "tokens", "policy")
# These are the reasons that Unauthenticated gives.
REASONS = ("TOKEN_MISSING", "TOKEN_MALFORMED", "TOKEN_UNKNOWN", "TOKEN_EXPIRED", "CERTIFICATE_NAMELESS")


class SecurityMetrics:
    def __init__(self, registry: CollectorRegistry) -> None:
        self.auth_failures = Counter(
            "patchclamp_auth_failures_total", "Calls refused as UNAUTHENTICATED.", ("reason",), registry=registry
        )
        for reason in REASONS:
            self.auth_failures.labels(reason)
        self.tenant_requests = Counter(
            "patchclamp_tenant_requests_total",
            "Calls answered, by tenant of the policy file.",
            ("tenant", "code"),
            registry=registry,
        )
        self.config_reloads = Counter(
            "patchclamp_config_reloads_total",
            "Readings of a changed file: ok, or failed, which keeps what was read before.",
            ("file", "outcome"),
            registry=registry,
        )
        for file in FILES:
            for outcome in ("ok", "failed"):
                self.config_reloads.labels(file, outcome)
        self.audit_lost = Counter(
            "patchclamp_audit_lines_lost_total", "Lines of the audit log that could not be written.", registry=registry
        )

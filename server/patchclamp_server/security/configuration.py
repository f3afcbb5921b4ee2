"""What an operator chooses of security, and what is wrong with a file of it."""

from dataclasses import dataclass


class ConfigurationError(Exception):
    """A file that cannot be used; the message names the file, the place in it, and what would be accepted."""


@dataclass(frozen=True, kw_only=True)
class SecurityConfig:
    """Paths of files; see docs/security.md. What has none is not in use."""

    tls_certificate: str | None = None
    tls_key: str | None = None
    tls_client_ca: str | None = None
    tokens: str | None = None
    policy: str | None = None
    audit_log: str | None = None
    # Record the text of prompts too.
    audit_prompts: bool = False
    # Serve /metrics with the certificate of the gRPC port.
    metrics_tls: bool = False
    # How often the files above are looked at.
    reload_seconds: float = 1.0

"""Here is what an operator may configure of security, and the error for a file that cannot be used."""

from dataclasses import dataclass


class ConfigurationError(Exception):
    """A file that cannot be used; the message names the file, the place in it, and what would be accepted."""


@dataclass(frozen=True, kw_only=True)
class SecurityConfig:
    """These are paths of files; see docs/security.md. A part without a file is not in use."""

    tls_certificate: str | None = None
    tls_key: str | None = None
    tls_client_ca: str | None = None
    tokens: str | None = None
    policy: str | None = None
    audit_log: str | None = None
    # Whether the audit log records the text of prompts too.
    audit_prompts: bool = False
    # Whether /metrics is served with the certificate of the gRPC port.
    metrics_tls: bool = False
    # How often the files above are checked for changes.
    reload_seconds: float = 1.0

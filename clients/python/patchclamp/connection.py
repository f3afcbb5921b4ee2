"""How to reach a server: address, TLS, token, deadlines, retries. Shared by both clients."""

import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import grpc

from patchclamp.standard_messages import CLASSES

DEFAULT_ADDRESS = "localhost:50051"
DEFAULT_TIMEOUT_SECONDS = 300.0

# gRPC itself repeats a call while it is UNAVAILABLE, and a stream only before its first message.
_SERVICE_CONFIG = {
    "methodConfig": [
        {
            "name": [{}],
            "retryPolicy": {
                "maxAttempts": 5,
                "initialBackoff": "0.1s",
                "maxBackoff": "2s",
                "backoffMultiplier": 3,
                "retryableStatusCodes": ["UNAVAILABLE"],
            },
        }
    ]
}

HEALTH_METHOD = "/grpc.health.v1.Health/Check"
HealthRequest = CLASSES["grpc.health.v1.HealthCheckRequest"]
HealthResponse = CLASSES["grpc.health.v1.HealthCheckResponse"]
_HEALTH = {0: "unknown", 1: "serving", 2: "not_serving", 3: "service_unknown"}


@dataclass(frozen=True)
class Connection:
    """tls: True for the system's roots, or a PEM file of roots. timeout: seconds for each call, None: no deadline.
    certificate, key: PEM files, for a server that asks clients for a certificate (mTLS).
    token_in_clear: send the token without TLS to a host that is not this one, where others may read it on its way.

    Raises ValueError for a token that would travel in clear, and for a certificate without key or TLS.
    """

    address: str = DEFAULT_ADDRESS
    token: str | None = None
    tls: bool | str | Path = False
    timeout: float | None = DEFAULT_TIMEOUT_SECONDS
    certificate: str | Path | None = None
    key: str | Path | None = None
    token_in_clear: bool = False

    def __post_init__(self) -> None:
        if (self.certificate is None) != (self.key is None):
            raise ValueError("a client's certificate and its key belong together")
        if self.certificate is not None and self.tls is False:
            raise ValueError("a client's certificate needs TLS")
        if self.token is not None and self.tls is False and not self.token_in_clear and not _is_here(self.address):
            raise ValueError(f"the token is not sent to {self.address} without TLS, unless token_in_clear is set")

    @property
    def channel_options(self) -> list[tuple[str, str | int]]:
        return [("grpc.service_config", json.dumps(_SERVICE_CONFIG)), ("grpc.enable_retries", 1)]

    @property
    def credentials(self) -> grpc.ChannelCredentials | None:
        """None for plain text."""
        if self.tls is False:
            return None
        roots, key, certificate = (
            None if path is None or path is True else Path(path).read_bytes()
            for path in (self.tls, self.key, self.certificate)
        )
        return grpc.ssl_channel_credentials(roots, key, certificate)

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        token = () if self.token is None else (("authorization", f"Bearer {self.token}"),)
        return (*token, *trace_context())

    def deadline(self, timeout: float | None) -> float | None:
        """Seconds for a call: its own, else the connection's; infinity is no deadline."""
        seconds = self.timeout if timeout is None else timeout
        return None if seconds is None or math.isinf(seconds) else seconds


def trace_context() -> tuple[tuple[str, str], ...]:
    """traceparent and what else OpenTelemetry's propagators write for the current span; nothing where there is none.

    A program that has not loaded OpenTelemetry has no span, and it is not loaded here.
    """
    trace = sys.modules.get("opentelemetry.trace")
    if trace is None or not trace.get_current_span().get_span_context().is_valid:
        return ()
    from opentelemetry import propagate

    carrier: dict[str, str] = {}
    propagate.inject(carrier)
    # gRPC takes keys in lower case only.
    return tuple((key.lower(), value) for key, value in carrier.items())


def _is_here(address: str) -> bool:
    """Whether what is sent there stays on this machine."""
    if address.startswith("unix:"):
        return True
    host = address.rpartition(":")[0].strip("[]")
    return host in ("localhost", "::1") or host.startswith("127.")


def health_status(response: object) -> str:
    """ "serving", "not_serving", "unknown" or "service_unknown"."""
    return _HEALTH[getattr(response, "status", 0)]

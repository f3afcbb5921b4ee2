"""How to reach a server: address, TLS, token, deadlines, retries. Shared by both clients."""

import json
import math
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
    """tls: True for the system's roots, or a PEM file of roots. timeout: seconds for each call, None: no deadline."""

    address: str = DEFAULT_ADDRESS
    token: str | None = None
    tls: bool | str | Path = False
    timeout: float | None = DEFAULT_TIMEOUT_SECONDS

    @property
    def channel_options(self) -> list[tuple[str, str | int]]:
        return [("grpc.service_config", json.dumps(_SERVICE_CONFIG)), ("grpc.enable_retries", 1)]

    @property
    def credentials(self) -> grpc.ChannelCredentials | None:
        """None for plain text."""
        if self.tls is False:
            return None
        return grpc.ssl_channel_credentials(None if self.tls is True else Path(self.tls).read_bytes())

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        return () if self.token is None else (("authorization", f"Bearer {self.token}"),)

    def deadline(self, timeout: float | None) -> float | None:
        """Seconds for a call: its own, else the connection's; infinity is no deadline."""
        seconds = self.timeout if timeout is None else timeout
        return None if seconds is None or math.isinf(seconds) else seconds


def health_status(response: object) -> str:
    """ "serving", "not_serving", "unknown" or "service_unknown"."""
    return _HEALTH[getattr(response, "status", 0)]

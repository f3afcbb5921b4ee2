"""How to reach a server: address, TLS, token, deadlines, retries. Shared by both clients."""

import json
import math
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import SupportsFloat, TypeAlias

import grpc

from patchclamp.fields import shown
from patchclamp.standard_messages import CLASSES
from patchclamp.targets import Target

# By gRPC's names.
ChannelOptions: TypeAlias = Mapping[str, str | int] | Iterable[tuple[str, str | int]]

DEFAULT_ADDRESS = "localhost:50051"
DEFAULT_TIMEOUT_SECONDS = 300.0

# Whose health says whether a server takes calls.
_BALANCED_SERVICE = "patchclamp.v1.GenerationService"
# Every server gets its turn, and one that drains or hangs none: it is left as soon as its health says so.
_BALANCED = {"loadBalancingConfig": [{"round_robin": {}}], "healthCheckConfig": {"serviceName": _BALANCED_SERVICE}}
_OPTIONS: dict[str, str | int] = {
    # Calls are repeated by retry.py, which says why.
    "grpc.enable_retries": 0,
    # A server that is back after a restart is found within this time.
    "grpc.initial_reconnect_backoff_ms": 200,
    "grpc.max_reconnect_backoff_ms": 2000,
    # And so are replicas with new addresses, where DNS has a name for all: it is asked again when a connection ends.
    "grpc.dns_min_time_between_resolutions_ms": 5000,
    # A quiet stream is kept open by what lies between, and found dead where the server has vanished without a word.
    "grpc.keepalive_time_ms": 30_000,
    "grpc.keepalive_timeout_ms": 20_000,
    "grpc.http2.max_pings_without_data": 0,
}

HEALTH_METHOD = "/grpc.health.v1.Health/Check"
HealthRequest = CLASSES["grpc.health.v1.HealthCheckRequest"]
HealthResponse = CLASSES["grpc.health.v1.HealthCheckResponse"]
_HEALTH = {0: "unknown", 1: "serving", 2: "not_serving", 3: "service_unknown"}


@dataclass(frozen=True)
class Connection:
    """Says how a server is reached.

    tls: True for the system's roots, or a PEM file of roots. timeout: seconds for each call; None is no deadline.
    certificate, key: PEM files, for a server that asks clients for a certificate (mTLS).
    token_in_clear: whether the token is sent without TLS to a host that is not this one, where others may read it on
    its way.
    tls_server_name: the name in the server's certificate, where it is not the host of the address.
    channel_options: arguments of the channel, by gRPC's names, such as {"grpc.max_receive_message_length": 1 << 24};
    they replace ours.

    Where an address can mean several servers (``ipv4:a:1,b:1``, or a name that DNS may know several addresses of) every
    call goes to the next one in turn, of those whose health says SERVING.

    Raises ValueError for a token that would travel in clear, and for a certificate or name without TLS; TypeError for a
    timeout that is no number.
    """

    address: str = DEFAULT_ADDRESS
    token: str | None = None
    tls: bool | str | Path = False
    timeout: float | None = DEFAULT_TIMEOUT_SECONDS
    certificate: str | Path | None = None
    key: str | Path | None = None
    token_in_clear: bool = False
    tls_server_name: str | None = None
    channel_options: Mapping[str, str | int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.timeout is not None:
            _seconds(self.timeout)
        if (self.certificate is None) != (self.key is None):
            raise ValueError("a client's certificate and its key belong together")
        if self.certificate is not None and self.tls is False:
            raise ValueError("a client's certificate needs TLS")
        if self.tls_server_name is not None and self.tls is False:
            raise ValueError("the name in the server's certificate needs TLS")
        is_open = self.tls is False and not self.token_in_clear
        if self.token is not None and is_open and not Target.parse(self.address).is_here:
            raise ValueError(f"the token is not sent to {self.address} without TLS, unless token_in_clear is set")

    @property
    def is_balanced(self) -> bool:
        return Target.parse(self.address).may_be_several

    @property
    def options(self) -> list[tuple[str, str | int]]:
        """The options of the channel."""
        options = dict(_OPTIONS)
        if self.is_balanced:
            options["grpc.service_config"] = json.dumps(_BALANCED)
        if self.tls_server_name is not None:
            options["grpc.ssl_target_name_override"] = self.tls_server_name
        return list({**options, **self.channel_options}.items())

    @property
    def health_options(self) -> list[tuple[str, str | int]]:
        """The options of a channel that asks for health: it must reach a server that says NOT_SERVING."""
        return [*self.options, ("grpc.inhibit_health_checking", 1)]

    @property
    def credentials(self) -> grpc.ChannelCredentials | None:
        """The credentials of the channel; None stands for plain text."""
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

    def with_token(self, token: str | None) -> "Connection":
        return replace(self, token=token)

    def deadline(self, timeout: float | None) -> float | None:
        """Returns the seconds for a call: its own, else the connection's; None, for infinity, is no deadline.

        Raises TypeError for what is no number.
        """
        seconds = self.timeout if timeout is None else _seconds(timeout)
        return None if seconds is None or math.isinf(seconds) else seconds


def _seconds(timeout: object) -> float:
    if isinstance(timeout, bool) or not isinstance(timeout, SupportsFloat):
        raise TypeError(f"timeout: expected a number of seconds, got {shown(timeout)}")
    seconds = float(timeout)
    if math.isnan(seconds):
        raise ValueError("timeout: expected a number of seconds, got nan")
    return seconds


def trace_context() -> tuple[tuple[str, str], ...]:
    """Returns what OpenTelemetry's propagators write for the current span, such as traceparent; nothing without a span.

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


def health_status(response: object) -> str:
    """Returns "serving", "not_serving", "unknown" or "service_unknown"."""
    return _HEALTH[getattr(response, "status", 0)]

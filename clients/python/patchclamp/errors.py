"""The one exception of the client: a gRPC status with its google.rpc details decoded."""

import re
from dataclasses import asdict, dataclass, replace
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from patchclamp.standard_messages import CLASSES

_DETAILS_KEY = "grpc-status-details-bin"
_TOO_LARGE = re.compile(r"(?:CLIENT: |SERVER: )?Received message larger than max \((\d+) vs\. (\d+)\)")
# By one server, by one of several.
_NO_CONNECTION = ("failed to connect to all addresses", "connections to all backends failing", "errors resolving ")
# What gRPC says of a connection that came to nothing, and what that means here, with the options of Client and the
# command line. The first that is found counts.
_HINTS = (
    (
        ("WRONG_VERSION_NUMBER",),
        "the server does not speak TLS: leave out tls= (--tls, --ca, PATCHCLAMP_CA)",
    ),
    (
        ("Hostname Verification Check failed",),
        "the server's certificate is for another name than that of the address: give that name by tls_server_name= "
        "(--tls-server-name)",
    ),
    (
        ("CERTIFICATE_VERIFY_FAILED", "certificate signature failure"),
        "the server's certificate is not by an authority that this client trusts: name the PEM file of its root by "
        "tls= (--ca)",
    ),
    (
        ("Socket closed",),
        "the server hung up before it said anything: it may speak TLS, which tls= (--ca, --tls) turns on, or want a "
        "certificate of the client, certificate= and key= (--cert, --key)",
    ),
    (
        ("Connection refused",),
        "nothing listens there: is the server running, and is this its address? (A name that has several addresses, "
        "as localhost may, hides what the others said: if the server speaks TLS, tls= or --ca is needed)",
    ),
    (
        ("Failed parsing HTTP/2",),
        "what listens there speaks no gRPC: is it the port of metrics? That of the server is its --address",
    ),
    (
        ("Misformatted domain name",),
        "an address is host:port, [IPv6 address]:port or unix:path, without http://",
    ),
)


@dataclass(frozen=True)
class FieldViolation:
    """Says what is wrong with which field; `field` is a path such as ``program.edits[1].layers``."""

    field: str
    description: str


@dataclass(frozen=True)
class ErrorDetails:
    """Holds what a status carries besides code and message. Anything may be absent."""

    reason: str = ""
    violations: tuple[FieldViolation, ...] = ()
    retry_after: float | None = None


class PatchclampError(Exception):
    """Says that the server refused or failed a call.

    code: name of the gRPC status, such as "INVALID_ARGUMENT"; reason: a stable word for programs (ErrorInfo).
    violations: the fields at fault (BadRequest), or the unmet preconditions with their subjects (PreconditionFailure).
    retry_after: seconds after which the server suggests to try again (RetryInfo).
    hint: what to do where no connection came about, or "".
    """

    def __init__(self, code: str, message: str, details: ErrorDetails | None = None) -> None:
        super().__init__(code, message, details)
        self.code = code
        self.message = message
        details = details or ErrorDetails()
        self.reason = details.reason
        self.violations = details.violations
        self.retry_after = details.retry_after
        self.hint = _hint(code, message)

    def __str__(self) -> str:
        lines = [f"{self.code}: {self.message}"]
        lines += [f"  {v.field}: {v.description}" for v in self.violations if v.field not in self.message]
        if self.retry_after is not None:
            lines.append(f"  try again in {self.retry_after:g} s")
        if self.hint:
            lines.append(f"  {self.hint}")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        return {
            "code": self.code,
            "message": self.message,
            "reason": self.reason,
            "violations": [asdict(violation) for violation in self.violations],
            "retry_after": self.retry_after,
            "hint": self.hint,
        }

    @classmethod
    def from_rpc(cls, error: grpc.RpcError) -> "PatchclampError":
        """Returns the exception for an error of a call of either gRPC API."""
        if not isinstance(error, grpc.Call | grpc.aio.AioRpcError):
            raise TypeError(f"not the error of a call: {error!r}") from error
        metadata: Any = error.trailing_metadata()  # (key, value) pairs in both APIs; the stubs know only one
        encoded = dict(metadata or ()).get(_DETAILS_KEY)
        try:
            details = _decode(encoded) if isinstance(encoded, bytes) else None
        except DecodeError:
            # Not written by a Patchclamp server (a proxy, say): code and message still tell what happened.
            details = None
        return cls(error.code().name, _explained(error.details() or ""), details)


def _explained(message: str) -> str:
    """Returns the message, with our options where gRPC says that a request is too large, for it names none."""
    if (match := _TOO_LARGE.match(message)) is None:
        return message
    size, limit = map(int, match.groups())
    return (
        f"the request has {size:,} bytes and the server takes {limit:,} at once: "
        "send it in parts, or serve with a larger --max-message-bytes"
    )


def _hint(code: str, message: str) -> str:
    if code != "UNAVAILABLE" or not message.startswith(_NO_CONNECTION):
        return ""
    return next((hint for words, hint in _HINTS if any(said in message for said in words)), "")


def _decode(encoded: bytes) -> ErrorDetails:
    details = ErrorDetails()
    status = CLASSES["google.rpc.Status"].FromString(encoded)
    for packed in status.details:
        name = packed.type_url.rpartition("/")[2]
        if name not in CLASSES:
            continue
        detail = CLASSES[name].FromString(packed.value)
        match name:
            case "google.rpc.ErrorInfo":
                fields = [FieldViolation(e.value, status.message) for e in detail.metadata if e.key == "field"]
                details = replace(details, reason=detail.reason, violations=details.violations or tuple(fields))
            case "google.rpc.BadRequest":
                violations = [FieldViolation(v.field, v.description) for v in detail.field_violations]
                details = replace(details, violations=tuple(violations))
            case "google.rpc.PreconditionFailure":
                violations = [FieldViolation(v.subject, v.description) for v in detail.violations]
                details = replace(details, violations=tuple(violations))
            case "google.rpc.RetryInfo":
                delay = detail.retry_delay
                details = replace(details, retry_after=delay.seconds + delay.nanos * 1e-9)
    return details

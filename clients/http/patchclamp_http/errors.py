"""An error of HTTP, in the form that clients of OpenAI's API read: {"error": {message, type, param, code}}.

`param` is the path of the field at fault in the JSON that the caller sent, `code` the stable reason of the server
(ErrorInfo) or the word of a fault that this front found itself.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import orjson

from patchclamp.errors import PatchclampError


class Kind(NamedTuple):
    """What a gRPC status is over HTTP. `retried`: whether it can help to send the same request again."""

    status: int
    type: str
    retried: bool = False


KINDS: Mapping[str, Kind] = {
    "INVALID_ARGUMENT": Kind(400, "invalid_request_error"),
    "FAILED_PRECONDITION": Kind(400, "invalid_request_error"),
    "OUT_OF_RANGE": Kind(400, "invalid_request_error"),
    "UNAUTHENTICATED": Kind(401, "authentication_error"),
    "PERMISSION_DENIED": Kind(403, "permission_error"),
    "NOT_FOUND": Kind(404, "not_found_error"),
    "ALREADY_EXISTS": Kind(409, "conflict_error"),
    # An abort condition fired: what the caller asked for.
    "ABORTED": Kind(409, "aborted_error"),
    "RESOURCE_EXHAUSTED": Kind(429, "rate_limit_error", retried=True),
    "CANCELLED": Kind(499, "cancelled_error"),
    "UNIMPLEMENTED": Kind(501, "not_implemented_error"),
    "UNAVAILABLE": Kind(503, "service_unavailable_error", retried=True),
    "DEADLINE_EXCEEDED": Kind(504, "timeout_error"),
}
# INTERNAL, UNKNOWN and DATA_LOSS are the server's own faults.
SERVER_ERROR = Kind(500, "server_error")
# gRPC says of a message above its limit what it says of a full server, without a reason.
TOO_LARGE = Kind(413, "invalid_request_error")


@dataclass(eq=False)
class ApiError(Exception):
    """Is answered with `status`, and `headers` beside the usual ones."""

    status: int
    message: str
    type: str = "invalid_request_error"
    param: str | None = None
    code: str | None = None
    headers: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.message

    def body(self) -> bytes:
        error = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        return orjson.dumps({"error": error})


def invalid(param: str, message: str) -> ApiError:
    """Returns the refusal of one field, with what would be accepted."""
    return ApiError(400, f"{param}: {message}" if param else message, param=param or None, code="invalid_field")


def from_grpc(error: PatchclampError, names: Mapping[str, str]) -> ApiError:
    """Returns what a status of the server is over HTTP. `names` turn paths of gRPC's fields into those of the caller:
    the longest path counts that begins one."""
    kind = KINDS.get(error.code, SERVER_ERROR)
    if error.code == "RESOURCE_EXHAUSTED" and not error.reason and error.retry_after is None:
        kind = TOO_LARGE
    param, message = None, error.message
    if error.violations:
        path, description = error.violations[0].field, error.violations[0].description
        param = param_of(path, names) or None
        description = description.removeprefix(f"{path}: ")
        message = f"{param}: {description}" if param else description
    if error.hint:
        message = f"{message} ({error.hint})"
    # Clients of OpenAI repeat 408, 409, 429 and all above 499 by themselves, unless they are told not to.
    headers = {"x-should-retry": "true" if kind.retried else "false"}
    if error.retry_after is not None:
        headers["retry-after"] = str(math.ceil(error.retry_after))
        headers["retry-after-ms"] = str(math.ceil(error.retry_after * 1000))
    if kind.status == 401:
        headers["www-authenticate"] = "Bearer"
    return ApiError(kind.status, message, kind.type, param, error.reason or error.code, headers)


def param_of(path: str, names: Mapping[str, str]) -> str:
    """Returns the path in the caller's JSON; what none of `names` begins is below the extension field."""
    for prefix in sorted(names, key=len, reverse=True):
        if path == prefix or path.startswith((f"{prefix}.", f"{prefix}[")):
            return names[prefix] + path[len(prefix) :]
    return f"patchclamp.{path}" if path else ""

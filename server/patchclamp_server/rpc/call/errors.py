"""A RequestError becomes a gRPC status with google.rpc details, so that a client can act without reading prose.

Every status carries an ErrorInfo (domain "patchclamp", a stable reason, the field path as metadata). INVALID_ARGUMENT
also carries a BadRequest, FAILED_PRECONDITION a PreconditionFailure, and RESOURCE_EXHAUSTED a RetryInfo.

A request larger than the server's limit never reaches this code: gRPC itself answers RESOURCE_EXHAUSTED
("Received message larger than max"), without details and so without RetryInfo: sending it again cannot help.
"""

from dataclasses import dataclass

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from patchclamp_server import errors

DOMAIN = "patchclamp"
# Trailing metadata is limited to 8 KiB by most peers, and the message travels up to three times in it.
MAX_MESSAGE_CHARACTERS = 500


@dataclass(frozen=True)
class Mapping:
    code: grpc.StatusCode
    reason: str


MAPPINGS: dict[type[errors.RequestError], Mapping] = {
    errors.InvalidArgument: Mapping(grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD"),
    errors.FailedPrecondition: Mapping(grpc.StatusCode.FAILED_PRECONDITION, "DOES_NOT_FIT_MODEL"),
    errors.NotFound: Mapping(grpc.StatusCode.NOT_FOUND, "NOT_FOUND"),
    errors.AlreadyExists: Mapping(grpc.StatusCode.ALREADY_EXISTS, "NAME_TAKEN"),
    errors.ResourceExhausted: Mapping(grpc.StatusCode.RESOURCE_EXHAUSTED, "SERVER_FULL"),
    errors.QuotaExceeded: Mapping(grpc.StatusCode.RESOURCE_EXHAUSTED, "QUOTA_EXCEEDED"),
    errors.Unauthenticated: Mapping(grpc.StatusCode.UNAUTHENTICATED, "TOKEN_MISSING"),
    errors.PermissionDenied: Mapping(grpc.StatusCode.PERMISSION_DENIED, "NOT_ALLOWED"),
    errors.Aborted: Mapping(grpc.StatusCode.ABORTED, "ABORT_CONDITION_FIRED"),
    errors.Cancelled: Mapping(grpc.StatusCode.CANCELLED, "CANCELLED"),
    errors.DeadlineExceeded: Mapping(grpc.StatusCode.DEADLINE_EXCEEDED, "DEADLINE_EXCEEDED"),
    errors.Unavailable: Mapping(grpc.StatusCode.UNAVAILABLE, "DRAINING"),
    errors.EngineFailure: Mapping(grpc.StatusCode.INTERNAL, "ENGINE_FAILURE"),
}
# A client is told this of a failure that is the server's own.
INTERNAL_MESSAGE = "internal error; the server's log has the details"


def mapping_of(error: errors.RequestError) -> Mapping:
    """Returns the mapping of the nearest class that has one; a RequestError without any is a fault of the server."""
    for cls in type(error).__mro__:
        if cls in MAPPINGS:
            return MAPPINGS[cls]
    return MAPPINGS[errors.EngineFailure]


def to_status(error: errors.RequestError) -> grpc.Status:
    """Returns code, details and trailing_metadata (grpc-status-details-bin) for `context.abort`."""
    mapping = mapping_of(error)
    is_internal = mapping.code is grpc.StatusCode.INTERNAL
    message = INTERNAL_MESSAGE if is_internal else _shortened(error.message)
    reason = mapping.reason
    if isinstance(error, errors.Unauthenticated | errors.PermissionDenied):
        reason = error.reason
    info = error_details_pb2.ErrorInfo(reason=reason, domain=DOMAIN)
    if error.field:
        info.metadata["field"] = error.field
    details: list[Message] = [info]
    if isinstance(error, errors.InvalidArgument):
        violation = error_details_pb2.BadRequest.FieldViolation(field=error.field, description=message)
        details.append(error_details_pb2.BadRequest(field_violations=[violation]))
    elif isinstance(error, errors.FailedPrecondition):
        failure = error_details_pb2.PreconditionFailure.Violation(
            type=mapping.reason, subject=error.field, description=message
        )
        details.append(error_details_pb2.PreconditionFailure(violations=[failure]))
    elif isinstance(error, errors.ResourceExhausted):
        delay = duration_pb2.Duration()
        delay.FromNanoseconds(int(error.retry_after_seconds * 1e9))
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    text = message if is_internal or not error.field else f"{error.field}: {message}"
    return rpc_status.to_status(
        status_pb2.Status(code=mapping.code.value[0], message=text, details=[_packed(d) for d in details])
    )


def _packed(message: Message) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(message)
    return packed


def _shortened(message: str) -> str:
    if len(message) <= MAX_MESSAGE_CHARACTERS:
        return message
    return message[: MAX_MESSAGE_CHARACTERS - 1] + "…"

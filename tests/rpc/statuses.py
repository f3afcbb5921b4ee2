"""What a client reads from a failed call."""

from dataclasses import dataclass, field
from typing import Any

import grpc
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2

DETAILS: tuple[type[Message], ...] = (
    error_details_pb2.ErrorInfo,
    error_details_pb2.BadRequest,
    error_details_pb2.PreconditionFailure,
    error_details_pb2.RetryInfo,
)


@dataclass
class Failure:
    code: grpc.StatusCode
    message: str
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def reason(self) -> str:
        return str(self.details["ErrorInfo"].reason)

    @property
    def fields(self) -> list[str]:
        return [violation.field for violation in self.details["BadRequest"].field_violations]


def status_details(error: Any) -> list[Any]:
    """The packed google.rpc messages of a failed call.

    They are read as a client does, from the trailing metadata. `grpc_status.rpc_status` demands besides that their
    message equals that of the call; where a deadline is over, though, this end may have given the message ("Stream
    removed") and the other the metadata, whichever came first.
    """
    encoded = dict(error.trailing_metadata() or ()).get("grpc-status-details-bin")
    if encoded is None:
        return []
    status = status_pb2.Status.FromString(encoded)
    assert status.code == error.code().value[0]
    return list(status.details)


def failure(error: Any) -> Failure:
    """The status of an RpcError with its google.rpc details by name."""
    found = Failure(error.code(), error.details())
    for packed in status_details(error):
        for kind in DETAILS:
            message = kind()
            if packed.Unpack(message):
                found.details[kind.DESCRIPTOR.name] = message
    return found

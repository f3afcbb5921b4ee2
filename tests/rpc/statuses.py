"""What a client reads from a failed call."""

from dataclasses import dataclass, field
from typing import Any

import grpc
from google.protobuf.message import Message
from google.rpc import error_details_pb2
from grpc_status import rpc_status

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


def failure(error: Any) -> Failure:
    """The status of an RpcError with its google.rpc details by name."""
    status = rpc_status.from_call(error)
    found = Failure(error.code(), error.details())
    for packed in status.details if status is not None else ():
        for kind in DETAILS:
            message = kind()
            if packed.Unpack(message):
                found.details[kind.DESCRIPTOR.name] = message
    return found

"""Messages of google.rpc and grpc.health.v1, declared here so that the client needs only grpcio and protobuf.

They live in a pool of their own: googleapis-common-protos and grpcio-health-checking register the same names in the
default pool, and may be installed beside this client. What matters is the wire: `Any` is its two fields, a map is
repeated entries, an enum is its number.
"""

from collections.abc import Mapping
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.descriptor_pb2 import FieldDescriptorProto as Field

# message → field → (number, type); a type with a dot is a message, "repeated" may precede it
_MESSAGES: Mapping[str, Mapping[str, tuple[int, str]]] = {
    "google.protobuf.Any": {"type_url": (1, "string"), "value": (2, "bytes")},
    "google.protobuf.Duration": {"seconds": (1, "int64"), "nanos": (2, "int32")},
    "google.rpc.Status": {
        "code": (1, "int32"),
        "message": (2, "string"),
        "details": (3, "repeated google.protobuf.Any"),
    },
    "google.rpc.MetadataEntry": {"key": (1, "string"), "value": (2, "string")},
    "google.rpc.ErrorInfo": {
        "reason": (1, "string"),
        "domain": (2, "string"),
        "metadata": (3, "repeated google.rpc.MetadataEntry"),
    },
    "google.rpc.FieldViolation": {"field": (1, "string"), "description": (2, "string")},
    "google.rpc.BadRequest": {"field_violations": (1, "repeated google.rpc.FieldViolation")},
    "google.rpc.Violation": {"type": (1, "string"), "subject": (2, "string"), "description": (3, "string")},
    "google.rpc.PreconditionFailure": {"violations": (1, "repeated google.rpc.Violation")},
    "google.rpc.RetryInfo": {"retry_delay": (1, "google.protobuf.Duration")},
    "grpc.health.v1.HealthCheckRequest": {"service": (1, "string")},
    "grpc.health.v1.HealthCheckResponse": {"status": (1, "int32")},
}


def _declare(name: str, fields: Mapping[str, tuple[int, str]]) -> descriptor_pb2.FileDescriptorProto:
    package, _, short_name = name.rpartition(".")
    file = descriptor_pb2.FileDescriptorProto(name=f"{name}.proto", package=package, syntax="proto3")
    message = file.message_type.add(name=short_name)
    for field_name, (number, declared) in fields.items():
        repeated, kind = declared.startswith("repeated "), declared.removeprefix("repeated ")
        field = message.field.add(
            name=field_name,
            number=number,
            label=Field.LABEL_REPEATED if repeated else Field.LABEL_OPTIONAL,
        )
        if "." in kind:
            field.type, field.type_name = Field.TYPE_MESSAGE, f".{kind}"
            file.dependency.append(f"{kind}.proto")
        else:
            field.type = Field.Type.Value(f"TYPE_{kind.upper()}")
    return file


def _classes() -> dict[str, Any]:
    pool = descriptor_pool.DescriptorPool()
    for name, fields in _MESSAGES.items():
        pool.Add(_declare(name, fields))
    return {name: message_factory.GetMessageClass(pool.FindMessageTypeByName(name)) for name in _MESSAGES}


CLASSES: Mapping[str, Any] = _classes()
"""Full name → message class."""

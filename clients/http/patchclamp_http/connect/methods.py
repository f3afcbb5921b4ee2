"""Every RPC of the contract, found in its descriptors: a service that is added to the protos is served here too."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from google.protobuf import message_factory
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message import Message

from patchclamp.v1 import (
    activation_pb2,
    artifact_pb2,
    feature_pb2,
    generation_pb2,
    head_pb2,
    job_pb2,
    model_pb2,
    monitoring_pb2,
    neuron_pb2,
    probe_pb2,
    sparsity_pb2,
    steering_pb2,
)

FILES = (
    activation_pb2,
    artifact_pb2,
    feature_pb2,
    generation_pb2,
    head_pb2,
    job_pb2,
    model_pb2,
    monitoring_pb2,
    neuron_pb2,
    probe_pb2,
    sparsity_pb2,
    steering_pb2,
)


@dataclass(frozen=True)
class Rpc:
    descriptor: MethodDescriptor
    request: type[Message]
    response: type[Message]

    @property
    def service(self) -> str:
        name: str = self.descriptor.containing_service.full_name
        return name

    @property
    def name(self) -> str:
        name: str = self.descriptor.name
        return name

    @property
    def path(self) -> str:
        return f"/{self.service}/{self.name}"

    @property
    def takes_stream(self) -> bool:
        return bool(self.descriptor.client_streaming)

    @property
    def gives_stream(self) -> bool:
        return bool(self.descriptor.server_streaming)


def rpcs() -> Iterator[Rpc]:
    for file in FILES:
        services: Any = file.DESCRIPTOR.services_by_name
        for service in services.values():
            for method in service.methods:
                request, response = (
                    message_factory.GetMessageClass(kind) for kind in (method.input_type, method.output_type)
                )
                yield Rpc(method, request, response)

"""The names of what is served: services, and their methods."""

from google.protobuf import descriptor_pool

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

SERVICES: tuple[str, ...] = tuple(
    service.full_name
    for module in (
        generation_pb2,
        steering_pb2,
        sparsity_pb2,
        head_pb2,
        neuron_pb2,
        activation_pb2,
        probe_pb2,
        feature_pb2,
        monitoring_pb2,
        artifact_pb2,
        model_pb2,
        job_pb2,
    )
    for service in module.DESCRIPTOR.services_by_name.values()
)
# "Service/Method" of all that a policy can speak of.
METHODS: tuple[str, ...] = (
    *(
        f"{service.name}/{method.name}"
        for service in map(descriptor_pool.Default().FindServiceByName, SERVICES)
        for method in service.methods
    ),
    "ServerReflection/ServerReflectionInfo",
)

"""A real gRPC server around whatever a test wants it to answer."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest

from patchclamp.v1.activation_pb2_grpc import add_ActivationServiceServicer_to_server
from patchclamp.v1.generation_pb2_grpc import add_GenerationServiceServicer_to_server
from patchclamp.v1.head_pb2_grpc import add_HeadServiceServicer_to_server
from patchclamp.v1.job_pb2_grpc import add_JobServiceServicer_to_server
from patchclamp.v1.model_pb2_grpc import add_ModelServiceServicer_to_server
from patchclamp.v1.monitoring_pb2_grpc import add_MonitoringServiceServicer_to_server
from patchclamp.v1.neuron_pb2_grpc import add_NeuronServiceServicer_to_server
from patchclamp.v1.sparsity_pb2_grpc import add_SparsityServiceServicer_to_server

Serve = Callable[..., str]

_SERVICES: dict[str, Callable[[Any, grpc.Server], None]] = {
    "generation": add_GenerationServiceServicer_to_server,
    "models": add_ModelServiceServicer_to_server,
    "sparsity": add_SparsityServiceServicer_to_server,
    "heads": add_HeadServiceServicer_to_server,
    "neurons": add_NeuronServiceServicer_to_server,
    "monitoring": add_MonitoringServiceServicer_to_server,
    "activations": add_ActivationServiceServicer_to_server,
    "jobs": add_JobServiceServicer_to_server,
}


@pytest.fixture
def serve() -> Iterator[Serve]:
    """serve(generation=..., heads=..., monitoring=..., ...) starts a server of these, and returns its address."""
    servers: list[grpc.Server] = []

    def start(**servicers: Any) -> str:
        server = grpc.server(ThreadPoolExecutor(max_workers=4))
        for name, servicer in servicers.items():
            _SERVICES[name](servicer, server)
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        servers.append(server)
        return f"127.0.0.1:{port}"

    yield start
    for server in servers:
        server.stop(grace=None).wait()

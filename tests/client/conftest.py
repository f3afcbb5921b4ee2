"""A real gRPC server around whatever a test wants it to answer."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest

from patchclamp.v1.generation_pb2_grpc import GenerationServiceServicer, add_GenerationServiceServicer_to_server
from patchclamp.v1.model_pb2_grpc import ModelServiceServicer, add_ModelServiceServicer_to_server

Serve = Callable[..., str]


@pytest.fixture
def serve() -> Iterator[Serve]:
    """serve(generation=..., models=...) starts a server of these servicers and returns its address."""
    servers: list[grpc.Server] = []

    def start(generation: GenerationServiceServicer | None = None, models: ModelServiceServicer | None = None) -> str:
        server = grpc.server(ThreadPoolExecutor(max_workers=4))
        if generation is not None:
            add_GenerationServiceServicer_to_server(generation, server)
        if models is not None:
            add_ModelServiceServicer_to_server(models, server)
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        servers.append(server)
        return f"127.0.0.1:{port}"

    yield start
    for server in servers:
        server.stop(grace=None).wait()

"""Server reflection is served as v1 and as v1alpha: newer tools ask for v1 alone, older ones know only v1alpha.

The two differ in the name of their package; messages and fields are the same, and so are the bytes. grpcio-reflection
brings v1alpha.
"""

from collections.abc import Iterable
from typing import Any

import grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2

V1 = "grpc.reflection.v1.ServerReflection"


def add_reflection(services: Iterable[str], server: grpc.aio.Server) -> None:
    """Adds reflection; `services` are the full names that are listed, beside reflection itself."""
    names = (*services, reflection.SERVICE_NAME, V1)
    reflection.enable_server_reflection(names, server)
    # grpcio-reflection does not export it by name, and offers it nowhere else.
    servicer: Any = reflection.aio.ReflectionServicer(names)  # type: ignore[attr-defined]
    handler = grpc.stream_stream_rpc_method_handler(
        servicer.ServerReflectionInfo,
        request_deserializer=reflection_pb2.ServerReflectionRequest.FromString,
        response_serializer=reflection_pb2.ServerReflectionResponse.SerializeToString,
    )
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(V1, {"ServerReflectionInfo": handler})])

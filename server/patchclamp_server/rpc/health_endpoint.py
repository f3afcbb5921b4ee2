"""The health service alone on a port of its own, without TLS and tokens: Kubernetes' gRPC probes speak neither."""

from typing import Any

import grpc
from grpc_health.v1 import health_pb2_grpc


class HealthEndpoint:
    """Answers with what the servicer of the main port answers. `start` and `stop` in the same event loop."""

    def __init__(self, servicer: Any, address: str) -> None:
        self._servicer = servicer
        self._address = address

    async def start(self) -> str:
        """Serve. Returns the bound address, host:port. Raises OSError when the port cannot be had."""
        self._grpc = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        health_pb2_grpc.add_HealthServicer_to_server(self._servicer, self._grpc)
        host, _, _ = self._address.rpartition(":")
        try:
            port = self._grpc.add_insecure_port(self._address)
        except RuntimeError as error:
            await self._grpc.stop(None)
            raise OSError(f"cannot serve health on {self._address}: {error}") from error
        await self._grpc.start()
        return f"{host}:{port}"

    async def stop(self) -> None:
        await self._grpc.stop(None)

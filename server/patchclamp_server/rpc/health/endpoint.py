"""Serves the health service alone on its own port, without TLS and tokens: Kubernetes' gRPC probes speak neither."""

from typing import Any

import grpc
from grpc_health.v1 import health_pb2_grpc

from patchclamp_server.addresses import Address, naming


class HealthEndpoint:
    """Answers what the servicer of the main port answers. `start` and `stop` must be called in the same event loop."""

    def __init__(self, servicer: Any, address: Address) -> None:
        self._servicer = servicer
        self._address = address

    async def start(self) -> str:
        """Serves, and returns the bound address. Raises OSError when the address cannot be bound."""
        self._grpc = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        health_pb2_grpc.add_HealthServicer_to_server(self._servicer, self._grpc)
        try:
            with naming("--health-address", self._address):
                port = self._grpc.add_insecure_port(str(self._address))
        except OSError:
            await self._grpc.stop(None)
            raise
        await self._grpc.start()
        return str(self._address.with_port(port))

    async def stop(self) -> None:
        await self._grpc.stop(None)

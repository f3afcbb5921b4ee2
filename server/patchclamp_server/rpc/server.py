"""The server: every service on one port, health, reflection, metrics, and an end that loses no running request."""

import asyncio
import logging
import signal
from collections.abc import Callable

import grpc
import torch
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from patchclamp.v1 import artifact_pb2, generation_pb2, head_pb2, model_pb2, sparsity_pb2, steering_pb2
from patchclamp.v1.artifact_pb2_grpc import add_ArtifactServiceServicer_to_server
from patchclamp.v1.generation_pb2_grpc import add_GenerationServiceServicer_to_server
from patchclamp.v1.head_pb2_grpc import add_HeadServiceServicer_to_server
from patchclamp.v1.model_pb2_grpc import add_ModelServiceServicer_to_server
from patchclamp.v1.sparsity_pb2_grpc import add_SparsityServiceServicer_to_server
from patchclamp.v1.steering_pb2_grpc import add_SteeringServiceServicer_to_server
from patchclamp_server.artifacts.store import ArtifactStore
from patchclamp_server.config import ServerConfig
from patchclamp_server.engine.engine import Engine
from patchclamp_server.engine.prompt import PromptEncoder
from patchclamp_server.metrics import Metrics, MetricsEndpoint
from patchclamp_server.model.load import LoadedModel, load_model
from patchclamp_server.model.progress import Progress
from patchclamp_server.rpc.artifact_service import ArtifactService
from patchclamp_server.rpc.exclusive import ExclusiveJobs
from patchclamp_server.rpc.generation_service import GenerationService
from patchclamp_server.rpc.head_service import HeadService
from patchclamp_server.rpc.interceptors import CallInterceptor, InFlight
from patchclamp_server.rpc.model_service import ModelService
from patchclamp_server.rpc.sparsity_service import SparsityService
from patchclamp_server.rpc.steering_service import SteeringService
from patchclamp_server.sparsity.binder import Binder

logger = logging.getLogger(__name__)

SERVICES: tuple[str, ...] = tuple(
    service.full_name
    for module in (generation_pb2, steering_pb2, sparsity_pb2, head_pb2, artifact_pb2, model_pb2)
    for service in module.DESCRIPTOR.services_by_name.values()
)
SIGNALS = (signal.SIGTERM, signal.SIGINT)
# Time for the last statuses to reach their clients once every call is answered.
FLUSH_SECONDS = 1.0


class Server:
    """One model behind one address. `start` and `stop` in the same event loop."""

    def __init__(self, model: LoadedModel, config: ServerConfig) -> None:
        self.config = config
        self.metrics = Metrics()
        self.engine = Engine(model, config.engine)
        self.engine.observer = self.metrics
        self.metrics.read_engine(self.engine.stats)
        self.metrics.describe_model(model.info)
        self._info = model.info
        self._prompts = PromptEncoder(model.tokenizer, model.info)
        self._store = ArtifactStore(config.artifacts_url)
        self._binder = Binder(self.engine.sparse_model, self._store, self.engine.executor.sparse.prepare)
        # One queue for the analysis jobs of all services.
        self._jobs = ExclusiveJobs()
        self._stopping: asyncio.Task[None] | None = None

    async def start(self) -> str:
        """Serve. Returns the bound address, host:port. Raises OSError when a port cannot be had."""
        self._metrics_endpoint = _metrics_endpoint(self.metrics, self.config.metrics_address)
        self._in_flight = InFlight()
        self._health = health.aio.HealthServicer()  # type: ignore[attr-defined]
        self._grpc = grpc.aio.server(
            interceptors=[CallInterceptor(self.metrics, self._in_flight, frozenset(SERVICES))],
            options=[
                ("grpc.max_receive_message_length", self.config.max_message_bytes),
                # A second server on the port is a mistake, not a second worker.
                ("grpc.so_reuseport", 0),
            ],
        )
        self._add_services()
        host, _, _ = self.config.address.rpartition(":")
        try:
            port = self._grpc.add_insecure_port(self.config.address)
        except RuntimeError as error:
            await asyncio.to_thread(self._metrics_endpoint.close)
            await self._grpc.stop(None)
            raise OSError(f"cannot serve on {self.config.address}: {error}") from error
        loop = asyncio.get_running_loop()

        def engine_stopped() -> None:
            loop.call_soon_threadsafe(self._engine_stopped)

        self.engine.on_stopped = engine_stopped
        self.engine.start()
        await self._grpc.start()
        for name in ("", *SERVICES):
            await self._health.set(name, health_pb2.HealthCheckResponse.SERVING)
        return f"{host}:{port}"

    def _engine_stopped(self) -> None:
        """Without its engine the server is of no use: health says so, whoever restarts it sees it."""
        self._going_down = asyncio.ensure_future(self._health.enter_graceful_shutdown())

    @property
    def metrics_port(self) -> int:
        return self._metrics_endpoint.port

    def _add_services(self) -> None:
        add_GenerationServiceServicer_to_server(
            GenerationService(
                self.engine, self._prompts, self._store, self._info, self._binder, self.metrics.on_grounded
            ),
            self._grpc,
        )
        add_SteeringServiceServicer_to_server(
            SteeringService(self.engine, self._prompts, self._store, self._info), self._grpc
        )
        add_SparsityServiceServicer_to_server(
            SparsityService(self.engine, self._prompts, self._store, self._info, self._binder, self._jobs), self._grpc
        )
        add_HeadServiceServicer_to_server(
            HeadService(self.engine, self._prompts, self._store, self._info, self._jobs), self._grpc
        )
        add_ArtifactServiceServicer_to_server(ArtifactService(self._store, self._info), self._grpc)
        add_ModelServiceServicer_to_server(ModelService(self._info, self._prompts), self._grpc)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._grpc)
        reflection.enable_server_reflection((*SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME), self._grpc)

    async def stop(self) -> None:
        """Drain and end: health says NOT_SERVING, new calls are refused, running ones have `drain_seconds`.

        Calls that come while it runs, or after, wait for the same end.
        """
        if self._stopping is None:
            self._stopping = asyncio.create_task(self._stop())
        await asyncio.shield(self._stopping)

    async def _stop(self) -> None:
        await self._health.enter_graceful_shutdown()
        # The port stays open meanwhile: a call gets UNAVAILABLE and its reason, not a connection that breaks.
        self._in_flight.close()
        try:
            await asyncio.wait_for(self._in_flight.idle(), self.config.drain_seconds)
        except TimeoutError:
            logger.warning("calls still ran after %g s and are cancelled", self.config.drain_seconds)
            await self._grpc.stop(None)
        else:
            await self._grpc.stop(FLUSH_SECONDS)
        await asyncio.to_thread(self.engine.shutdown)
        await asyncio.to_thread(self._metrics_endpoint.close)

    async def run(self, ready: Callable[[str], None]) -> None:
        """Serve until SIGTERM or SIGINT, then drain; `ready` gets the bound address. A second signal ends at once."""
        loop = asyncio.get_running_loop()
        asked = asyncio.Event()
        for number in SIGNALS:
            loop.add_signal_handler(number, asked.set)
        ready(await self.start())
        await asked.wait()
        for number in SIGNALS:
            loop.remove_signal_handler(number)
        await self.stop()


def load(config: ServerConfig, progress: Progress | None = None) -> LoadedModel:
    """The model of `config`. Raises ModelSourceError."""
    return load_model(config.model, dtype=getattr(torch, config.dtype), device=config.device, progress=progress)


def _metrics_endpoint(metrics: Metrics, address: str) -> MetricsEndpoint:
    host, _, port = address.rpartition(":")
    return MetricsEndpoint(metrics, host, int(port))

"""The server: every service on one port, health, reflection, metrics, and an end that loses no running request."""

import asyncio
import logging
import signal
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, suppress
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from patchclamp_server.addresses import Address, Reservation, naming
from patchclamp_server.engine.engine import Engine
from patchclamp_server.engine.memory.plan import MemoryPlan
from patchclamp_server.errors import RequestError
from patchclamp_server.model.info import ModelInfo
from patchclamp_server.model.load import LoadedModel
from patchclamp_server.monitoring.stored import WatchAsked
from patchclamp_server.monitoring.watch import WatchOptions
from patchclamp_server.rpc.at_start import reserve
from patchclamp_server.rpc.call.interceptors import CallInterceptor, InFlight
from patchclamp_server.rpc.call.security import CallSecurity
from patchclamp_server.rpc.config import ServerConfig
from patchclamp_server.rpc.contract import METHODS, SERVICES
from patchclamp_server.rpc.credentials import server_credentials
from patchclamp_server.rpc.health.endpoint import HealthEndpoint
from patchclamp_server.rpc.health.servicer import Health
from patchclamp_server.rpc.health.watchdog import stacks, watch_steps
from patchclamp_server.rpc.local_socket import LocalSocket
from patchclamp_server.rpc.metrics.endpoint import MetricsEndpoint
from patchclamp_server.rpc.metrics.server import Metrics
from patchclamp_server.rpc.reflection import add_reflection
from patchclamp_server.rpc.servicers import Servicers
from patchclamp_server.security.access import CallersAccess
from patchclamp_server.security.configuration import ConfigurationError
from patchclamp_server.security.security import Security

if TYPE_CHECKING:
    from patchclamp_server.rpc.tracing.spans import Tracing

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGINT)
# The closest that pings of a client may follow each other.
MIN_PING_MILLISECONDS = 100
# Time for clients that balance by health to leave, before the port is closed to them.
LEAVE_SECONDS = 0.5
# Time for the last statuses to reach their clients once every call is answered.
FLUSH_SECONDS = 1.0
# Time for the engine's last step, and for the last of a job, once nothing is left to run.
LAST_STEP_SECONDS = 10.0
# Time for the last spans to reach the collector.
SPAN_FLUSH_SECONDS = 5.0


class EngineStopped(Exception):
    """The server has ended because its engine could not go on."""


class Server:
    """One model behind one address. `start` and `stop` in the same event loop."""

    def __init__(self, model: LoadedModel, config: ServerConfig, plan: MemoryPlan | None = None) -> None:
        """`plan` is what the server was planned to take of memory, for its metrics."""
        self.config = config
        self.metrics = Metrics()
        self._security = Security(config, self.metrics.security, METHODS)
        self.engine = Engine(model, config.engine)
        self.engine.observer = self.metrics
        self.metrics.read_engine(self.engine.stats)
        self.metrics.describe_model(model.info)
        if plan is not None:
            self.metrics.describe_memory(plan)
        self._info = model.info
        self.services = Servicers(self.engine, model, config, self.metrics.on_grounded)
        if self._security.is_configured:
            self.engine.access = self.services.store.access = CallersAccess()
        self._monitoring = self.services.monitoring
        shared = self._monitoring.shared
        self.metrics.read_watches(self.engine.monitor, self._monitoring.dropped.of, lambda: shared.refused)
        self._health_endpoint: HealthEndpoint | None = None
        self._local_socket: LocalSocket | None = None
        self.health_address = ""
        # What health says, for those who ask over HTTP.
        self._alive = False
        self._tracing: Tracing | None = None
        self._stopping: asyncio.Task[None] | None = None
        self._watchdog: asyncio.Task[None] | None = None
        # Set when there is a reason to end: a signal, or the end of the engine.
        self._asked_to_end = asyncio.Event()

    async def start(self, reserved: Reservation | None = None) -> str:
        """Serve. Returns the bound address. `reserved`: what has held the ports until now.

        Raises OSError when a port cannot be had, and ConfigurationError when a watch cannot run.
        """
        address = Address.parse(self.config.address)
        metrics_address = Address.parse(self.config.metrics_address)
        await asyncio.to_thread(self._start_watches)
        await self._monitoring.look()
        # What gRPC says of a taken port has no reason.
        (reserved or reserve(self.config)).release()
        with naming("--metrics-address", metrics_address):
            self._metrics_endpoint = MetricsEndpoint(
                self.metrics.registry,
                metrics_address,
                lambda: self._alive,
                self._security.tls_files if self.config.metrics_tls else None,
            )
        self._security.on_new_certificate = self._metrics_endpoint.renew_certificate
        self._in_flight = InFlight(self.config.max_calls)
        self._tracing = _tracing(self.config, self._info)
        security = CallSecurity(self._security, self._info.name, self.services.prompts.text_of)
        calls = CallInterceptor(self.metrics, self._in_flight, frozenset(SERVICES), security)
        self._health = Health()
        self._grpc = grpc.aio.server(
            interceptors=self._interceptors(calls),
            options=[
                ("grpc.max_receive_message_length", self.config.max_message_bytes),
                # A second server on the port is a mistake, not a second worker.
                ("grpc.so_reuseport", 0),
                # Pings keep quiet streams open, and gRPC takes more than one in five minutes for an attack.
                ("grpc.keepalive_permit_without_calls", 1),
                ("grpc.http2.min_ping_interval_without_data_ms", MIN_PING_MILLISECONDS),
            ],
        )
        self.services.add_to(self._grpc, calls)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._grpc)
        add_reflection((*SERVICES, health.SERVICE_NAME), self._grpc)
        try:
            with naming("--address", address):
                port = self._add_port(address)
            if self.config.http:
                self._local_socket = LocalSocket()
                self._grpc.add_insecure_port(self._local_socket.address)
            await self._serve_health_alone()
        except OSError:
            await asyncio.to_thread(self._metrics_endpoint.close)
            await self._grpc.stop(None)
            raise
        loop = asyncio.get_running_loop()

        def engine_stopped() -> None:
            loop.call_soon_threadsafe(self._engine_stopped)

        self.engine.on_stopped = engine_stopped
        self.engine.start()
        await self._grpc.start()
        self._security.warn_if_open(address)
        self._watching_files = asyncio.create_task(self._security.watch())
        self._watching_files.add_done_callback(_log_failure)
        self._watching_store = asyncio.create_task(self._monitoring.follow_store(self.config.watch_poll_seconds))
        self._watching_store.add_done_callback(_log_store_failure)
        await self._set_alive(True)
        if self.config.step_timeout_seconds:
            watching = watch_steps(self.engine.step_seconds, self.config.step_timeout_seconds, self._step_is_late)
            self._watchdog = asyncio.create_task(watching)
        return str(address.with_port(port))

    def _start_watches(self) -> None:
        for name, watch, reference in self.config.watches:
            try:
                asked = WatchAsked(watch, WatchOptions(name), reference)
                self._monitoring.shared.start_own(asked)
            except RequestError as error:
                raise ConfigurationError(f"--watch {name}={watch}: {error}") from error

    async def _step_is_late(self, late: bool) -> None:
        await self._set_alive(not late)

    async def _set_alive(self, alive: bool) -> None:
        self._say_alive(alive)
        status = health_pb2.HealthCheckResponse.SERVING if alive else health_pb2.HealthCheckResponse.NOT_SERVING
        for name in ("", *SERVICES):
            await self._health.set(name, status)

    def _say_alive(self, alive: bool) -> None:
        self._alive = alive
        self.metrics.serving.set(alive)

    def _add_port(self, address: Address) -> int:
        if self._security.tls is None:
            return self._grpc.add_insecure_port(str(address))
        return self._grpc.add_secure_port(str(address), server_credentials(self._security.tls))

    def _interceptors(self, calls: CallInterceptor) -> list[Any]:
        """The outermost first."""
        return [calls] if self._tracing is None else [self._tracing.outermost, calls, self._tracing.innermost]

    async def _serve_health_alone(self) -> None:
        if self.config.health_address:
            self._health_endpoint = HealthEndpoint(self._health, Address.parse(self.config.health_address))
            self.health_address = await self._health_endpoint.start()

    def _engine_stopped(self) -> None:
        """Without its engine the server is of no use: health says so, whoever restarts it sees it."""
        self._say_alive(False)
        self._going_down = asyncio.ensure_future(self._health.enter_graceful_shutdown())
        self._asked_to_end.set()

    @property
    def metrics_port(self) -> int:
        return self._metrics_endpoint.port

    async def stop(self) -> None:
        """Drain and end: health says NOT_SERVING, connections get a GOAWAY, and running calls have `drain_seconds`.

        What runs beyond, such as a session whose client has nothing more to say, ends with UNAVAILABLE.
        Calls that come while it runs, or after, wait for the same end.
        """
        if self._stopping is None:
            self._stopping = asyncio.create_task(self._stop())
        await asyncio.shield(self._stopping)

    async def _stop(self) -> None:
        self._say_alive(False)
        await self._health.enter_graceful_shutdown()
        drain_seconds = self.config.drain_seconds
        if self._health.watchers:
            # They leave on this news and lose nothing. After a GOAWAY gRPC resets the calls that cross it on their way.
            leave_seconds = min(LEAVE_SECONDS, drain_seconds)
            await asyncio.sleep(leave_seconds)
            drain_seconds -= leave_seconds
        self._in_flight.close()
        self._watching_store.cancel()
        self._monitoring.close()
        # GOAWAY now: whoever does not follow health looks for another server with the next call. What runs goes on.
        leaving = asyncio.create_task(self._grpc.stop(drain_seconds + 2 * LAST_STEP_SECONDS + FLUSH_SECONDS))
        try:
            await asyncio.wait_for(self._in_flight.idle(), drain_seconds)
        except TimeoutError:
            logger.warning("calls still ran after %g s and are cancelled", self.config.drain_seconds)
            self._in_flight.end()
            await self.services.detached.ended(LAST_STEP_SECONDS)
            # Each call says itself why it ends; a call that gRPC cancels says nothing.
            with suppress(TimeoutError):
                await asyncio.wait_for(self._in_flight.idle(), LAST_STEP_SECONDS)
        await self._grpc.stop(FLUSH_SECONDS)
        await leaving
        if self._watchdog is not None:
            self._watchdog.cancel()
        if not await asyncio.to_thread(self.engine.shutdown, LAST_STEP_SECONDS):
            logger.critical("a step did not end within %g s\n%s", LAST_STEP_SECONDS, stacks())
            self.engine.failure = TimeoutError(f"a step did not end within {LAST_STEP_SECONDS:g} s")
        if self._health_endpoint is not None:
            await self._health_endpoint.stop()
        if self._local_socket is not None:
            self._local_socket.close()
        await asyncio.to_thread(self._metrics_endpoint.close)
        self.services.prompts.close()
        await asyncio.to_thread(self._monitoring.shared.close)
        self._watching_files.cancel()
        await asyncio.to_thread(self._security.close)
        if self._tracing is not None:
            await asyncio.to_thread(self._tracing.close, SPAN_FLUSH_SECONDS)

    @property
    def local_address(self) -> str:
        """Where this process reaches the server, whatever TLS its port has; callers are known by their tokens alone."""
        assert self._local_socket is not None
        return self._local_socket.address

    async def run(
        self,
        ready: Callable[[str], None],
        reserved: Reservation | None = None,
        beside: Callable[[], AbstractAsyncContextManager[None]] | None = None,
    ) -> None:
        """Serve until SIGTERM or SIGINT, then drain; `ready` gets the bound address. A second signal ends at once.
        `beside` is entered once the server takes calls, and left when it has drained.

        Raises EngineStopped, after every call has had its status, when the engine could not go on.
        """
        loop = asyncio.get_running_loop()
        for number in SIGNALS:
            loop.add_signal_handler(number, self._asked_to_end.set)
        address = await self.start(reserved)
        async with AsyncExitStack() as stack:
            stack.push_async_callback(self.stop)
            if beside is not None:
                await stack.enter_async_context(beside())
            ready(address)
            await self._asked_to_end.wait()
            for number in SIGNALS:
                loop.remove_signal_handler(number)
                # asyncio would take a second SIGINT for a reason to wait for every thread.
                signal.signal(number, signal.SIG_DFL)
            logger.info(
                "stopping: running calls have %g s to finish; a second signal ends at once", self.config.drain_seconds
            )
            await self.stop()
        if self.engine.failure is not None:
            raise EngineStopped(f"the engine stopped: {self.engine.failure!r}") from self.engine.failure


def _log_failure(task: "asyncio.Task[None]") -> None:
    if not task.cancelled() and task.exception() is not None:
        logger.critical("files are no longer read when they change", exc_info=task.exception())


def _log_store_failure(task: "asyncio.Task[None]") -> None:
    if not task.cancelled() and task.exception() is not None:
        logger.critical("watches of the store are no longer followed", exc_info=task.exception())


def _tracing(config: ServerConfig, model: ModelInfo) -> "Tracing | None":
    if config.tracing == "off":
        return None
    # OpenTelemetry is installed only where it is wanted.
    from patchclamp_server.rpc.tracing.spans import Tracing

    return Tracing(config.otlp_endpoint, model, version("patchclamp"), frozenset(SERVICES))

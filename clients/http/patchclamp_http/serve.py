"""The front as a server of HTTP, alone or beside a gRPC server in one event loop."""

import asyncio
import signal
import socket
import ssl
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AbstractContextManager, asynccontextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn
import uvloop
from starlette.types import ASGIApp

DEFAULT_ADDRESS = "127.0.0.1:8000"
DEFAULT_DRAIN_SECONDS = 30.0
BACKLOG = 2048
# An idle connection is kept for so long: clients that call every few seconds need not connect again.
KEEP_ALIVE_SECONDS = 75


@dataclass(frozen=True)
class Listening:
    """Where the front is reached: `host` without brackets; port 0 takes a free one.

    certificate, key: PEM files, for HTTPS. client_ca: PEM file; every caller must show a certificate of one of its CAs.
    """

    host: str
    port: int
    certificate: str | Path | None = None
    key: str | Path | None = None
    client_ca: str | Path | None = None

    @classmethod
    def parse(cls, address: str, **files: str | Path | None) -> "Listening":
        """Reads host:port or [IPv6 address]:port. Raises ValueError for other texts."""
        host, colon, port = address.rpartition(":")
        host = host.removeprefix("[").removesuffix("]")
        if not (colon and host and port.isascii() and port.isdecimal() and int(port) < 2**16):
            raise ValueError(f"expected host:port or [IPv6 address]:port, got {address!r}")
        return cls(host, int(port), **files)

    def __post_init__(self) -> None:
        if (self.certificate is None) != (self.key is None):
            raise ValueError("a certificate and its key belong together")
        if self.client_ca is not None and self.certificate is None:
            raise ValueError("certificates of callers need a certificate of the front")

    @property
    def scheme(self) -> str:
        return "http" if self.certificate is None else "https"

    def bind(self) -> socket.socket:
        """Returns a bound socket. Raises OSError with the address in it."""
        family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
        bound = socket.socket(family, socket.SOCK_STREAM)
        try:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind((self.host, self.port))
        except OSError as error:
            bound.close()
            raise OSError(f"{self.host}:{self.port}: {(error.strerror or str(error)).lower()}") from error
        return bound


@asynccontextmanager
async def serving(
    app: ASGIApp, listening: Listening, drain_seconds: float = DEFAULT_DRAIN_SECONDS
) -> AsyncIterator[str]:
    """Serves while the block runs, whose value is the URL; then running answers have `drain_seconds` to end.

    Raises OSError where the address cannot be had, or a PEM file not be read.
    """
    config = uvicorn.Config(
        app,
        log_config=None,
        log_level="warning",
        access_log=False,
        server_header=False,
        ws="none",
        backlog=BACKLOG,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=max(1, round(drain_seconds)),
        ssl_certfile=listening.certificate,
        ssl_keyfile=None if listening.key is None else str(listening.key),
        ssl_ca_certs=None if listening.client_ca is None else str(listening.client_ca),
        ssl_cert_reqs=ssl.CERT_NONE if listening.client_ca is None else ssl.CERT_REQUIRED,
    )
    bound = listening.bind()
    server = _Server(config)
    task = asyncio.create_task(server.serve(sockets=[bound]))
    begun = asyncio.create_task(server.begun.wait())
    await asyncio.wait((task, begun), return_when=asyncio.FIRST_COMPLETED)
    if task.done():
        begun.cancel()
        bound.close()
        await task
    port = bound.getsockname()[1]
    host = f"[{listening.host}]" if ":" in listening.host else listening.host
    try:
        yield f"{listening.scheme}://{host}:{port}"
    finally:
        server.should_exit = True
        await task


async def serve(
    app: ASGIApp, listening: Listening, ready: Callable[[str], None], drain_seconds: float = DEFAULT_DRAIN_SECONDS
) -> None:
    """Serves until SIGTERM or SIGINT; `ready` gets the URL."""
    asked_to_end = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, asked_to_end.set)
    async with serving(app, listening, drain_seconds) as url:
        ready(url)
        await asked_to_end.wait()
        for number in (signal.SIGTERM, signal.SIGINT):
            # A second one ends at once.
            loop.remove_signal_handler(number)
            signal.signal(number, signal.SIG_DFL)


def run(main: Coroutine[Any, Any, None]) -> None:
    """Runs a coroutine in uvloop's event loop."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main)


class _Server(uvicorn.Server):
    """Leaves signals to whoever runs the event loop, and tells when it has begun."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.begun = asyncio.Event()

    def capture_signals(self) -> AbstractContextManager[None]:  # type: ignore[override]
        return nullcontext()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.begun.set()

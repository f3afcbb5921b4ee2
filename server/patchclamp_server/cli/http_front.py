"""The HTTP front in the process of its server: `patchclamp serve --http`."""

from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any

from patchclamp.connection import Connection
from patchclamp_server.addresses import Address
from patchclamp_server.rpc.server import Server


class HttpFront:
    """A client of the server like any other, by a socket of its own. `url` is known once the server runs."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self.url = ""

    @asynccontextmanager
    async def beside(self) -> AsyncIterator[None]:
        """Serves while the block runs. Raises OSError where the address cannot be had."""
        # The packages of the extra `http` are installed only where they are wanted.
        from patchclamp_http import Listening, create_app, serving

        config = self._server.config
        address = Address.parse(config.http)
        listening = Listening(address.host, address.port, config.tls_certificate, config.tls_key, config.tls_client_ca)
        app = create_app(
            # Deadlines are those of the callers.
            Connection(self._server.local_address, timeout=None),
            allow_origins=config.http_allow_origins,
        )
        async with serving(app, listening) as self.url:
            yield

    def run(self, main: Coroutine[Any, Any, None]) -> None:
        """Runs the server in the event loop that serves HTTP fastest."""
        from patchclamp_http.serve import run

        run(main)

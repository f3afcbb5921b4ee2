"""A whole server in this process: its own event loop on its own thread, real channels, ephemeral ports."""

import asyncio
import threading
from concurrent.futures import Future
from pathlib import Path
from typing import Any
from urllib.request import urlopen

from patchclamp_server.model.load import LoadedModel
from patchclamp_server.rpc.config import ServerConfig
from patchclamp_server.rpc.server import Server


class LiveServer:
    """Use as a context manager. `server.engine` is there to be counted, not to be used."""

    def __init__(self, model: LoadedModel, artifacts: Path, **config: Any) -> None:
        self.model = model
        defaults = {"address": "127.0.0.1:0", "metrics_address": "127.0.0.1:0", "artifacts_url": str(artifacts)}
        self.server = Server(model, ServerConfig(**{**defaults, **config}))
        self.address = ""
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="live-server")

    def __enter__(self) -> "LiveServer":
        self._thread.start()
        try:
            self.address = self.run(self.server.start())
        except Exception:
            self._end()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self.run(self.server.stop())
        self._end()

    def _end(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def run(self, coroutine: Any) -> Any:
        """Result of a coroutine in the server's loop."""
        return self.begin(coroutine).result()

    def begin(self, coroutine: Any) -> Future[Any]:
        """Of a coroutine in the server's loop, which is not waited for."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def metrics(self) -> str:
        """What Prometheus would scrape now."""
        with urlopen(f"http://127.0.0.1:{self.server.metrics_port}/metrics") as response:
            return str(response.read().decode())

    def metric(self, sample: str) -> float:
        """Value of one sample, named with its labels as in the text format; 0 while it is not there."""
        for line in self.metrics().splitlines():
            name, _, value = line.rpartition(" ")
            if name == sample:
                return float(value)
        return 0.0

"""A whole front in this process: its own event loop on its own thread, a real socket on an ephemeral port."""

import asyncio
import threading
from contextlib import AsyncExitStack
from typing import Any

import openai
import uvloop

from patchclamp.connection import Connection
from patchclamp_http import Listening, create_app, serving


class LiveFront:
    """Use as a context manager: `url` is where it listens."""

    def __init__(self, address: str, listening: Listening | None = None, **connection: Any) -> None:
        self._connection = Connection(address, **connection)
        self._listening = listening or Listening("127.0.0.1", 0)
        self._loop = uvloop.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="live-front")
        self._stack = AsyncExitStack()

    def __enter__(self) -> "LiveFront":
        self._thread.start()
        app = create_app(self._connection)
        self.url: str = self._run(self._stack.enter_async_context(serving(app, self._listening, 1)))
        return self

    def __exit__(self, *exc: object) -> None:
        self._run(self._stack.aclose())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _run(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    def openai(self, **options: Any) -> openai.OpenAI:
        """The official client, as anybody installs it."""
        return openai.OpenAI(**{"base_url": f"{self.url}/v1", "api_key": "none", "max_retries": 0, **options})

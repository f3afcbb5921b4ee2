"""examples/fastapi_sse.py, called by ASGI: the text arrives as events, and a browser that leaves ends its sequence."""

import asyncio
import importlib.util
import json
from collections.abc import AsyncIterator
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import urlencode

import pytest
from live import LiveServer

from patchclamp import Client
from patchclamp.programs import add

pytest.importorskip("fastapi", reason="examples/fastapi_sse.py: fastapi is not installed (extra `dev`)")

ASKED = {"prompt": "My day was", "vector": "liking", "layer": 1, "strength": 1.5, "max_tokens": 12}


@pytest.fixture
async def example(examples: Path, server: LiveServer, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[ModuleType]:
    """The module, with its client open."""
    monkeypatch.setenv("PATCHCLAMP_ADDRESS", server.address)
    spec = importlib.util.spec_from_file_location("fastapi_sse", examples / "fastapi_sse.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    async with module.one_client(module.app):
        yield module


class Browser:
    """The other side of an ASGI application."""

    def __init__(self) -> None:
        self.status = 0
        self.body = ""
        self.has_read = asyncio.Event()
        self.has_left = asyncio.Event()
        self._is_asked = False

    async def get(self, app: Any, **query: object) -> list[tuple[str, Any]]:
        """The events of an answer: their names and data."""
        scope = {
            "type": "http",
            # As uvicorn says: the application is told when a browser leaves.
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": "GET",
            "scheme": "http",
            "path": "/generate",
            "raw_path": b"/generate",
            "query_string": urlencode(query).encode(),
            "root_path": "",
            "headers": [],
        }
        await app(scope, self._receive, self._send)
        parts = [part.split("\n") for part in self.body.split("\n\n") if part]
        return [(name.removeprefix("event: "), json.loads(data.removeprefix("data: "))) for name, data in parts]

    async def _receive(self) -> dict[str, object]:
        if not self._is_asked:
            self._is_asked = True
            return {"type": "http.request", "body": b"", "more_body": False}
        await self.has_left.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
        elif message.get("body"):
            self.body += message["body"].decode()
            self.has_read.set()


async def test_the_pieces_of_a_steered_answer_arrive_as_events_and_then_the_receipt(
    example: ModuleType, server: LiveServer
) -> None:
    events = await Browser().get(example.app, **ASKED)
    with Client(server.address) as client:
        edit = add("liking", layers=1, strength=1.5, name="liking")
        expected = client.generate("My day was", program=edit, max_tokens=12).result()
    assert "".join(data for name, data in events if name == "text") == expected.text
    name, receipt = events[-1]
    assert name == "receipt"
    assert receipt["program_fingerprint"] == expected.receipt.program_fingerprint
    assert receipt["touched"] is True


async def test_a_refusal_is_an_event_with_its_field(example: ModuleType) -> None:
    ((name, error),) = await Browser().get(example.app, **{**ASKED, "layer": 99})
    assert name == "error"
    assert error["code"] == "INVALID_ARGUMENT"
    assert error["violations"][0]["field"] == "program.edits[0].layers[0]"


async def test_a_browser_that_leaves_ends_its_sequence(example: ModuleType, server: LiveServer) -> None:
    browser = Browser()
    answer = asyncio.create_task(browser.get(example.app, **{**ASKED, "max_tokens": 200}))
    await browser.has_read.wait()
    browser.has_left.set()
    await answer
    async with asyncio.timeout(30):
        while server.metric("patchclamp_sequences_running"):
            await asyncio.sleep(0.01)
    assert "event: receipt" not in browser.body

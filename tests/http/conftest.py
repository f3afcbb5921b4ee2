"""A front before a real server of the tiny llama, and the official client of OpenAI that calls it."""

from collections.abc import Iterator

import openai
import pytest
from live import LiveServer
from live_front import LiveFront


@pytest.fixture(scope="session")
def front(live_server: LiveServer) -> Iterator[LiveFront]:
    with LiveFront(live_server.address) as front:
        yield front


@pytest.fixture(scope="session")
def client(front: LiveFront) -> Iterator[openai.OpenAI]:
    with front.openai() as client:
        yield client


@pytest.fixture(scope="session")
def model(client: openai.OpenAI) -> str:
    return next(iter(client.models.list())).id

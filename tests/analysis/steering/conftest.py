"""An engine and a server over the tiny model of tests/conftest.py, with a record of how every sequence ended."""

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import grpc
import pytest
from steering_fixtures import Live, Outcomes, Recorded

from patchclamp.v1.steering_pb2_grpc import SteeringServiceStub
from patchclamp_server.engine.config import EngineConfig
from patchclamp_server.engine.engine import Engine
from patchclamp_server.model.load import LoadedModel, load_model
from patchclamp_server.rpc.config import ServerConfig
from patchclamp_server.rpc.server import Server

# A step this short leaves time to cancel what was submitted.
SHORT_STEPS = EngineConfig(max_tokens_per_step=32)


@pytest.fixture(scope="session")
def tiny_llama(tiny_llama_dir: Path) -> LoadedModel:
    return load_model(str(tiny_llama_dir))


@pytest.fixture
def recorded(tiny_llama: LoadedModel) -> Iterator[Recorded]:
    engine = Engine(tiny_llama, SHORT_STEPS)
    engine.observer = outcomes = Outcomes()
    engine.start()
    yield Recorded(engine, outcomes)
    engine.shutdown()


@pytest.fixture
async def live(tiny_llama: LoadedModel, tmp_path: Path) -> AsyncIterator[Live]:
    config = ServerConfig(
        address="127.0.0.1:0", metrics_address="127.0.0.1:0", artifacts_url=str(tmp_path), engine=SHORT_STEPS
    )
    server = Server(tiny_llama, config)
    server.engine.observer = outcomes = Outcomes()
    address = await server.start()
    async with grpc.aio.insecure_channel(address) as channel:
        yield Live(server, channel, SteeringServiceStub(channel), outcomes)
    await server.stop()

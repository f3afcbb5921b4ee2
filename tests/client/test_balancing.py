"""One client and two real servers: the calls are shared, and a server that drains is left before it refuses any."""

import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from live import LiveServer
from secured import until

from patchclamp import AsyncClient, Client
from patchclamp_server.model.load import LoadedModel

CALLS = 'patchclamp_requests_total{{code="OK",method="{method}",service="patchclamp.v1.{service}"}}'
LISTED = CALLS.format(service="ModelService", method="ListModels")
GENERATED = CALLS.format(service="GenerationService", method="Generate")


@pytest.fixture
def model(live_server: LiveServer) -> LoadedModel:
    return live_server.model


@pytest.fixture
def servers(model: LoadedModel, tmp_path: Path) -> Iterator[list[LiveServer]]:
    with ExitStack() as stack:
        yield [stack.enter_context(LiveServer(model, tmp_path)) for _ in range(2)]


def target(servers: list[LiveServer]) -> str:
    return "ipv4:" + ",".join(server.address for server in servers)


def test_calls_are_shared_equally(servers: list[LiveServer]):
    with Client(target(servers)) as client:
        until(lambda: bool(client.models()) and all(server.metric(LISTED) for server in servers))
        before = [server.metric(LISTED) for server in servers]
        for _ in range(40):
            client.models()
        assert [server.metric(LISTED) - n for server, n in zip(servers, before, strict=True)] == [20, 20]


async def test_the_calls_of_the_async_client_are_shared_too(servers: list[LiveServer]):
    async with AsyncClient(target(servers)) as client:
        for _ in range(400):
            await client.models()
            if all(server.metric(LISTED) for server in servers):
                break
        before = [server.metric(LISTED) for server in servers]
        for _ in range(40):
            await client.models()
        assert [server.metric(LISTED) - n for server, n in zip(servers, before, strict=True)] == [20, 20]


def test_no_call_is_lost_when_one_server_after_the_other_is_restarted(model: LoadedModel, tmp_path: Path):
    servers = [LiveServer(model, tmp_path).__enter__() for _ in range(2)]
    addresses = [server.address for server in servers]
    done = threading.Event()
    lost: list[BaseException] = []

    def call(client: Client) -> None:
        while not done.is_set():
            try:
                client.generate("hello", max_tokens=4, ignore_eos=True, timeout=60).result()
                with client.session("hello", max_tokens=2, ignore_eos=True) as session:
                    session.result()
            except Exception as error:
                lost.append(error)
                return

    with Client(target(servers)) as client:
        callers = [threading.Thread(target=call, args=(client,)) for _ in range(4)]
        for caller in callers:
            caller.start()
        try:
            for i in range(2):
                until(lambda i=i: bool(lost) or servers[i].metric(GENERATED) > 2)
                servers[i].__exit__()
                servers[i] = LiveServer(model, tmp_path, address=addresses[i]).__enter__()
            until(lambda: bool(lost) or servers[1].metric(GENERATED) > 2)
        finally:
            done.set()
            for caller in callers:
                caller.join()
            for server in servers:
                server.__exit__()
    assert lost == []


def test_health_of_several_servers_is_told_although_calls_go_to_healthy_ones_only(servers: list[LiveServer]):
    with Client(target(servers)) as client:
        assert client.health() == "serving"
        for server in servers:
            server.run(server.server._set_alive(False))
        assert client.health() == "not_serving"

"""Watches from the clients and the command line, against a whole server of a tiny random llama."""

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import pytest
from live import LiveServer

from patchclamp import AsyncClient, Client, PatchclampError
from patchclamp.cli import main
from patchclamp.monitoring import watch_direction, watch_features, watch_neurons
from patchclamp.results import Progress
from patchclamp_server.model.load import load_model

T = TypeVar("T")
WIDTH = 32


@pytest.fixture(scope="module")
def server(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    with LiveServer(load_model(str(tiny_llama_dir)), tmp_path_factory.mktemp("watch_artifacts")) as live:
        yield live


@pytest.fixture
def client(server: LiveServer) -> Iterator[Client]:
    with Client(server.address) as client:
        yield client
        for watch in client.list_watches().watches:
            client.stop_watch(watch.name)


def generate(client: Client, tokens: int) -> None:
    """As many tokens as that are run through the model after the prompt."""
    client.generate("hello", max_tokens=tokens + 1, ignore_eos=True).result()


def test_a_watch_counts_what_is_served_and_drifts_from_its_reference(client: Client):
    items = [watch_neurons("n", 1, [3, 4]), watch_direction("up", [1.0] * WIDTH, layers=1)]
    created = client.create_watch([*items, watch_features("sae", 0, [[1.0] * WIDTH])], tags=["safety"])
    assert created.items == ("n/L1N3", "n/L1N4", "up", "sae")
    client.start_watch("safety", window_tokens=10)
    with client.record_reference("safety", tags=["usual"], use=True) as recording:
        assert next(recording) == Progress("tokens", 0, 10)
        generate(client, 10)
        assert recording.result().tags == ("usual",)
    generate(client, 10)
    found = client.watch_statistics("safety", ["up"])
    assert found.items[0].tokens == 20
    assert found.max_drift is not None
    assert found.watch.reference == client.get_artifact("usual").id


def test_activations_arrive_while_they_occur(client: Client):
    client.create_watch([watch_neurons("n", 1, [3])], tags=["one"])
    client.start_watch("one")
    with client.watch_activations("one", threshold=-1e9, max_events=4) as stream:
        counts = while_generating(client, stream.result)
    assert (counts.activations, counts.dropped) == (4, 0)


def while_generating(client: Client, call: Callable[[], T]) -> T:
    """What a call returns that waits for tokens to be served."""
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(call)
        while not waiting.done():
            generate(client, 4)
        return waiting.result()


def test_an_unknown_watch_is_refused_by_field(client: Client):
    with pytest.raises(PatchclampError) as refused:
        client.watch_statistics("nothing")
    assert (refused.value.code, refused.value.violations[0].field) == ("NOT_FOUND", "name")


async def test_the_async_client_does_the_same(server: LiveServer):
    async with AsyncClient(server.address) as client:
        await client.create_watch([watch_neurons("n", 1, [3])], tags=["async"])
        running = await client.start_watch("async", window_tokens=5)
        recording = client.record_reference("async")
        await anext(recording)
        await client.generate("hello", max_tokens=6, ignore_eos=True).result()
        reference = await recording.result()
        found = await client.watch_statistics("async")
        stopped = await client.stop_watch("async")
    assert (running.name, reference.provenance["watch"]) == ("async", running.watch)
    assert found.items[0].tokens == stopped.tokens == 5


def test_the_command_line_creates_starts_reads_and_stops(
    server: LiveServer, client: Client, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("PATCHCLAMP_ADDRESS", server.address)
    assert main(["watch", "create", "cli", "--neurons", "suspects=L1N3,4:p95", "--heads", "L0H1,L1H2:.8"]) == 0
    assert capsys.readouterr().out.split() == ["suspects/L1N3", "suspects/L1N4", "heads/L0H1", "heads/L1H2"]
    assert main(["watch", "start", "cli", "live", "--window-tokens", "8", "--buckets", "0", "1"]) == 0
    assert main(["watch", "start", "cli", "live"]) == 1
    assert "name: a watch named 'live' is running" in capsys.readouterr().err
    generate(client, 8)
    assert main(["watch", "list"]) == 0
    assert "live   4      8" in capsys.readouterr().out
    assert main(["watch", "stats", "live", "--item", "heads/L1H2"]) == 0
    assert capsys.readouterr().out.splitlines()[1].startswith("heads/L1H2  8")
    assert main(["watch", "stats", "live", "--json"]) == 0
    assert [item["tokens"] for item in json.loads(capsys.readouterr().out)["items"]] == [8] * 4
    reference = ["watch", "reference", "live", "usual-cli", "--use"]
    assert while_generating(client, lambda: main(reference)) == 0
    assert "stored as usual-cli = sha256:" in capsys.readouterr().err
    follow = ["watch", "follow", "live", "--threshold", "-1000", "--max-events", "3", "--json"]
    assert while_generating(client, lambda: main(follow)) == 0
    followed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [each["phase"] for each in followed] == ["generated"] * 3
    assert main(["watch", "stop", "live"]) == 0
    assert "live saw" in capsys.readouterr().err
    assert main(["vectors", "list", "--kind", "watch"]) == 0
    assert "cli" in capsys.readouterr().out

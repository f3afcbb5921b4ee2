"""Watches on several servers of one artifact store: started or stopped on one, they are so on all, also later on."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from live import LiveServer

from patchclamp import Client, PatchclampError
from patchclamp.monitoring import watch_neurons
from patchclamp.results.monitoring import RunningWatch
from patchclamp_server.engine.config import EngineConfig
from patchclamp_server.model.load import LoadedModel, load_model
from patchclamp_server.rpc.config import WatchAtStart


@pytest.fixture(scope="module")
def model(tiny_llama_dir: Path) -> LoadedModel:
    return load_model(str(tiny_llama_dir))


@contextmanager
def servers(model: LoadedModel, store: Path, *options: dict[str, object]) -> Iterator[list[tuple[LiveServer, Client]]]:
    """One for each `options`. They look at the store when a listing is asked for, and else never."""
    with ExitStack() as stack:
        running = []
        for own in options:
            server = stack.enter_context(LiveServer(model, store, **{"watch_poll_seconds": 3600.0, **own}))
            running.append((server, stack.enter_context(Client(server.address))))
        yield running


def listed(client: Client) -> dict[str, RunningWatch]:
    return {watch.name: watch for watch in client.list_watches().watches}


def generate(client: Client, tokens: int) -> None:
    """As many tokens as that are run through the model after the prompt."""
    client.generate("hello", max_tokens=tokens + 1, ignore_eos=True).result()


def test_a_watch_runs_on_every_server_of_the_store_and_ends_on_all(model: LoadedModel, tmp_path: Path) -> None:
    with servers(model, tmp_path, {}, {}) as [(_, one), (_, other)]:
        one.create_watch([watch_neurons("n", 1, [3], threshold="p90")], tags=["safety"])
        started = one.start_watch("safety", window_tokens=9, calibration_tokens=7, sampling_rate=0.5, buckets=[0, 1])
        found = listed(other)["safety"]
        assert (found.watch, found.window_tokens, found.calibration_tokens) == (started.watch, 9, 7)
        assert (found.sampling_rate, found.buckets, found.phases) == (0.5, (0.0, 1.0), started.phases)
        generate(other, 40)
        assert listed(other)["safety"].tokens > 0
        assert listed(one)["safety"].tokens == 0
        here, there = listed(one)["safety"].replicas
        assert here.replica == one.list_watches().replica != there.replica == other.list_watches().replica
        assert (here.state, there.state) == ("running", "running")
        other.stop_watch("safety")
        assert listed(one) == listed(other) == {}
        one.start_watch("safety")
        assert listed(other)["safety"].window_tokens == 4096


def test_a_server_looks_at_the_store_by_itself(model: LoadedModel, tmp_path: Path) -> None:
    with servers(model, tmp_path, {}, {"watch_poll_seconds": 0.1}) as [(_, one), (server, other)]:
        one.create_watch([watch_neurons("n", 1, [3])], tags=["safety"])
        one.start_watch("safety")
        seen = 0.0
        for _ in range(200):
            generate(other, 5)
            seen = server.metric('patchclamp_watch_tokens_total{watch="safety"}')
            if seen:
                break
        assert seen > 0


def test_a_watch_outlives_the_servers_and_goes_with_its_stop(model: LoadedModel, tmp_path: Path) -> None:
    with servers(model, tmp_path, {}) as [(_, client)]:
        client.create_watch([watch_neurons("n", 1, [3])], tags=["safety"])
        client.start_watch("safety", "first")
        client.start_watch("safety", "second")
        client.stop_watch("second")
    with servers(model, tmp_path, {}) as [(_, client)]:
        generate(client, 5)
        assert {name: watch.tokens for name, watch in listed(client).items()} == {"first": 5}


def test_of_two_starts_of_one_name_one_is_refused(model: LoadedModel, tmp_path: Path) -> None:
    with servers(model, tmp_path, {}, {}) as [(_, one), (_, other)]:
        one.create_watch([watch_neurons("n", 1, [3])], tags=["safety"])
        one.start_watch("safety", window_tokens=9)
        with pytest.raises(PatchclampError, match="running on a server of this store") as refused:
            other.start_watch("safety", window_tokens=11)
        assert (refused.value.code, refused.value.violations[0].field) == ("FAILED_PRECONDITION", "name")
        assert listed(other)["safety"].window_tokens == 9


def test_a_reference_that_one_server_records_is_used_by_all(model: LoadedModel, tmp_path: Path) -> None:
    with servers(model, tmp_path, {}, {}) as [(_, one), (_, other)]:
        one.create_watch([watch_neurons("n", 1, [3])], tags=["safety"])
        one.start_watch("safety", window_tokens=20)
        generate(other, 5)
        listed(other)
        generate(other, 5)
        with one.record_reference("safety", use=True) as recording:
            next(recording)
            generate(one, 20)
            reference = recording.result()
        found = listed(other)["safety"]
        # It goes on counting: another reference is no other watch.
        assert (found.reference, found.tokens) == (reference.id, 5)
        one.stop_watch("safety")
        one.start_watch("safety", window_tokens=20)
        assert listed(other)["safety"].reference == ""


def test_a_server_that_cannot_run_a_watch_says_so(model: LoadedModel, tmp_path: Path) -> None:
    small = {"engine": EngineConfig(max_watches=1)}
    with servers(model, tmp_path, {}, small) as [(_, one), (server, other)]:
        one.create_watch([watch_neurons("n", 1, [3])], tags=["safety"])
        one.start_watch("safety", "a")
        one.start_watch("safety", "b")
        found = listed(other)
        assert (found["a"].state, found["b"].state) == ("running", "refused")
        assert "1 watches are running, the most of this server" in found["b"].reason
        assert server.metric("patchclamp_watches_refused") == 1
        here, there = listed(one)["b"].replicas
        assert (here.state, there.state, there.reason) == ("running", "refused", found["b"].reason)
        one.stop_watch("a")
        assert {name: watch.state for name, watch in listed(other).items()} == {"b": "running"}
        assert server.metric("patchclamp_watches_refused") == 0


def test_a_watch_that_does_not_run_here_can_be_stopped_here(model: LoadedModel, tmp_path: Path) -> None:
    with servers(model, tmp_path, {}, {"engine": EngineConfig(max_watches=1)}) as [(_, one), (_, other)]:
        one.create_watch([watch_neurons("n", 1, [3])], tags=["safety"])
        one.start_watch("safety", "a")
        one.start_watch("safety", "b")
        listed(other)
        stopped = other.stop_watch("b")
        assert (stopped.name, stopped.state) == ("b", "refused")
        assert set(listed(one)) == {"a"}


def test_a_watch_of_the_command_line_belongs_to_its_server(model: LoadedModel, tmp_path: Path) -> None:
    with servers(model, tmp_path, {}) as [(_, client)]:
        client.create_watch([watch_neurons("n", 1, [3])], tags=["safety"])
    configured = {"watches": (WatchAtStart("mine", "safety"),)}
    with servers(model, tmp_path, configured, {}) as [(server, one), (_, other)]:
        assert listed(other) == {}
        assert listed(one)["mine"].configured
        other.start_watch("safety", "mine", window_tokens=9)
        found = listed(one)["mine"]
        # The server's own runs, and it says that that of the store does not.
        assert (found.configured, found.window_tokens) == (True, 4096)
        assert server.metric("patchclamp_watches_refused") == 1
        reasons = {each.replica: each.reason for each in listed(other)["mine"].replicas}
        assert "--watch" in reasons[one.list_watches().replica]
        assert one.stop_watch("mine").window_tokens == 4096
        assert listed(one)["mine"].window_tokens == 9


def test_a_record_that_is_damaged_is_told_and_can_be_stopped(model: LoadedModel, tmp_path: Path) -> None:
    with servers(model, tmp_path, {}) as [(_, client)]:
        client.create_watch([watch_neurons("n", 1, [3])], tags=["safety"])
        client.start_watch("safety", "good")
        [record] = tmp_path.glob("watches/*/good")
        (record.parent / "bad").write_text("{")
        found = listed(client)
        assert (found["good"].state, found["bad"].state) == ("running", "refused")
        assert "damaged" in found["bad"].reason
        client.stop_watch("bad")
        assert set(listed(client)) == {"good"}


def test_a_store_that_cannot_be_read_stops_no_watch(
    model: LoadedModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with servers(model, tmp_path, {}) as [(_, client)]:
        client.create_watch([watch_neurons("n", 1, [3])], tags=["safety"])
        client.start_watch("safety")
        [record] = tmp_path.glob("watches/*/safety")
        content = record.read_bytes()
        record.unlink()
        record.mkdir()
        (record / "x").mkdir()
        (record / "x" / "y").symlink_to(record / "x" / "y")
        assert set(listed(client)) >= {"safety"}
        assert "the watches stay as they are" in caplog.text
        (record / "x" / "y").unlink()
        (record / "x").rmdir()
        record.rmdir()
        record.write_bytes(content)
        assert listed(client)["safety"].state == "running"

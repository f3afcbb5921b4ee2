"""/metrics, as Prometheus reads it, after real calls."""

import re
from collections.abc import Iterator

import grpc
import pytest
from live import LiveServer
from prometheus_client.parser import text_string_to_metric_families
from test_generation_service import generate
from test_session import Client

from patchclamp.v1 import generation_pb2 as pb
from patchclamp.v1.generation_pb2_grpc import GenerationServiceStub

SESSION = 'service="patchclamp.v1.GenerationService",method="Session"'
GENERATE = 'service="patchclamp.v1.GenerationService",method="Generate"'
# Prometheus' base units and suffixes; what is left are gauges and histograms of counted things.
SUFFIXES = ("_total", "_seconds", "_bytes", "_ratio", "_nats", "_info")
COUNTED = ("_in_flight", "_running", "_waiting", "_blocks", "_blocks_free", "_blocks_cached", "_rows", "_tokens")
COUNTED_WATCHES = ("_watches", "_watches_refused", "_items", "_limit")
# Without a unit: activations of the model, and whether something is so.
BARE = (
    "patchclamp_watch_min",
    "patchclamp_watch_max",
    "patchclamp_watch_activation",
    "patchclamp_watch_item_threshold",
    "patchclamp_watch_calibrating",
    "patchclamp_serving",
)


@pytest.fixture(scope="module")
def live_server(live_server: LiveServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """A server of its own: what another test leaves behind must not be counted here."""
    with LiveServer(live_server.model, tmp_path_factory.mktemp("artifacts")) as server:
        yield server


def requests_total(server: LiveServer, method: str, code: str) -> float:
    return server.metric(f'patchclamp_requests_total{{code="{code}",{_sorted(method)}}}')


def _sorted(method: str) -> str:
    return ",".join(sorted(method.split(",")))


def test_a_call_counts_once_under_its_method_and_code(live_server: LiveServer, channel: grpc.Channel):
    before = requests_total(live_server, GENERATE, "OK")
    generate(channel)
    assert requests_total(live_server, GENERATE, "OK") == before + 1


def test_a_refusal_counts_under_its_code(live_server: LiveServer, channel: grpc.Channel):
    before = requests_total(live_server, GENERATE, "INVALID_ARGUMENT")
    with pytest.raises(grpc.RpcError):
        list(GenerationServiceStub(channel).Generate(pb.GenerateRequest()))
    assert requests_total(live_server, GENERATE, "INVALID_ARGUMENT") == before + 1


def test_a_method_that_does_not_exist_adds_no_label_of_the_clients_choice(
    live_server: LiveServer, channel: grpc.Channel
):
    with pytest.raises(grpc.RpcError):
        channel.unary_unary("/patchclamp.v1.GenerationService/DropTables")(b"")
    assert requests_total(live_server, 'service="unknown",method="unknown"', "UNIMPLEMENTED") >= 1
    assert "DropTables" not in live_server.metrics()


def test_tokens_and_latencies_are_counted(live_server: LiveServer, channel: grpc.Channel):
    names = (
        "patchclamp_time_to_first_token_seconds_count",
        "patchclamp_inter_token_seconds_count",
        'patchclamp_sequences_finished_total{outcome="length"}',
    )
    before = [live_server.metric(name) for name in names]
    decoded = live_server.metric("patchclamp_decode_tokens_total")
    steps = live_server.metric("patchclamp_step_seconds_count")
    generate(channel)
    assert [live_server.metric(name) - b for name, b in zip(names, before, strict=True)] == [1, 7, 1]
    assert live_server.metric("patchclamp_decode_tokens_total") > decoded
    assert live_server.metric("patchclamp_step_seconds_count") >= steps + 8


def test_a_call_is_in_flight_until_it_is_answered(live_server: LiveServer, channel: grpc.Channel):
    in_flight = f"patchclamp_requests_in_flight{{{_sorted(SESSION)}}}"
    session = Client(channel)
    session.send(advance=pb.Advance(tokens=1))
    session.tokens(1)
    assert live_server.metric(in_flight) == 1
    session.send(stop=pb.Stop())
    session.finished()
    session.close()
    assert live_server.metric(in_flight) == 0


def test_kv_blocks_are_shown(live_server: LiveServer):
    total = live_server.metric("patchclamp_kv_blocks")
    assert total == live_server.server.engine.stats().kv_blocks_total > 0
    assert 0 <= live_server.metric("patchclamp_kv_blocks_free") <= total


def test_a_server_that_serves_says_so(live_server: LiveServer):
    assert live_server.metric("patchclamp_serving") == 1


def test_names_follow_the_conventions(live_server: LiveServer, channel: grpc.Channel):
    generate(channel)
    for family in text_string_to_metric_families(live_server.metrics()):
        name = family.name + ("_total" if family.type == "counter" else "")
        if name.endswith("_created"):
            continue
        assert re.fullmatch(r"patchclamp_[a-z_]+", name)
        assert name.endswith(SUFFIXES + COUNTED + COUNTED_WATCHES) or name in BARE


def test_labels_are_of_closed_sets(live_server: LiveServer, channel: grpc.Channel):
    generate(channel)
    labels = {
        label
        for family in text_string_to_metric_families(live_server.metrics())
        for sample in family.samples
        for label in sample.labels
    }
    described = {"name", "architecture", "fingerprint", "dtype", "device", "activations"}
    closed = {"service", "method", "code", "outcome", "policy", "reason", "file", "tenant", "statistic", "le"}
    # Of watches that somebody started, and of the items of those that ask for it: as many as the caps allow.
    closed |= {"watch", "kind", "item"}
    assert labels <= closed | described

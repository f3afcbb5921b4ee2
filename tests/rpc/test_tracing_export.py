"""Tracing as an operator meets it: off unless asked for, never in the way of a call, and with its ids in the log."""

import argparse
import logging
import os
import secrets
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from live import LiveServer
from opentelemetry import baggage
from otlp_collector import Collector, values
from test_generation_service import generate
from test_interceptors import SERVICE

from patchclamp_server.cli.commands import TRACED_LOG_FORMAT
from patchclamp_server.cli.options import add_serve_arguments, config_from
from patchclamp_server.model.load import LoadedModel
from patchclamp_server.rpc.tracing.spans import Tracing, put_trace_ids_on_log_records

# A server without tracing and a client, in a process where nothing can import OpenTelemetry.
UNTRACED = """
import sys
from pathlib import Path
class Refusing:
    def find_spec(self, name, path=None, target=None):
        assert name.partition(".")[0] != "opentelemetry", name
sys.meta_path.insert(0, Refusing())
from live import LiveServer
from patchclamp import Client
from patchclamp_server.model.load import load_model
model, artifacts = sys.argv[1:]
with LiveServer(load_model(model), Path(artifacts)) as server, Client(server.address) as client:
    result = client.generate("hello", max_tokens=3, ignore_eos=True).result()
    pairs = [(f"good {i}", f"bad {i}") for i in range(8)]
    client.extract_vectors(pairs, "difference_of_means").result()
print(len(result.tokens), any(name.startswith("opentelemetry") for name in sys.modules))
"""


@pytest.fixture
def collector() -> Iterator[Collector]:
    with Collector() as collector:
        yield collector


@pytest.fixture
def model(live_server: LiveServer) -> LoadedModel:
    return live_server.model


def traced(model: LoadedModel, artifacts: Path, endpoint: str = "") -> LiveServer:
    return LiveServer(model, artifacts, tracing="otlp", otlp_endpoint=endpoint)


def call(server: LiveServer, times: int = 1) -> None:
    with grpc.insecure_channel(server.address) as channel:
        for _ in range(times):
            generate(channel)


def parse(*arguments: str) -> Any:
    parser = argparse.ArgumentParser(exit_on_error=False)
    add_serve_arguments(parser)
    return config_from(parser.parse_args(arguments))


def test_without_tracing_nothing_of_opentelemetry_is_imported(tiny_llama_dir: Path, tmp_path: Path):
    command = [sys.executable, "-c", UNTRACED, str(tiny_llama_dir), str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.stdout == "3 False\n", done.stderr


def test_it_is_off_unless_asked_for(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://localhost:4317")
    assert parse().tracing == "off"
    monkeypatch.setenv("PATCHCLAMP_TRACING", "otlp")
    assert (parse().tracing, parse().otlp_endpoint) == ("otlp", "")


@pytest.mark.parametrize("missing", ["opentelemetry", "opentelemetry.sdk", "opentelemetry.exporter.otlp.proto.grpc"])
def test_without_the_extra_it_is_refused_before_anything_is_loaded(monkeypatch: pytest.MonkeyPatch, missing: str):
    for name in [n for n in sys.modules if n.startswith("opentelemetry")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(argparse.ArgumentError, match=r"is not installed: .*pip install '\.\[otel\]'"):
        parse("--tracing", "otlp")
    assert parse("--tracing", "off").tracing == "off"


@pytest.mark.parametrize("endpoint", ["localhost:4317", "http://", "grpc://localhost:4317", "http://h:4318/v1/traces"])
def test_an_endpoint_is_a_url_of_a_host(endpoint: str):
    with pytest.raises(argparse.ArgumentError, match="http://host:port or https://host:port"):
        parse("--otlp-endpoint", endpoint)


def test_a_protocol_that_is_not_spoken_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf")
    with pytest.raises(argparse.ArgumentError, match="only grpc"):
        parse("--tracing", "otlp")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "grpc")
    assert parse("--tracing", "otlp").tracing == "otlp"


def test_endpoint_and_names_come_from_the_standard_variables(
    model: LoadedModel, tmp_path: Path, collector: Collector, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.endpoint)
    monkeypatch.setenv("OTEL_SERVICE_NAME", "laboratory")
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=test")
    with traced(model, tmp_path) as server:
        call(server)
    resource = values(collector.requests[0].resource_spans[0].resource.attributes)
    assert (resource["service.name"], resource["deployment.environment.name"]) == ("laboratory", "test")


def test_a_sampler_of_the_standard_variables_holds(
    model: LoadedModel, tmp_path: Path, collector: Collector, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "always_off")
    with traced(model, tmp_path, collector.endpoint) as server:
        call(server)
    assert collector.spans == []


def test_a_drain_sends_what_waits(
    model: LoadedModel, tmp_path: Path, collector: Collector, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "3600000")
    with traced(model, tmp_path, collector.endpoint) as server:
        call(server, times=3)
        assert collector.spans == []
    assert len(collector.spans) == 3 * 4


@pytest.mark.timeout(120)  # Who waits for this collector waits for ever.
def test_calls_do_not_wait_for_a_collector_and_what_it_does_not_take_is_bounded(
    model: LoadedModel, tmp_path: Path, collector: Collector, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "8")
    monkeypatch.setenv("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "4")
    collector.taking.clear()
    with traced(model, tmp_path, collector.endpoint) as server:
        call(server)
        collector.wait_until_asked()
        call(server, times=20)
        collector.taking.set()
    # The batch that was being taken, and the queue.
    assert len(collector.spans) <= 4 + 8


def test_calls_do_not_fail_without_a_collector(model: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("patchclamp_server.rpc.server.SPAN_FLUSH_SECONDS", 0.2)
    with traced(model, tmp_path, "http://127.0.0.1:1") as server:
        call(server, times=3)
        assert 'code="OK"' in server.metrics()


@pytest.mark.timeout(25)  # The SDK itself would wait for 30 s.
def test_the_end_waits_for_a_collector_only_so_long(
    model: LoadedModel, collector: Collector, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1000")
    collector.taking.clear()
    tracing = Tracing(collector.endpoint, model.info, "0", frozenset({SERVICE}))
    tracing.tracer.start_span("last").end()
    tracing.close(0.2)
    assert "they are lost" in caplog.text


class Speaker:
    """Logs, says what baggage it got, and fails."""

    async def answer(self, request: bytes, context: Any) -> bytes:
        logging.getLogger("speaker").warning("answering")
        return str(baggage.get_baggage("experiment")).encode()

    def handlers(self) -> dict[str, grpc.RpcMethodHandler]:
        return {"Answer": grpc.unary_unary_rpc_method_handler(self.answer)}


@pytest.fixture
def log_record_factory() -> Iterator[None]:
    before = logging.getLogRecordFactory()
    put_trace_ids_on_log_records()
    yield
    logging.setLogRecordFactory(before)


@pytest.fixture
async def channel(model: LoadedModel, collector: Collector) -> Any:
    tracing = Tracing(collector.endpoint, model.info, "0", frozenset({SERVICE}))
    server = grpc.aio.server(interceptors=[tracing.outermost, tracing.innermost])
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, Speaker().handlers()),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield channel
    await server.stop(None)
    tracing.close(5.0)


async def test_log_lines_of_a_call_carry_its_trace(
    channel: grpc.aio.Channel, log_record_factory: None, caplog: pytest.LogCaptureFixture
):
    trace_id = secrets.token_hex(16)
    metadata = (("traceparent", f"00-{trace_id}-{'1' * 16}-01"),)
    await channel.unary_unary(f"/{SERVICE}/Answer")(b"", metadata=metadata)
    logging.getLogger("speaker").warning("after it")
    lines = [logging.Formatter(TRACED_LOG_FORMAT).format(r) for r in caplog.records if r.name == "speaker"]
    assert [line.partition("WARNING ")[2] for line in lines] == [
        f"speaker trace_id={trace_id}: answering",
        "speaker trace_id=-: after it",
    ]


async def test_baggage_of_the_client_is_there_for_what_the_call_does(channel: grpc.aio.Channel):
    metadata = (("baggage", "experiment=joy"),)
    assert await channel.unary_unary(f"/{SERVICE}/Answer")(b"", metadata=metadata) == b"joy"

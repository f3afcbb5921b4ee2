"""Traces as a real collector gets them: one span a call, what the engine did below it, and no word of a prompt."""

import queue
import secrets
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import grpc
import pytest
from live import LiveServer
from opentelemetry import trace
from opentelemetry.proto.trace.v1.trace_pb2 import Status
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.semconv._incubating.attributes import gen_ai_attributes, rpc_attributes
from opentelemetry.semconv.attributes import error_attributes, exception_attributes
from otlp_collector import Call, Collector, values
from test_bad_input import add
from test_generation_service import STRONG, request
from test_sparsity_service import calibration, policy
from test_steering_service import extraction

from patchclamp import AsyncClient, Client, PatchclampError
from patchclamp.v1 import generation_pb2 as pb
from patchclamp.v1 import program_pb2 as program
from patchclamp.v1 import sparse_policy_pb2 as sparse
from patchclamp.v1.generation_pb2_grpc import GenerationServiceStub
from patchclamp.v1.sparsity_pb2_grpc import SparsityServiceStub
from patchclamp.v1.steering_pb2_grpc import SteeringServiceStub
from patchclamp_server.engine.config import EngineConfig

GENERATE = "/patchclamp.v1.GenerationService/Generate"
EDITED = program.Program(edits=[add(name="push", add=STRONG, strength=1.0)])


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    with Collector() as collector, pytest.MonkeyPatch.context() as environment:
        environment.setenv("OTEL_BSP_SCHEDULE_DELAY", "20")
        yield collector


@pytest.fixture(scope="module")
def server(
    live_server: LiveServer, collector: Collector, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LiveServer]:
    traced = {"tracing": "otlp", "otlp_endpoint": collector.endpoint, "engine": EngineConfig(max_sequences=1)}
    with LiveServer(live_server.model, tmp_path_factory.mktemp("traced"), **traced) as server:
        yield server


@pytest.fixture(scope="module")
def channel(server: LiveServer) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(server.address) as channel:
        yield channel


class Caller:
    """A client with a trace of its own, as W3C writes it."""

    def __init__(self, channel: grpc.Channel, *, sampled: bool = True) -> None:
        self.generation = GenerationServiceStub(channel)
        self.trace_id, self.span_id = secrets.token_hex(16), secrets.token_hex(8)
        flags = "01" if sampled else "00"
        self.metadata = (("traceparent", f"00-{self.trace_id}-{self.span_id}-{flags}"), ("tracestate", "vendor=lab"))

    def generate(self, **fields: Any) -> list[pb.GenerateResponse]:
        return list(self.generation.Generate(request(**fields), metadata=self.metadata))

    def refused(self, **fields: Any) -> grpc.RpcError:
        with pytest.raises(grpc.RpcError) as caught:
            self.generate(**fields)
        return caught.value


@pytest.fixture
def caller(channel: grpc.Channel) -> Caller:
    return Caller(channel)


def exception(call: Call) -> dict[str, Any]:
    [event] = call.span.events
    assert event.name == "exception"
    return values(event.attributes)


def test_a_call_is_a_server_span_over_queue_prefill_and_decode(caller: Caller, collector: Collector):
    caller.generate()
    call = collector.trace(caller.trace_id)
    assert call.span.name == GENERATE
    assert call.names == ["queue", "prefill", "decode"]
    queue, prefill, decode = call.below
    assert call.span.start_time_unix_nano <= queue.start_time_unix_nano
    assert queue.end_time_unix_nano == prefill.start_time_unix_nano
    assert prefill.end_time_unix_nano == decode.start_time_unix_nano
    assert decode.end_time_unix_nano <= call.span.end_time_unix_nano


@pytest.mark.parametrize("tokens", [1, 100])
def test_a_request_has_as_many_spans_however_many_tokens_it_has(caller: Caller, collector: Collector, tokens: int):
    caller.generate(stop=pb.StopConditions(max_tokens=tokens, ignore_eos=True))
    assert len(collector.trace(caller.trace_id).below) == 3


def test_the_span_continues_the_trace_of_the_client(caller: Caller, collector: Collector):
    caller.generate()
    span = collector.trace(caller.trace_id).span
    assert (span.parent_span_id.hex(), span.trace_state) == (caller.span_id, "vendor=lab")


@pytest.mark.parametrize(
    "wrong",
    ["", "nonsense", "00-" + "0" * 32 + "-" + "1" * 16 + "-01", "00-" + "g" * 32 + "-" + "1" * 16 + "-01", "ff" * 3000],
)
def test_a_wrong_traceparent_begins_a_trace(channel: grpc.Channel, collector: Collector, wrong: str):
    seed = secrets.randbits(62)
    asked = request(sampling=pb.Sampling(seed=seed))
    list(GenerationServiceStub(channel).Generate(asked, metadata=(("traceparent", wrong),)))
    call = collector.call(lambda s: values(s.attributes).get("gen_ai.request.seed") == seed)
    assert call.span.parent_span_id == b""


def test_the_span_says_what_was_asked_for_and_what_came_of_it(caller: Caller, collector: Collector):
    sampling = pb.Sampling(temperature=0.5, top_p=0.9, seed=7)
    *_, last = caller.generate(program=EDITED, sampling=sampling)
    attributes = collector.trace(caller.trace_id).attributes
    expected = {
        "rpc.system.name": "grpc",
        "rpc.method": "patchclamp.v1.GenerationService/Generate",
        "rpc.response.status_code": "OK",
        "gen_ai.operation.name": "text_completion",
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_p": pytest.approx(0.9),
        "gen_ai.request.seed": 7,
        "gen_ai.request.max_tokens": 8,
        "gen_ai.usage.input_tokens": 5,
        "gen_ai.usage.output_tokens": 8,
        "gen_ai.response.finish_reasons": ["length"],
        "patchclamp.program.fingerprint": last.finished.receipt.program_fingerprint,
        "patchclamp.program.edits": 1,
        "patchclamp.preemptions": 0,
    }
    assert {name: attributes[name] for name in expected} == expected


def test_a_seed_of_64_bits_is_no_number_of_a_span(caller: Caller, collector: Collector):
    caller.generate(sampling=pb.Sampling(seed=2**64 - 1))
    assert collector.trace(caller.trace_id).attributes["gen_ai.request.seed"] == str(2**64 - 1)


def test_names_of_conventions_are_names_of_the_library(caller: Caller, collector: Collector):
    caller.generate(sampling=pb.Sampling(seed=1))
    modules = (gen_ai_attributes, rpc_attributes, error_attributes, exception_attributes)
    known = {v for module in modules for v in vars(module).values() if isinstance(v, str)}
    call = collector.trace(caller.trace_id)
    names = set(call.attributes) | {a.key for s in call.below for a in s.attributes}
    assert {name for name in names if not name.startswith("patchclamp.")} <= known


def test_no_prompt_no_token_and_no_text_of_an_error_leaves_the_server(channel: grpc.Channel, collector: Collector):
    good, bad = Caller(channel), Caller(channel)
    chat = pb.Prompt(chat=pb.ChatMessages(messages=[pb.ChatMessage(role="user", content="open sesame")]))
    responses = good.generate(prompt=chat, stop=pb.StopConditions(max_tokens=8, ignore_eos=True, strings=["sesame"]))
    assert "sesame" in bad.refused(model="sesame").details()
    for caller in (good, bad):
        collector.trace(caller.trace_id)
    sent = b"".join(r.SerializeToString() for r in collector.requests)
    assert b"sesame" not in sent
    assert "".join(r.text for r in responses).encode() not in sent


def test_a_refused_call_carries_its_status_its_reason_and_the_field(caller: Caller, collector: Collector):
    caller.refused(sampling=pb.Sampling(temperature=-1.0))
    call = collector.trace(caller.trace_id)
    assert call.attributes["rpc.response.status_code"] == call.attributes["error.type"] == "INVALID_ARGUMENT"
    assert exception(call) == {
        "exception.type": "INVALID_FIELD",
        "patchclamp.error.field": "sampling.temperature",
    }
    # By the conventions of gRPC, this is no fault of the server.
    assert (call.span.status.code, call.names) == (Status.STATUS_CODE_UNSET, [])


def test_a_deadline_that_passed_is_an_error_with_what_was_done_until_then(caller: Caller, collector: Collector):
    sent: queue.Queue[pb.SessionRequest | None] = queue.Queue()
    sent.put(pb.SessionRequest(start=pb.SessionStart(request=request(), lockstep=True)))
    sent.put(pb.SessionRequest(advance=pb.Advance(tokens=1)))
    session = caller.generation.Session(iter(sent.get, None), metadata=caller.metadata, timeout=0.5)
    with pytest.raises(grpc.RpcError):
        list(session)
    sent.put(None)
    call = collector.trace(caller.trace_id)
    assert call.attributes["rpc.response.status_code"] == "DEADLINE_EXCEEDED"
    assert call.span.status.code == Status.STATUS_CODE_ERROR
    assert exception(call)["exception.type"] == "DEADLINE_EXCEEDED"
    assert call.names == ["queue", "prefill", "decode"]
    assert call.attributes["gen_ai.usage.output_tokens"] == 1


def test_a_cancelled_call_ends_its_span_with_what_was_done_until_then(caller: Caller, collector: Collector):
    sent: queue.Queue[pb.SessionRequest | None] = queue.Queue()
    sent.put(pb.SessionRequest(start=pb.SessionStart(request=request(), lockstep=True)))
    sent.put(pb.SessionRequest(advance=pb.Advance(tokens=2)))
    session = caller.generation.Session(iter(sent.get, None), metadata=caller.metadata)
    tokens = 0
    while tokens < 2:
        tokens += len(next(session).tokens)
    session.cancel()
    sent.put(None)
    call = collector.trace(caller.trace_id)
    assert call.attributes["rpc.response.status_code"] == "CANCELLED"
    assert exception(call)["exception.type"] == "CANCELLED"
    assert call.names == ["queue", "prefill", "decode"]
    assert values(call.child("decode").attributes)["gen_ai.usage.output_tokens"] == 2


def test_both_sides_of_a_comparison_are_below_its_span(caller: Caller, collector: Collector):
    asked = pb.CompareRequest(request=request(program=EDITED))
    list(caller.generation.Compare(asked, metadata=caller.metadata))
    call = collector.trace(caller.trace_id)
    edits: dict[int, set[int]] = {}
    for span in call.below:
        attributes = values(span.attributes)
        edits.setdefault(attributes["patchclamp.request"], set()).add(attributes["patchclamp.program.edits"])
    assert edits == {0: {1}, 1: {0}}
    assert sorted(call.names) == ["decode", "decode", "prefill", "prefill", "queue", "queue"]
    assert call.attributes["patchclamp.program.edits"] == 1


def test_scoring_has_no_decode(caller: Caller, collector: Collector):
    asked = pb.ScoreRequest(prompt=pb.Prompt(text="hello"), text=" world")
    caller.generation.Score(asked, metadata=caller.metadata)
    call = collector.trace(caller.trace_id)
    assert call.names == ["queue", "prefill"]
    assert call.attributes["gen_ai.usage.input_tokens"] == 5


@pytest.mark.parametrize(("allowed", "fell_back"), [(1e-9, True), (1e9, False)])
def test_the_policy_and_the_fallback_of_its_guard_are_said(
    caller: Caller, collector: Collector, allowed: float, fell_back: bool
):
    guard = sparse.QualityGuard(max_divergence=allowed, sample_rate=1.0, window=1)
    asked = sparse.Sparsity(policy=policy("griffin", keep_ratio=0.25), guard=guard)
    caller.generate(sparsity=asked)
    attributes = collector.trace(caller.trace_id).attributes
    assert attributes["patchclamp.sparsity.policy"] == "griffin"
    assert attributes["patchclamp.sparsity.guard_fallback"] is fell_back


def test_a_preemption_is_an_event_of_the_span_in_which_it_happened(
    channel: grpc.Channel, caller: Caller, collector: Collector
):
    # One place: the interactive request takes it from a session that waits for its client.
    sent: queue.Queue[pb.SessionRequest | None] = queue.Queue()
    start = pb.SessionStart(request=request(priority=pb.PRIORITY_ANALYSIS), lockstep=True)
    sent.put(pb.SessionRequest(start=start))
    sent.put(pb.SessionRequest(advance=pb.Advance(tokens=1)))
    session = caller.generation.Session(iter(sent.get, None), metadata=caller.metadata)
    assert next(session).tokens
    Caller(channel).generate()
    sent.put(pb.SessionRequest(advance=pb.Advance(tokens=7)))
    list(session)
    sent.put(None)
    call = collector.trace(caller.trace_id)
    assert [event.name for event in call.child("decode").events] == ["preempted"]
    assert not call.child("prefill").events
    assert call.attributes["patchclamp.preemptions"] == 1


def test_an_analysis_job_has_a_span_for_each_stage(channel: grpc.Channel, caller: Caller, collector: Collector):
    list(SteeringServiceStub(channel).ExtractVectors(extraction(), metadata=caller.metadata))
    call = collector.trace(caller.trace_id)
    assert call.names == ["activations", "directions", "tokens", "evidence"]
    first = call.below[0]
    assert first.start_time_unix_nano == call.span.start_time_unix_nano
    for stage, following in pairwise(call.below):
        assert stage.end_time_unix_nano == following.start_time_unix_nano
    assert values(first.attributes) == {"patchclamp.progress.done": 16, "patchclamp.progress.total": 16}


def test_a_job_that_waits_for_its_turn_has_a_queue(channel: grpc.Channel, caller: Caller, collector: Collector):
    asked = calibration(policy("fovea", keep_ratio=0.5))
    list(SparsityServiceStub(channel).CalibrateProfile(asked, metadata=caller.metadata))
    call = collector.trace(caller.trace_id)
    assert call.names[0] == "queue"
    assert "calibration" in call.names
    assert call.below[0].end_time_unix_nano == call.below[1].start_time_unix_nano


def test_a_trace_that_is_not_sampled_is_not_sent(channel: grpc.Channel, caller: Caller, collector: Collector):
    unsampled = Caller(channel, sampled=False)
    unsampled.generate()
    caller.generate()
    collector.trace(caller.trace_id)
    assert not [s for s in collector.spans if s.trace_id.hex() == unsampled.trace_id]


def test_probes_of_health_are_not_traced(channel: grpc.Channel, caller: Caller, collector: Collector):
    probe = Caller(channel)
    channel.unary_unary("/grpc.health.v1.Health/Check")(b"", metadata=probe.metadata)
    caller.generate()
    collector.trace(caller.trace_id)
    assert not [s for s in collector.spans if s.trace_id.hex() == probe.trace_id]


def test_the_resource_names_the_service_and_its_model(server: LiveServer, caller: Caller, collector: Collector):
    caller.generate()
    collector.trace(caller.trace_id)
    resource = values(collector.requests[0].resource_spans[0].resource.attributes)
    assert resource["service.name"] == "patchclamp"
    assert resource["patchclamp.model.fingerprint"] == server.model.info.fingerprint


def test_the_python_client_passes_its_current_span_along(server: LiveServer, collector: Collector):
    tracer = TracerProvider().get_tracer("a program of a user")
    with Client(server.address, token="secret") as client, tracer.start_as_current_span("work") as work:
        client.generate("hello", max_tokens=1).result()
    span = collector.trace(trace.format_trace_id(work.get_span_context().trace_id)).span
    assert span.parent_span_id == work.get_span_context().span_id.to_bytes(8)


async def test_so_does_the_client_for_asyncio(server: LiveServer, collector: Collector):
    tracer = TracerProvider().get_tracer("a program of a user")
    async with AsyncClient(server.address) as client:
        with tracer.start_as_current_span("work") as work, pytest.raises(PatchclampError):
            await client.generate("hello", temperature=-1.0).result()
    span = collector.trace(trace.format_trace_id(work.get_span_context().trace_id)).span
    assert span.parent_span_id == work.get_span_context().span_id.to_bytes(8)


def test_without_a_span_the_client_begins_no_trace(server: LiveServer, collector: Collector):
    seed = secrets.randbits(62)
    with Client(server.address) as client:
        client.generate("hello", max_tokens=1, seed=seed).result()
    call = collector.call(lambda s: values(s.attributes).get("gen_ai.request.seed") == seed)
    assert call.span.parent_span_id == b""

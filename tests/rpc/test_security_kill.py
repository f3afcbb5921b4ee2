"""The kill switch: for a tenant and for all, in the middle of a stream."""

import threading
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from live import LiveServer
from secured import Secured, Stream, generation, refusal, secured, until
from statuses import Failure
from test_head_service import edit as head_edit

from patchclamp.v1 import generation_pb2 as pb
from patchclamp.v1 import head_pb2_grpc
from patchclamp.v1 import program_pb2 as program
from patchclamp.v1.generation_pb2_grpc import GenerationServiceStub

DENIED = grpc.StatusCode.PERMISSION_DENIED
EVERYBODY = "tenants: {bad: {}, good: {}}"
BAD_IS_KILLED = "tenants: {bad: {kill: true}, good: {}}"


@pytest.fixture
def server(live_server: LiveServer, tmp_path: Path) -> Iterator[Secured]:
    with secured(live_server.model, tmp_path, "bad", "good", policy=EVERYBODY) as server:
        yield server


@pytest.fixture
def calls(server: Secured) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(server.server.address) as channel:
        yield channel


def is_killed(answer: Failure) -> bool:
    return (answer.code, answer.reason) == (DENIED, "KILLED")


def test_the_streams_of_the_tenant_end_and_those_of_its_neighbour_go_on(server: Secured, calls: grpc.Channel):
    alone = Stream(calls, server.metadata("good")).tokens(8)
    bad, good = Stream(calls, server.metadata("bad")), Stream(calls, server.metadata("good"))
    bad.tokens(2)
    begun = good.tokens(2)
    server.write_policy(BAD_IS_KILLED)
    assert is_killed(bad.refusal())
    # Not only does it go on: its tokens are those it has without a neighbour.
    assert begun + good.tokens(6) == alone
    good.end()


def test_new_calls_of_the_tenant_are_refused_until_the_switch_is_back(server: Secured, calls: grpc.Channel):
    server.write_policy(BAD_IS_KILLED)
    assert is_killed(server.refused(calls, "bad", generation()))
    assert server.generate(calls, "good", generation())
    server.write_policy(EVERYBODY)
    assert server.generate(calls, "bad", generation())


def test_the_switch_of_all_ends_everybody(server: Secured, calls: grpc.Channel):
    streams = [Stream(calls, server.metadata(tenant)) for tenant in ("bad", "good")]
    for stream in streams:
        stream.tokens(1)
    server.write_policy("{kill: true, tenants: {bad: {}, good: {}}}")
    assert all(is_killed(stream.refusal()) for stream in streams)
    assert is_killed(server.refused(calls, "good", generation()))


def test_a_tenant_that_leaves_the_policy_is_stopped(server: Secured, calls: grpc.Channel):
    stream = Stream(calls, server.metadata("bad"))
    stream.tokens(1)
    server.write_policy("tenants: {good: {}}")
    assert is_killed(stream.refusal())
    assert server.refused(calls, "bad", generation()).reason == "TENANT_UNKNOWN"


def test_what_it_held_in_the_engine_is_given_back(server: Secured, calls: grpc.Channel):
    for _ in range(3):
        Stream(calls, server.metadata("bad")).tokens(1)
    server.write_policy(BAD_IS_KILLED)
    until(lambda: server.server.metric("patchclamp_sequences_running") == 0)
    assert server.server.metric("patchclamp_queue_waiting") == 0


def test_a_stream_whose_client_does_not_read_ends_too(server: Secured, calls: grpc.Channel):
    """The server waits for room to write, and not for tokens."""
    most_likely = program.LogitLensReadout(k=128)
    lens = [
        program.Readout(name=str(n), site=program.SITE_RESID_POST, all_layers=True, logit_lens=most_likely)
        for n in range(32)
    ]
    wordy = generation(program=program.Program(readouts=lens), stop=pb.StopConditions(max_tokens=240, ignore_eos=True))
    stream = GenerationServiceStub(calls).Generate(wordy, metadata=server.metadata("bad"))
    generated = [0.0, 0.0]

    def stands_still() -> bool:
        generated.append(server.server.metric("patchclamp_decode_tokens_total"))
        return 0 < generated[-1] == generated[-2] == generated[-3]

    until(stands_still)
    in_flight = 'patchclamp_requests_in_flight{method="Generate",service="patchclamp.v1.GenerationService"}'
    assert server.server.metric(in_flight) == 1
    server.write_policy(BAD_IS_KILLED)
    until(lambda: server.server.metric(in_flight) == 0)
    assert is_killed(refusal(lambda: list(stream)))


def test_a_job_ends_with_the_requests_it_has_in_the_engine(server: Secured, calls: grpc.Channel):
    # More runs than end before the policy is read; the switch comes with the first sign of them.
    service = head_pb2_grpc.HeadServiceStub(calls)
    job = service.EvaluateHeadEdit(head_edit(random_sets=100), metadata=server.metadata("bad"))
    answers: list[Failure] = []
    waiting = threading.Thread(target=lambda: answers.append(refusal(lambda: list(job))))
    waiting.start()
    until(lambda: server.server.metric("patchclamp_steps_total") > 0)
    server.write_policy(BAD_IS_KILLED)
    waiting.join()
    assert is_killed(answers[0])
    until(lambda: server.server.metric("patchclamp_sequences_running") == 0)

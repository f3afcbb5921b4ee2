"""Requests of MonitoringService with anything in their fields: answered, or refused by field, never a fault of ours."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from live import LiveServer
from random_requests import mutated
from seed_requests import monitoring, start_watch
from statuses import Failure, failure

from patchclamp import Client
from patchclamp.v1 import monitoring_pb2 as pb
from patchclamp.v1.monitoring_pb2_grpc import MonitoringServiceStub
from patchclamp_server.model.load import load_model

REFUSALS = (
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.ALREADY_EXISTS,
    grpc.StatusCode.FAILED_PRECONDITION,
)
REQUESTS = {name.rpartition("/")[2]: call for name, [[call]] in monitoring().items()}


@pytest.fixture(scope="module")
def server(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    with LiveServer(load_model(str(tiny_llama_dir)), tmp_path_factory.mktemp("artifacts")) as server:
        yield server


@pytest.fixture(scope="module")
def stub(server: LiveServer) -> Iterator[MonitoringServiceStub]:
    with grpc.insecure_channel(server.address) as channel:
        stub = MonitoringServiceStub(channel)
        stub.CreateWatch(REQUESTS["CreateWatch"])
        yield stub


def with_those_named_running(stub: MonitoringServiceStub, method: str) -> None:
    """The watches that the requests name run, and no others; not the one that is to be started."""
    for watch in stub.ListWatches(pb.ListWatchesRequest()).watches:
        stub.StopWatch(pb.StopWatchRequest(name=watch.name))
    stub.StartWatch(start_watch("w"))
    if method != "StartWatch":
        stub.StartWatch(start_watch("other"))


def refusal(stub: MonitoringServiceStub, method: str, request: Any) -> Failure | None:
    """Streams are cancelled as soon as they have begun: they would wait for what nobody generates."""
    try:
        answer = getattr(stub, method)(request)
        if method == "RecordReference":
            next(answer)
        elif method == "WatchActivations":
            answer.initial_metadata()
            answer.cancel()
            list(answer)
    except grpc.RpcError as error:
        found = failure(error)
        return None if found.code is grpc.StatusCode.CANCELLED else found
    return None


@pytest.mark.parametrize("method", REQUESTS)
def test_what_is_changed_was_right(stub: MonitoringServiceStub, method: str) -> None:
    with_those_named_running(stub, method)
    assert refusal(stub, method, REQUESTS[method]) is None


@pytest.mark.parametrize("method", REQUESTS)
@given(data=st.data())
@settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
def test_whatever_a_request_holds_it_is_answered_or_refused_by_field(
    stub: MonitoringServiceStub, method: str, data: st.DataObject
) -> None:
    with_those_named_running(stub, method)
    refused = refusal(stub, method, mutated(data.draw(st.randoms(use_true_random=False)), REQUESTS[method]))
    if refused is not None:
        assert refused.code in REFUSALS
        assert refused.details["ErrorInfo"].metadata["field"]


def test_a_watch_still_counts(server: LiveServer, stub: MonitoringServiceStub) -> None:
    with_those_named_running(stub, "")
    with Client(server.address) as client:
        client.generate("hello", max_tokens=3, ignore_eos=True).result()
        assert client.watch_statistics("w").watch.tokens == 2

"""Analysis requests with anything in their fields: answered or refused by field, never a fault of the server."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from live import LiveServer
from random_requests import mutated
from seed_requests import PROMPT, calls
from statuses import Failure, failure

from patchclamp.v1 import generation_pb2
from patchclamp.v1.activation_pb2_grpc import ActivationServiceStub
from patchclamp.v1.generation_pb2_grpc import GenerationServiceStub
from patchclamp.v1.head_pb2_grpc import HeadServiceStub
from patchclamp.v1.neuron_pb2_grpc import NeuronServiceStub
from patchclamp.v1.sparsity_pb2_grpc import SparsityServiceStub
from patchclamp_server.artifacts.store import ArtifactStore
from patchclamp_server.artifacts.types import ArtifactKind
from patchclamp_server.model.load import load_model
from patchclamp_server.model.sites import Site

CODES = grpc.StatusCode
# A name that is taken is one whose replacement was not asked for.
REFUSALS = (CODES.INVALID_ARGUMENT, CODES.NOT_FOUND, CODES.FAILED_PRECONDITION, CODES.ALREADY_EXISTS)
ANALYSES = ("HeadService", "SparsityService", "NeuronService", "ActivationService")
REQUESTS = {
    name.rpartition("/")[2]: [message for [message] in each]
    for name, each in calls().items()
    if name.removeprefix("patchclamp.v1.").startswith(ANALYSES)
}


@st.composite
def requests(draw: st.DrawFn, method: str) -> Any:
    return mutated(draw(st.randoms(use_true_random=False)), draw(st.sampled_from(REQUESTS[method])))


@pytest.fixture(scope="module")
def server(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    artifacts, others = tmp_path_factory.mktemp("artifacts"), (("other", str(tiny_llama_dir)),)
    with LiveServer(load_model(str(tiny_llama_dir)), artifacts, match_models=others) as server:
        store, made_for = ArtifactStore(server.server.config.artifacts_url), server.model.info.fingerprint
        heads, neurons = {"scores": torch.rand(2, 4)}, {"layer.0.neurons": torch.arange(4)}
        store.put(ArtifactKind.HEAD_SET, heads, model_fingerprint=made_for, tags=["heads"])
        store.put(ArtifactKind.NEURON_SET, neurons, model_fingerprint=made_for, tags=["neurons"])
        vector, site = {f"layer.{layer}": torch.ones(32) for layer in range(2)}, Site.RESID_POST
        store.put(ArtifactKind.VECTOR, vector, model_fingerprint=made_for, site=site, tags=["vector"])
        yield server


@pytest.fixture(scope="module")
def channel(server: LiveServer) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(server.address) as channel:
        yield channel


def refusal(channel: grpc.Channel, method: str, request: Any) -> Failure | None:
    kinds = (HeadServiceStub, SparsityServiceStub, NeuronServiceStub, ActivationServiceStub)
    stubs = [kind(channel) for kind in kinds]
    stub = next(stub for stub in stubs if hasattr(stub, method))
    try:
        answer = getattr(stub, method)(request)
        if isinstance(answer, grpc.Call):
            list(answer)
    except grpc.RpcError as error:
        return failure(error)
    return None


@pytest.mark.parametrize("method", REQUESTS)
def test_what_is_changed_was_right(channel: grpc.Channel, method: str) -> None:
    refused = [refusal(channel, method, request) for request in REQUESTS[method]]
    if method == "DetectRetrievalHeads":
        # A random model finds no needle.
        assert [each and each.code for each in refused] == [grpc.StatusCode.FAILED_PRECONDITION]
    else:
        assert refused == [None] * len(refused)


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
    channel: grpc.Channel, method: str, data: st.DataObject
) -> None:
    refused = refusal(channel, method, data.draw(requests(method)))
    if refused is not None:
        assert refused.code in REFUSALS
        assert refused.details["ErrorInfo"].metadata["field"]


def test_the_server_still_generates(channel: grpc.Channel) -> None:
    stop = generation_pb2.StopConditions(max_tokens=2)
    request = generation_pb2.GenerateRequest(prompt=PROMPT, stop=stop)
    assert list(GenerationServiceStub(channel).Generate(request))

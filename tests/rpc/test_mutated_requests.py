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
from statuses import Failure, failure

from patchclamp.v1 import generation_pb2, head_pb2, sparse_policy_pb2, sparsity_pb2
from patchclamp.v1.generation_pb2_grpc import GenerationServiceStub
from patchclamp.v1.head_pb2_grpc import HeadServiceStub
from patchclamp.v1.sparsity_pb2_grpc import SparsityServiceStub
from patchclamp_server.artifacts.store import ArtifactStore
from patchclamp_server.artifacts.types import ArtifactKind
from patchclamp_server.model.load import load_model

REFUSALS = (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND, grpc.StatusCode.FAILED_PRECONDITION)
PROMPT = generation_pb2.Prompt(text="hello")
NEEDLES = head_pb2.NeedleTest(
    haystacks=["It rained. " * 20],
    needles=[head_pb2.Needle(question="Which?", needle="The key is red.", answer="red")],
    lengths=[150],
    depths=[0.5],
    max_runs=1,
)
TEXT = sparsity_pb2.SparsityText(texts=["It rained. " * 8], document_tokens=16)
GRIFFIN = sparse_policy_pb2.SparsePolicy(griffin=sparse_policy_pb2.GriffinPolicy(), keep_ratio=0.5)
HEADS = head_pb2.HeadSelection(head_set="heads", top_k=1)
PAIR = head_pb2.CleanCorruptPair(
    clean=generation_pb2.Prompt(text="AAAAAAAA is"),
    corrupt=generation_pb2.Prompt(text="zzzzzzzz is"),
    clean_answer="d",
    corrupt_answer="Y",
)
FACTS = [head_pb2.TemporalFact(prompt=f"In 19{i}0", answer="x", time_conditioned=i < 2) for i in range(4)]

REQUESTS: dict[str, list[Any]] = {
    "DetectRetrievalHeads": [
        head_pb2.DetectRetrievalHeadsRequest(test=NEEDLES, stopping=head_pb2.StoppingRule(top_k=2), tags=["t"])
    ],
    "ScoreHeads": [
        head_pb2.ScoreHeadsRequest(method="HEAD_SCORE_METHOD_NGRAM", ngram=2, sequence_tokens=8, sequences=2),
        head_pb2.ScoreHeadsRequest(method="HEAD_SCORE_METHOD_INDUCTION", sequence_tokens=8, sequences=1),
        head_pb2.ScoreHeadsRequest(method="HEAD_SCORE_METHOD_TEMPORAL", facts=FACTS),
        head_pb2.ScoreHeadsRequest(method="HEAD_SCORE_METHOD_SUCCESSOR"),
    ],
    "EvaluateHeadEdit": [
        head_pb2.EvaluateHeadEditRequest(
            heads=HEADS, mode="HEAD_EDIT_MODE_SCALE", scale=0.5, random_sets=1, test=NEEDLES, texts=["It rained."]
        )
    ],
    "FindCircuit": [
        head_pb2.FindCircuitRequest(method=method, pairs=[PAIR], circuit_size=2, random_sets=1)
        for method in ("CIRCUIT_METHOD_MEAN_ABLATION", "CIRCUIT_METHOD_PATH_PATCHING")
    ],
    "CompareHeadSets": [head_pb2.CompareHeadSetsRequest(head_sets=["heads", "heads"], top_k=2)],
    "AttributeLogits": [head_pb2.AttributeLogitsRequest(prompt=PROMPT, target="a", contrast="b", top_heads=1)],
    "CalibrateProfile": [
        sparsity_pb2.CalibrateProfileRequest(
            policy=sparse_policy_pb2.SparsePolicy(**{name: {}}, keep_ratio=0.5), text=TEXT, holdout_fraction=0.25
        )
        for name in ("teal", "cats", "fovea", "coreinfer_similarity", "static_set")
    ],
    "EvaluateProfile": [
        sparsity_pb2.EvaluateProfileRequest(sparsities=[sparse_policy_pb2.Sparsity(policy=GRIFFIN)], text=TEXT)
    ],
    "PredictCoreNeurons": [
        sparsity_pb2.PredictCoreNeuronsRequest(
            sparsity=sparse_policy_pb2.Sparsity(policy=GRIFFIN), prompts=[PROMPT, PROMPT], layers=[0]
        )
    ],
}


@st.composite
def requests(draw: st.DrawFn, method: str) -> Any:
    return mutated(draw, draw(st.sampled_from(REQUESTS[method])))


@pytest.fixture(scope="module")
def server(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    with LiveServer(load_model(str(tiny_llama_dir)), tmp_path_factory.mktemp("artifacts")) as server:
        ArtifactStore(server.server.config.artifacts_url).put(
            ArtifactKind.HEAD_SET,
            {"scores": torch.rand(2, 4)},
            model_fingerprint=server.model.info.fingerprint,
            tags=["heads"],
        )
        yield server


@pytest.fixture(scope="module")
def channel(server: LiveServer) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(server.address) as channel:
        yield channel


def refusal(channel: grpc.Channel, method: str, request: Any) -> Failure | None:
    stub = next(stub for stub in (HeadServiceStub(channel), SparsityServiceStub(channel)) if hasattr(stub, method))
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

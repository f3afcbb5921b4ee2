"""SparsityService, and sparse requests, through a real channel: calibrate, serve, evaluate, compare cores, cancel."""

import random
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import grpc
import pytest
import torch
from google.protobuf.json_format import MessageToDict
from live import LiveServer
from statuses import Failure, failure

from patchclamp.v1 import artifact_pb2, generation_pb2, sparse_policy_pb2
from patchclamp.v1 import sparsity_pb2 as pb
from patchclamp.v1.artifact_pb2_grpc import ArtifactServiceStub
from patchclamp.v1.generation_pb2_grpc import GenerationServiceStub
from patchclamp.v1.sparsity_pb2_grpc import SparsityServiceStub
from patchclamp_server.analysis.sparsity.calibrate import CALIBRATIONS
from patchclamp_server.artifacts.formats import safetensors
from patchclamp_server.artifacts.store import ArtifactStore
from patchclamp_server.artifacts.types import ArtifactKind
from patchclamp_server.model.load import load_model
from patchclamp_server.model.sites import Site

LAYERS, D_FF, TOKENS = 2, 64, 32
WORDS = ("river", "stone", "lamp", "garden", "window", "letter", "bridge", "kettle", "of", "the", "and", "under")

Policy = sparse_policy_pb2.SparsePolicy
Sparsity = sparse_policy_pb2.Sparsity


def words(n: int, seed: int = 0) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=n))


# A token a byte: nine documents and a rest that fills none, and a text too short for any.
TEXT = pb.SparsityText(texts=[words(60)[: 9 * TOKENS + 5], "short"], document_tokens=TOKENS, description="words")


@pytest.fixture(scope="module")
def server(tiny_llama_dir: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    with LiveServer(load_model(str(tiny_llama_dir)), tmp_path_factory.mktemp("artifacts")) as server:
        yield server


@pytest.fixture(scope="module")
def channel(server: LiveServer) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(server.address) as channel:
        yield channel


@pytest.fixture
def stub(channel: grpc.Channel) -> SparsityServiceStub:
    return SparsityServiceStub(channel)


@pytest.fixture(scope="module")
def store(server: LiveServer) -> ArtifactStore:
    """The server's own, with artifacts that are of no use as profiles of its model."""
    store = ArtifactStore(server.server.config.artifacts_url)
    info = server.model.info
    store.put(
        ArtifactKind.SPARSITY_PROFILE,
        {"quantiles": torch.ones(LAYERS, 201)},
        model_fingerprint="sha256:" + "0" * 64,
        provenance={"policy": "cats"},
        tags=["foreign"],
    )
    store.put(
        ArtifactKind.VECTOR,
        {"layer.0": torch.ones(32)},
        model_fingerprint=info.fingerprint,
        site=Site.RESID_POST,
        tags=["vector"],
    )
    store.put(
        ArtifactKind.NEURON_SET,
        {"layer.0.neurons": torch.arange(16), "layer.1.neurons": torch.tensor([0, 9, 40])},
        model_fingerprint=info.fingerprint,
        tags=["neurons"],
    )
    return store


@pytest.fixture(scope="module")
def calibrated(channel: grpc.Channel, store: ArtifactStore) -> pb.CalibratedProfile:
    """A fovea profile with the tag "fovea"."""
    return calibrate(channel, policy("fovea", keep_ratio=0.5), tags=["fovea"])


def policy(name: str, **fields: Any) -> Policy:
    message = Policy(**fields)
    if message.WhichOneof("policy") is None:
        getattr(message, name).SetInParent()
    return message


def calibration(asked: Policy, **fields: Any) -> pb.CalibrateProfileRequest:
    return pb.CalibrateProfileRequest(**{"policy": asked, "text": TEXT, **fields})


def calibrate(channel: grpc.Channel, asked: Policy, **fields: Any) -> pb.CalibratedProfile:
    *_, last = SparsityServiceStub(channel).CalibrateProfile(calibration(asked, **fields))
    assert last.HasField("result")
    return last.result


def evaluation(*sparsities: Sparsity, **fields: Any) -> pb.EvaluateProfileRequest:
    return pb.EvaluateProfileRequest(**{"sparsities": sparsities, "text": TEXT, **fields})


def evaluate(stub: SparsityServiceStub, *sparsities: Sparsity, **fields: Any) -> list[pb.SparsityEvaluation]:
    events = stub.EvaluateProfile(evaluation(*sparsities, **fields))
    return [event.evaluation for event in events if event.HasField("evaluation")]


def asks_for(*names: str, **fields: Any) -> list[Sparsity]:
    return [Sparsity(policy=policy(name, **fields)) for name in names]


def refusal(call: Any) -> Failure:
    with pytest.raises(grpc.RpcError) as caught:
        list(call)
    return failure(caught.value)


def unary_refusal(call: Any, request: Any) -> Failure:
    with pytest.raises(grpc.RpcError) as caught:
        call(request)
    return failure(caught.value)


def field_of(refused: Failure) -> str:
    return str(refused.details["ErrorInfo"].metadata["field"])


def is_sane(card: pb.QualityCard) -> bool:
    ranges = card.perplexity_ratio > 0 and card.divergence >= 0 and 0 <= card.top1_agreement <= 1
    return ranges and 0 <= card.sparsity <= 1 and card.bytes_read_16 >= 0 and card.dense_perplexity > 1


@pytest.mark.parametrize("name", CALIBRATIONS)
def test_calibration_tells_its_progress_and_then_the_stored_profile(
    stub: SparsityServiceStub, server: LiveServer, name: str
) -> None:
    greedy = sparse_policy_pb2.TealPolicy(allocation=sparse_policy_pb2.TEAL_ALLOCATION_GREEDY)
    asked = Policy(teal=greedy) if name == "teal" else policy(name)
    *progress, last = stub.CalibrateProfile(calibration(asked, tags=[f"all-{name}"], description="of words"))
    seen = [(e.progress.stage, e.progress.done, e.progress.total) for e in progress]
    # Of nine documents two are held out; they are measured under the policy and under its control.
    total = 7 + (LAYERS if name in ("fovea", "teal") else 0)
    first = [event for event in seen if event[0] == "calibration"]
    assert first[-1] == ("calibration", total, total)
    assert all(a[1] < b[1] for a, b in pairwise(first))
    assert seen[len(first) :] == [("quality", done, 4) for done in range(1, 5)]
    artifact = last.result.artifact
    assert (artifact.kind, artifact.tags) == (artifact_pb2.ARTIFACT_KIND_SPARSITY_PROFILE, [f"all-{name}"])
    assert (artifact.description, artifact.model_fingerprint) == ("of words", server.model.info.fingerprint)
    provenance = MessageToDict(artifact.provenance)
    assert provenance["policy"] == name
    assert provenance["parameters"]["keep_ratio"] == 0.5
    assert provenance["text"] | {"digest": ""} == {
        "description": "words",
        "digest": "",
        "documents": 7,
        "heldout_documents": 2,
        "document_tokens": TOKENS,
    }
    assert provenance["text"]["digest"].startswith("sha256:")
    quality = last.result.quality
    assert is_sane(quality)
    assert is_sane(last.result.random_control)
    assert (quality.documents, quality.scored_tokens) == (2, 2 * (TOKENS // 2 - 1))
    card = MessageToDict(artifact.evidence)
    assert card["quality"]["divergence"] == pytest.approx(quality.divergence)
    assert card["random_control"]["perplexity_ratio"] == pytest.approx(last.result.random_control.perplexity_ratio)


def test_a_stored_profile_serves_what_was_calibrated(
    channel: grpc.Channel, server: LiveServer, calibrated: pb.CalibratedProfile
) -> None:
    """Measured again from the store on the same documents, the card is the same."""
    documents = 2
    held_out = TEXT.texts[0][(9 - documents) * TOKENS : 9 * TOKENS]
    text = pb.SparsityText(texts=[held_out], document_tokens=TOKENS)
    [again] = evaluate(SparsityServiceStub(channel), Sparsity(profile="fovea"), text=text)
    assert again.quality.perplexity_ratio == pytest.approx(calibrated.quality.perplexity_ratio)
    assert again.quality.divergence == pytest.approx(calibrated.quality.divergence)
    assert (again.policy, again.keep_ratio) == ("fovea", 0.5)


def test_a_profile_can_be_downloaded_and_uploaded_again(
    channel: grpc.Channel, calibrated: pb.CalibratedProfile
) -> None:
    artifacts = ArtifactServiceStub(channel)
    request = artifact_pb2.DownloadRequest(ref=calibrated.artifact.id, format=artifact_pb2.ARTIFACT_FORMAT_SAFETENSORS)
    data = b"".join(part.chunk for part in artifacts.Download(request))
    assert "gate_error.3" in safetensors.decode(data).tensors
    header = artifact_pb2.UploadHeader(
        kind=artifact_pb2.ARTIFACT_KIND_SPARSITY_PROFILE,
        format=artifact_pb2.ARTIFACT_FORMAT_SAFETENSORS,
        size_bytes=len(data),
    )
    parts = [artifact_pb2.UploadRequest(header=header), artifact_pb2.UploadRequest(chunk=data)]
    assert artifacts.Upload(iter(parts)).artifact.id == calibrated.artifact.id


def test_the_same_text_gives_the_same_profile(channel: grpc.Channel, calibrated: pb.CalibratedProfile) -> None:
    assert calibrate(channel, policy("fovea", keep_ratio=0.5)).artifact.id == calibrated.artifact.id


@pytest.mark.parametrize(
    ("request_", "code", "field"),
    [
        (calibration(policy("griffin")), grpc.StatusCode.INVALID_ARGUMENT, "policy.griffin"),
        (calibration(policy("random_set")), grpc.StatusCode.INVALID_ARGUMENT, "policy.random_set"),
        (calibration(Policy(keep_ratio=0.5)), grpc.StatusCode.INVALID_ARGUMENT, "policy.policy"),
        (pb.CalibrateProfileRequest(text=TEXT), grpc.StatusCode.INVALID_ARGUMENT, "policy"),
        (calibration(policy("teal", keep_ratio=2.0)), grpc.StatusCode.INVALID_ARGUMENT, "policy.keep_ratio"),
        (
            calibration(policy("teal", layer_keep_ratios=[0.5])),
            grpc.StatusCode.INVALID_ARGUMENT,
            "policy.layer_keep_ratios",
        ),
        (calibration(policy("teal", end_layer=3)), grpc.StatusCode.INVALID_ARGUMENT, "policy.end_layer"),
        (
            calibration(Policy(static_set=sparse_policy_pb2.StaticSetPolicy(neuron_set="neurons"))),
            grpc.StatusCode.INVALID_ARGUMENT,
            "policy.static_set.neuron_set",
        ),
        (calibration(policy("cats"), holdout_fraction=0.0), grpc.StatusCode.INVALID_ARGUMENT, "holdout_fraction"),
        (calibration(policy("cats"), holdout_fraction=1.0), grpc.StatusCode.INVALID_ARGUMENT, "holdout_fraction"),
        (calibration(policy("cats"), tags=["fine", "../up"]), grpc.StatusCode.INVALID_ARGUMENT, "tags[1]"),
        (calibration(policy("cats"), description="x" * 20_000), grpc.StatusCode.INVALID_ARGUMENT, "description"),
        (calibration(policy("cats"), text=pb.SparsityText()), grpc.StatusCode.INVALID_ARGUMENT, "text.texts"),
        (
            calibration(policy("cats"), text=pb.SparsityText(texts=["x" * TOKENS], document_tokens=TOKENS)),
            grpc.StatusCode.INVALID_ARGUMENT,
            "text.texts",
        ),
        (
            calibration(policy("cats"), text=pb.SparsityText(texts=["x" * 100])),
            grpc.StatusCode.INVALID_ARGUMENT,
            "text.texts",
        ),
        (
            calibration(policy("cats"), text=pb.SparsityText(texts=["x" * 300_000])),
            grpc.StatusCode.INVALID_ARGUMENT,
            "text.texts",
        ),
        (
            calibration(policy("cats"), text=pb.SparsityText(texts=["x" * 999], document_tokens=257)),
            grpc.StatusCode.INVALID_ARGUMENT,
            "text.document_tokens",
        ),
        (
            calibration(policy("cats"), text=pb.SparsityText(texts=["x" * 999], document_tokens=3)),
            grpc.StatusCode.INVALID_ARGUMENT,
            "text.document_tokens",
        ),
        (calibration(policy("cats"), model="another"), grpc.StatusCode.NOT_FOUND, "model"),
    ],
)
def test_what_cannot_be_calibrated_is_refused_by_field(
    stub: SparsityServiceStub, request_: pb.CalibrateProfileRequest, code: grpc.StatusCode, field: str
) -> None:
    refused = refusal(stub.CalibrateProfile(request_))
    assert (refused.code, field_of(refused)) == (code, field)


def test_documents_of_two_tokens_to_score_are_enough(stub: SparsityServiceStub) -> None:
    text = pb.SparsityText(texts=["some words"], document_tokens=4)
    [measured] = evaluate(stub, *asks_for("griffin"), text=text)
    assert (measured.quality.documents, measured.quality.scored_tokens) == (2, 2)


def test_every_entry_is_measured_in_its_order_beside_a_random_set(
    stub: SparsityServiceStub, calibrated: pb.CalibratedProfile, store: ArtifactStore
) -> None:
    names = ("dense", "exact_zero", "griffin", "coreinfer_stability", "wina", "cats", "random_set", "oracle")
    own = Sparsity(policy=Policy(static_set=sparse_policy_pb2.StaticSetPolicy(neuron_set="neurons")))
    asked = [*asks_for(*names, keep_ratio=0.25), Sparsity(profile="fovea", policy=Policy(keep_ratio=0.25)), own]
    events = list(stub.EvaluateProfile(evaluation(*asked)))
    progress = [e.progress for e in events if e.HasField("progress")]
    assert [(p.stage, p.done) for p in progress] == [("quality", n) for n in range(1, 2 * 9 * len(asked) + 1)]
    # The first evaluation does not wait for the others.
    assert [e.HasField("evaluation") for e in events[:19]] == [False] * 18 + [True]
    found = [e.evaluation for e in events if e.HasField("evaluation")]
    assert [e.index for e in found] == list(range(len(asked)))
    assert [e.policy for e in found] == [
        *(name.removesuffix("_set") for name in names),
        "fovea",
        "static_set",
    ]
    assert all(is_sane(e.quality) and is_sane(e.random_control) for e in found)
    assert not any(e.HasField("speed") for e in found)
    for e in found[2:8]:
        assert e.keep_ratio == 0.25
        # CoreInfer takes no neuron that was in no core.
        assert e.quality.sparsity >= 0.75 - 1e-6
        assert e.random_control.sparsity == pytest.approx(0.75, abs=0.01)
    static = found[-1]
    assert static.keep_ratio == pytest.approx((16 + 3) / (LAYERS * D_FF))
    assert static.random_control.sparsity == pytest.approx(static.quality.sparsity, abs=0.01)
    random_set = found[6]
    assert random_set.quality.divergence != random_set.random_control.divergence


@pytest.mark.parametrize("name", ["dense", "griffin", "cats", "wina", "oracle"])
def test_keeping_everything_is_the_dense_model(stub: SparsityServiceStub, name: str) -> None:
    [measured] = evaluate(stub, *asks_for(name, keep_ratio=1.0))
    quality = measured.quality
    assert (measured.keep_ratio, quality.sparsity) == (1.0, 0.0)
    assert quality.perplexity_ratio == pytest.approx(1.0, abs=1e-6)
    assert quality.divergence == pytest.approx(0.0, abs=1e-6)
    assert quality.top1_agreement == 1.0


@pytest.mark.parametrize("name", ["griffin", "cats", "wina", "coreinfer_stability"])
def test_keeping_nothing_is_measured_too(stub: SparsityServiceStub, name: str) -> None:
    [measured] = evaluate(stub, *asks_for(name, keep_ratio=0.0))
    assert measured.quality.sparsity == 1.0
    assert measured.quality.divergence > 0


def test_an_evaluation_scores_by_requests_that_are_not_told_as_sparse_serving(
    stub: SparsityServiceStub, server: LiveServer
) -> None:
    sparse_tokens = 'patchclamp_sparse_tokens_total{policy="griffin"}'
    scored, sparse = server.server.engine.stats().scored_tokens, server.metric(sparse_tokens)
    evaluate(stub, *asks_for("griffin", keep_ratio=0.4))
    # Of nine documents the second half each: densely, under the policy and under its control.
    assert server.server.engine.stats().scored_tokens - scored == 3 * 9 * TOKENS // 2
    assert server.metric(sparse_tokens) == sparse


def test_speed_is_measured_dense_and_sparse_by_turns(stub: SparsityServiceStub, server: LiveServer) -> None:
    sparse_tokens = 'patchclamp_sparse_tokens_total{policy="griffin"}'
    before = server.server.engine.stats().decode_tokens
    before_sparse = server.metric(sparse_tokens)
    events = list(stub.EvaluateProfile(evaluation(*asks_for("griffin", "dense"), measure_speed=True)))
    speeds = [e.evaluation.speed for e in events if e.HasField("evaluation")]
    steps = [(e.progress.done, e.progress.total) for e in events if e.progress.stage == "speed"]
    assert steps == [(n, 16) for n in range(1, 17)]
    for speed in speeds:
        assert speed.speedup == pytest.approx(speed.dense_seconds_per_token / speed.sparse_seconds_per_token)
        assert speed.sparse_seconds_per_token > 0
        assert speed.tokens == 3 * 32
    # The first token of each run comes with its prompt, and is not timed.
    assert server.server.engine.stats().decode_tokens - before == 16 * (32 + 1)
    assert server.metric(sparse_tokens) - before_sparse == 4 * 32


@pytest.mark.parametrize(
    ("request_", "code", "field"),
    [
        (evaluation(), grpc.StatusCode.INVALID_ARGUMENT, "sparsities"),
        (evaluation(*asks_for("dense") * 65), grpc.StatusCode.INVALID_ARGUMENT, "sparsities"),
        (evaluation(*asks_for("dense"), Sparsity()), grpc.StatusCode.INVALID_ARGUMENT, "sparsities[1]"),
        (evaluation(Sparsity(profile="unknown")), grpc.StatusCode.NOT_FOUND, "sparsities[0].profile"),
        (evaluation(Sparsity(profile="foreign")), grpc.StatusCode.FAILED_PRECONDITION, "sparsities[0].profile"),
        (evaluation(Sparsity(profile="vector")), grpc.StatusCode.FAILED_PRECONDITION, "sparsities[0].profile"),
        (
            evaluation(Sparsity(policy=policy("griffin"), guard=sparse_policy_pb2.QualityGuard(max_divergence=1.0))),
            grpc.StatusCode.INVALID_ARGUMENT,
            "sparsities[0].guard",
        ),
        (evaluation(*asks_for("griffin"), text=pb.SparsityText()), grpc.StatusCode.INVALID_ARGUMENT, "text.texts"),
        (evaluation(*asks_for("griffin"), model="another"), grpc.StatusCode.NOT_FOUND, "model"),
    ],
)
def test_what_cannot_be_evaluated_is_refused_by_field(
    stub: SparsityServiceStub,
    store: ArtifactStore,
    request_: pb.EvaluateProfileRequest,
    code: grpc.StatusCode,
    field: str,
) -> None:
    refused = refusal(stub.EvaluateProfile(request_))
    assert (refused.code, field_of(refused)) == (code, field)


def cores(stub: SparsityServiceStub, asked: Sparsity, *prompts: str, **fields: Any) -> pb.PredictCoreNeuronsResponse:
    messages = [generation_pb2.Prompt(text=prompt) for prompt in prompts]
    return stub.PredictCoreNeurons(pb.PredictCoreNeuronsRequest(prompts=messages, sparsity=asked, **fields))


def test_cores_of_prompts_and_their_overlap(stub: SparsityServiceStub) -> None:
    found = cores(stub, asks_for("griffin", keep_ratio=0.25)[0], words(9), words(9), words(9, seed=1))
    sets = [[set(layer.neurons) for layer in prompt.layers] for prompt in found.prompts]
    assert all(len(s) == D_FF // 4 for prompt in sets for s in prompt)
    assert all(list(layer.neurons) == sorted(layer.neurons) for prompt in found.prompts for layer in prompt.layers)
    assert [(o.first, o.second) for o in found.overlaps] == [(0, 1), (0, 2), (1, 2)]
    same, other, _ = found.overlaps
    assert (list(same.jaccard), same.mean_jaccard) == ([1.0, 1.0], 1.0)
    expected = [len(a & b) / len(a | b) for a, b in zip(sets[0], sets[2], strict=True)]
    assert list(other.jaccard) == pytest.approx(expected)
    assert other.mean_jaccard == pytest.approx(sum(expected) / 2)
    assert 0 < other.mean_jaccard < 1


def test_cores_do_not_depend_on_the_chunks_of_a_prompt(stub: SparsityServiceStub, server: LiveServer) -> None:
    whole = cores(stub, asks_for("griffin")[0], words(9))
    scheduler = server.server.engine.scheduler
    steps, most = server.server.engine.stats().steps, scheduler.max_tokens
    scheduler.max_tokens = 7
    try:
        assert cores(stub, asks_for("griffin")[0], words(9)) == whole
    finally:
        scheduler.max_tokens = most
    assert server.server.engine.stats().steps > steps + 2


def test_cores_of_some_layers_in_the_order_asked_for_and_all_neurons_of_a_dense_one(stub: SparsityServiceStub) -> None:
    # Its own set of a layer would be the neurons that were in some core.
    asked = asks_for("coreinfer_stability", keep_ratio=0.25, end_layer=1)[0]
    found = cores(stub, asked, words(9), words(5, seed=1), layers=[1, 0])
    assert [[layer.layer for layer in prompt.layers] for prompt in found.prompts] == [[1, 0]] * 2
    assert list(found.prompts[0].layers[0].neurons) == list(range(D_FF))
    assert 0 < len(found.prompts[0].layers[1].neurons) <= D_FF // 4
    assert found.overlaps[0].jaccard[0] == 1.0


def test_an_empty_core_and_a_prompt_of_one_token_are_defined(stub: SparsityServiceStub) -> None:
    found = cores(stub, asks_for("coreinfer_stability", keep_ratio=0.0)[0], "a", "b")
    assert [len(layer.neurons) for prompt in found.prompts for layer in prompt.layers] == [0] * 4
    assert list(found.overlaps[0].jaccard) == [1.0, 1.0]


def test_cores_of_a_profile_and_of_a_neuron_set(
    stub: SparsityServiceStub, channel: grpc.Channel, store: ArtifactStore
) -> None:
    calibrate(channel, policy("coreinfer_similarity", keep_ratio=0.5), tags=["topics"])
    assert len(cores(stub, Sparsity(profile="topics"), words(9)).prompts) == 1
    own = Sparsity(policy=Policy(static_set=sparse_policy_pb2.StaticSetPolicy(neuron_set="neurons")))
    assert list(cores(stub, own, words(3)).prompts[0].layers[1].neurons) == [0, 9, 40]


PROMPT = generation_pb2.Prompt(text="hello")


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (pb.PredictCoreNeuronsRequest(prompts=[PROMPT]), "sparsity"),
        (pb.PredictCoreNeuronsRequest(prompts=[PROMPT], sparsity=asks_for("cats")[0]), "sparsity"),
        (pb.PredictCoreNeuronsRequest(prompts=[PROMPT], sparsity=asks_for("wina")[0]), "sparsity"),
        (pb.PredictCoreNeuronsRequest(prompts=[PROMPT], sparsity=asks_for("dense")[0]), "sparsity"),
        (pb.PredictCoreNeuronsRequest(sparsity=asks_for("griffin")[0]), "prompts"),
        (pb.PredictCoreNeuronsRequest(prompts=[PROMPT] * 65, sparsity=asks_for("griffin")[0]), "prompts"),
        (
            pb.PredictCoreNeuronsRequest(prompts=[PROMPT, generation_pb2.Prompt()], sparsity=asks_for("griffin")[0]),
            "prompts[1].form",
        ),
        (
            pb.PredictCoreNeuronsRequest(prompts=[PROMPT], sparsity=asks_for("griffin")[0], layers=[0, 2]),
            "layers[1]",
        ),
        (
            pb.PredictCoreNeuronsRequest(prompts=[PROMPT], sparsity=asks_for("griffin")[0], layers=[1, 1]),
            "layers[1]",
        ),
        (
            pb.PredictCoreNeuronsRequest(
                prompts=[PROMPT],
                sparsity=Sparsity(policy=policy("griffin"), guard=sparse_policy_pb2.QualityGuard(max_divergence=1.0)),
            ),
            "sparsity.guard",
        ),
    ],
)
def test_cores_that_cannot_be_predicted_are_refused_by_field(
    stub: SparsityServiceStub, request_: pb.PredictCoreNeuronsRequest, field: str
) -> None:
    refused = unary_refusal(stub.PredictCoreNeurons, request_)
    assert (refused.code, field_of(refused)) == (grpc.StatusCode.INVALID_ARGUMENT, field)


def test_an_answer_that_no_client_takes_is_refused(stub: SparsityServiceStub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("patchclamp_server.rpc.codecs.message_size.CLIENT_MESSAGE_BYTES", 40)
    request = pb.PredictCoreNeuronsRequest(prompts=[PROMPT], sparsity=asks_for("griffin")[0])
    refused = unary_refusal(stub.PredictCoreNeurons, request)
    assert (refused.code, field_of(refused)) == (grpc.StatusCode.INVALID_ARGUMENT, "layers")


def test_cancelling_a_calibration_stops_it_and_stores_nothing(
    stub: SparsityServiceStub, server: LiveServer, store: ArtifactStore
) -> None:
    long = pb.SparsityText(texts=[words(20_000)], document_tokens=256)
    before = len(store.list(page_size=1000)[0])
    call = stub.CalibrateProfile(calibration(policy("cats"), text=long, tags=["never"]))
    progress = next(call).progress
    assert (progress.stage, progress.done) == ("calibration", 1)
    assert progress.total > 100
    call.cancel()
    # A job that waited gets its turn once that thread has ended.
    cores(stub, asks_for("griffin")[0], "next")
    assert len(store.list(page_size=1000)[0]) == before


def test_jobs_of_several_calls_wait_for_each_other(stub: SparsityServiceStub) -> None:
    calls = [stub.EvaluateProfile(evaluation(*asks_for("griffin"))) for _ in range(4)]
    found = [[event.evaluation for event in call if event.HasField("evaluation")] for call in calls]
    assert all(entry == found[0] for entry in found)


def generation(asked: Sparsity | None, prompt: str = "hello", tokens: int = 6, **fields: Any) -> Any:
    stop = generation_pb2.StopConditions(max_tokens=tokens, ignore_eos=True)
    text = generation_pb2.Prompt(text=prompt)
    return generation_pb2.GenerateRequest(prompt=text, stop=stop, sparsity=asked, **fields)


def run(channel: grpc.Channel, request: generation_pb2.GenerateRequest) -> tuple[list[int], generation_pb2.Finished]:
    responses = list(GenerationServiceStub(channel).Generate(request))
    return [token.id for r in responses for token in r.tokens], responses[-1].finished


def test_a_sparse_request_says_so(channel: grpc.Channel, calibrated: pb.CalibratedProfile) -> None:
    _, finished = run(channel, generation(Sparsity(profile="fovea")))
    report = finished.sparsity
    assert (report.policy, report.profile) == ("fovea", calibrated.artifact.id)
    assert (report.sparse_tokens, report.dense_tokens) == (5, 0)
    assert report.active_ratio == pytest.approx(0.5, abs=0.03)
    assert not report.HasField("guard")
    assert not run(channel, generation(None))[1].HasField("sparsity")


@pytest.mark.parametrize("name", ["griffin", "cats", "wina"])
def test_keeping_everything_generates_what_the_dense_model_does(channel: grpc.Channel, name: str) -> None:
    tokens, finished = run(channel, generation(asks_for(name, keep_ratio=1.0)[0]))
    assert tokens == run(channel, generation(None))[0]
    assert finished.sparsity.active_ratio == 1.0


@pytest.mark.parametrize("name", ["griffin", "cats", "wina", "coreinfer_stability"])
def test_keeping_nothing_after_a_prompt_of_one_token_generates_all_the_same(channel: grpc.Channel, name: str) -> None:
    tokens, finished = run(channel, generation(asks_for(name, keep_ratio=0.0)[0], "a"))
    assert len(tokens) == 6
    assert finished.sparsity.active_ratio == pytest.approx(0.0, abs=1e-9)


def test_requests_of_several_policies_at_once_get_what_each_gets_alone(
    channel: grpc.Channel, calibrated: pb.CalibratedProfile
) -> None:
    asked = [None, Sparsity(profile="fovea"), *asks_for("griffin", "cats", "wina", "coreinfer_stability"), None]
    requests = [generation(s, prompt=f"prompt {i}", tokens=24) for i, s in enumerate(asked)]
    alone = [run(channel, request)[0] for request in requests]
    calls = [GenerationServiceStub(channel).Generate(request) for request in requests]
    assert [[token.id for r in call for token in r.tokens] for call in calls] == alone


def test_a_guard_reports_and_falls_back(channel: grpc.Channel) -> None:
    guard = sparse_policy_pb2.QualityGuard(max_divergence=1e-9, sample_rate=1.0, window=2)
    asked = Sparsity(policy=policy("griffin", keep_ratio=0.0), guard=guard)
    report = run(channel, generation(asked, tokens=10))[1].sparsity
    assert report.guard.max_divergence == 1e-9
    assert report.guard.sampled_tokens == 2
    assert report.guard.dense_from == 7
    assert (report.sparse_tokens, report.dense_tokens) == (2, 7)


def test_a_session_can_be_sparse(channel: grpc.Channel) -> None:
    start = generation_pb2.SessionStart(request=generation(asks_for("griffin")[0]))
    *_, last = GenerationServiceStub(channel).Session(iter([generation_pb2.SessionRequest(start=start)]))
    assert last.finished.sparsity.policy == "griffin"


def test_only_the_edited_side_of_a_comparison_is_sparse(channel: grpc.Channel) -> None:
    request = generation_pb2.CompareRequest(request=generation(asks_for("griffin", keep_ratio=0.0)[0]))
    events = list(GenerationServiceStub(channel).Compare(request))
    finished = {e.text.side: e.text.response.finished for e in events if e.text.response.HasField("finished")}
    assert finished[generation_pb2.COMPARE_SIDE_EDITED].sparsity.policy == "griffin"
    assert not finished[generation_pb2.COMPARE_SIDE_BASELINE].HasField("sparsity")
    assert events[-1].summary.max_kl > 0


def score(asked: Sparsity | None) -> generation_pb2.ScoreRequest:
    return generation_pb2.ScoreRequest(prompt=PROMPT, text=" there", sparsity=asked)


def test_a_continuation_can_be_scored_sparsely(channel: grpc.Channel) -> None:
    stub = GenerationServiceStub(channel)
    dense, sparse = stub.Score(score(None)), stub.Score(score(asks_for("griffin", keep_ratio=0.0)[0]))
    assert not dense.HasField("sparsity")
    assert sparse.sparsity.policy == "griffin"
    assert sparse.total_logprob != dense.total_logprob
    # The first token of the continuation is predicted by the dense prompt.
    assert sparse.tokens[0].logprob == pytest.approx(dense.tokens[0].logprob, abs=1e-5)


GUARD = sparse_policy_pb2.QualityGuard(max_divergence=0.1)


@pytest.mark.parametrize(
    ("asked", "code", "field"),
    [
        (Sparsity(), grpc.StatusCode.INVALID_ARGUMENT, "sparsity"),
        (asks_for("random_set")[0], grpc.StatusCode.INVALID_ARGUMENT, "sparsity.policy.random_set"),
        (asks_for("oracle")[0], grpc.StatusCode.INVALID_ARGUMENT, "sparsity.policy.oracle"),
        (asks_for("teal")[0], grpc.StatusCode.INVALID_ARGUMENT, "sparsity.profile"),
        (asks_for("griffin", keep_ratio=-1.0)[0], grpc.StatusCode.INVALID_ARGUMENT, "sparsity.policy.keep_ratio"),
        (Sparsity(profile="unknown"), grpc.StatusCode.NOT_FOUND, "sparsity.profile"),
        (Sparsity(profile="foreign"), grpc.StatusCode.FAILED_PRECONDITION, "sparsity.profile"),
        (Sparsity(profile="vector"), grpc.StatusCode.FAILED_PRECONDITION, "sparsity.profile"),
        (
            Sparsity(profile="fovea", policy=policy("griffin")),
            grpc.StatusCode.FAILED_PRECONDITION,
            "sparsity.profile",
        ),
        (
            Sparsity(policy=policy("griffin"), guard=sparse_policy_pb2.QualityGuard()),
            grpc.StatusCode.INVALID_ARGUMENT,
            "sparsity.guard.max_divergence",
        ),
    ],
)
def test_sparse_requests_that_cannot_be_served_are_refused_by_field(
    channel: grpc.Channel,
    calibrated: pb.CalibratedProfile,
    asked: Sparsity,
    code: grpc.StatusCode,
    field: str,
) -> None:
    stub = GenerationServiceStub(channel)
    refused = refusal(stub.Generate(generation(asked)))
    assert (refused.code, field_of(refused)) == (code, field)
    compared = refusal(stub.Compare(generation_pb2.CompareRequest(request=generation(asked))))
    assert (compared.code, field_of(compared)) == (code, f"request.{field}")


def test_scoring_has_no_guard(channel: grpc.Channel) -> None:
    asked = Sparsity(policy=policy("griffin"), guard=GUARD)
    refused = unary_refusal(GenerationServiceStub(channel).Score, score(asked))
    assert (refused.code, field_of(refused)) == (grpc.StatusCode.INVALID_ARGUMENT, "sparsity.guard")

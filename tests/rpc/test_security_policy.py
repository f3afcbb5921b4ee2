"""What tenants may do: every rule of the policy file through a real channel."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from live import LiveServer
from safetensors.torch import save
from secured import Secured, Stream, generation, refusal, secured, until
from statuses import Failure
from test_bad_input import add, griffin, neurons, scale
from test_head_service import attribution, cat
from test_head_service import edit as head_edit
from test_sparsity_service import asks_for, calibration, evaluation, policy

from patchclamp import Client, PatchclampError, Retry
from patchclamp.v1 import (
    artifact_pb2,
    artifact_pb2_grpc,
    head_pb2,
    head_pb2_grpc,
    model_pb2,
    model_pb2_grpc,
    sparsity_pb2,
    steering_pb2,
    steering_pb2_grpc,
)
from patchclamp.v1 import generation_pb2 as pb
from patchclamp.v1 import program_pb2 as program
from patchclamp.v1 import sparse_policy_pb2 as sparse
from patchclamp.v1.generation_pb2_grpc import GenerationServiceStub
from patchclamp.v1.sparsity_pb2_grpc import SparsityServiceStub

DENIED = grpc.StatusCode.PERMISSION_DENIED
POLICY = """
tenants:
  free: {}
  reader: {methods: ["GenerationService/Score", "ModelService/*"]}
  elsewhere: {models: ["another-model"]}
  careful:
    edits: {kinds: [add, neurons], max_edits: 2, max_strength: 2, inline_vectors: false}
  librarian:
    artifacts: {use: ["joy*"], tag: ["joy-*"], delete: ["joy-*"], upload: false}
  writer:
    artifacts: {use: ["own-*"], tag: ["own-*"], delete: ["own-*"]}
  slow: {tokens_per_minute: 60}
  calibrateprofile: {tokens_per_minute: 60}
  evaluateprofile: {tokens_per_minute: 60}
  predictcoreneurons: {tokens_per_minute: 2}
  findcircuit: {tokens_per_minute: 2}
  attributelogits: {tokens_per_minute: 2}
  narrow: {max_concurrent: 1, max_waiting: 0}
  sixteen: {max_concurrent: 16}
  short: {max_concurrent: 1, max_waiting: 2}
"""
VECTOR = save({f"layer.{layer}": torch.ones(32) for layer in (0, 1)})
OTHER = save({f"layer.{layer}": torch.full((32,), 2.0) for layer in (0, 1)})


WORDS = " ".join(["word"] * 20)
# Each by a tenant of its name.
JOBS: dict[str, tuple[type[Any], Any]] = {
    "CalibrateProfile": (SparsityServiceStub, calibration(policy("fovea"))),
    "EvaluateProfile": (SparsityServiceStub, evaluation(*asks_for("griffin"))),
    "PredictCoreNeurons": (
        SparsityServiceStub,
        sparsity_pb2.PredictCoreNeuronsRequest(prompts=[pb.Prompt(text=WORDS)], sparsity=asks_for("griffin")[0]),
    ),
    "FindCircuit": (head_pb2_grpc.HeadServiceStub, cat()),
    "AttributeLogits": (head_pb2_grpc.HeadServiceStub, attribution()),
}


@pytest.fixture(scope="module")
def server(live_server: LiveServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secured]:
    tenants = (
        "free",
        "reader",
        "elsewhere",
        "careful",
        "librarian",
        "writer",
        "slow",
        "narrow",
        "sixteen",
        "short",
        "stranger",
        *map(str.lower, JOBS),
    )
    with secured(live_server.model, tmp_path_factory.mktemp("policy"), *tenants, policy=POLICY) as server:
        with client(server, "free") as free:
            free.put_artifact(VECTOR, tags=["joy-one"])
            free.put_artifact(OTHER, tags=["secret", "joy-shared"])
            free.tag_artifact("only-secret", "secret")
            free.untag_artifact("joy-shared")
        yield server


def client(server: Secured, tenant: str) -> Client:
    return Client(server.server.address, token=server.tokens[tenant])


@pytest.fixture
def calls(server: Secured) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(server.server.address) as channel:
        yield channel


def edited(*edits: program.Edit) -> pb.GenerateRequest:
    return generation(program=program.Program(edits=edits), stop=pb.StopConditions(max_tokens=2, ignore_eos=True))


def steered(ref: str, **fields: Any) -> program.Edit:
    return add(add=program.AddVector(vector=program.Vector(artifact=ref)), **fields)


def field(answer: Failure) -> str:
    return str(answer.details["ErrorInfo"].metadata["field"])


def code(call: Callable[[], object]) -> str:
    with pytest.raises(PatchclampError) as caught:
        call()
    return caught.value.code


def test_a_tenant_without_limits_may_do_anything(server: Secured, calls: grpc.Channel):
    assert server.generate(calls, "free", edited(add(strength=50.0), neurons(scale(1))))


def test_a_tenant_that_is_not_listed_is_refused_where_there_is_no_default(server: Secured, calls: grpc.Channel):
    answer = server.refused(calls, "stranger", generation())
    assert (answer.code, answer.reason) == (DENIED, "TENANT_UNKNOWN")


def test_only_the_methods_of_the_policy_may_be_called(server: Secured, calls: grpc.Channel):
    answer = server.refused(calls, "reader", generation())
    assert (answer.code, answer.reason) == (DENIED, "METHOD_NOT_ALLOWED")
    assert "GenerationService/Generate" in answer.message
    with client(server, "reader") as reader:
        assert reader.models()
        assert reader.score("hello", " you").tokens


def test_only_the_models_of_the_policy_may_be_used(server: Secured, calls: grpc.Channel):
    answer = server.refused(calls, "elsewhere", generation())
    assert (answer.code, answer.reason, field(answer)) == (DENIED, "MODEL_NOT_ALLOWED", "model")


@pytest.mark.parametrize(
    ("edits", "path"),
    [
        ([steered("joy-one", strength=2.5)], "program.edits[0].strength"),
        ([steered("joy-one"), steered("joy-one", strength=-2.5)], "program.edits[1].strength"),
        ([steered("joy-one")] * 3, "program.edits"),
        ([add()], "program.edits[0].add.vector.values"),
        (
            [add(project_out=program.ProjectOut(vector=program.Vector(artifact="joy-one")))],
            "program.edits[0].project_out",
        ),
        (
            [program.Edit(site=program.SITE_ATTN_Z, layers=[0], heads=program.HeadEdit(heads=[0], scale=0.0))],
            "program.edits[0].heads",
        ),
    ],
)
def test_edits_beyond_the_rules_are_refused_with_their_path(
    server: Secured, calls: grpc.Channel, edits: list[program.Edit], path: str
):
    answer = server.refused(calls, "careful", edited(*edits))
    assert (answer.code, answer.reason, field(answer)) == (DENIED, "NOT_ALLOWED", path)


def test_edits_within_the_rules_run(server: Secured, calls: grpc.Channel):
    finished = server.generate(calls, "careful", edited(steered("joy-one", strength=-2.0), neurons(scale(1))))[-1]
    assert finished.finished.receipt.touched


def test_the_rules_hold_in_every_rpc_that_takes_a_program(server: Secured, calls: grpc.Channel):
    generate, metadata = GenerationServiceStub(calls), server.metadata("careful")
    too_strong = edited(steered("joy-one", strength=3.0))
    score = pb.ScoreRequest(prompt=pb.Prompt(text="hello"), text=" you", program=too_strong.program)
    for path, call in {
        "program.edits[0].strength": lambda: generate.Score(score, metadata=metadata),
        "request.program.edits[0].strength": lambda: list(
            generate.Compare(pb.CompareRequest(request=too_strong), metadata=metadata)
        ),
        "start.request.program.edits[0].strength": lambda: Stream(calls, metadata, program=too_strong.program).tokens(
            1
        ),
    }.items():
        answer = refusal(call)
        assert (answer.code, field(answer)) == (DENIED, path)


def test_a_strength_that_changes_in_a_session_is_checked(server: Secured, calls: grpc.Channel):
    stream = Stream(calls, server.metadata("careful"), program=program.Program(edits=[steered("joy-one", name="joy")]))
    stream.tokens(1)
    stream.set_strength("joy", 2.0)
    stream.tokens(1)
    stream.set_strength("joy", 2.1)
    answer = stream.refusal()
    assert (answer.code, field(answer)) == (DENIED, "set_strength.strength")


def test_the_edits_of_jobs_are_checked_too(server: Secured, calls: grpc.Channel):
    service = head_pb2_grpc.HeadServiceStub(calls)
    answer = refusal(lambda: list(service.EvaluateHeadEdit(head_edit(), metadata=server.metadata("careful"))))
    assert answer.code is DENIED
    assert "edits by heads are not allowed" in answer.message


def test_artifacts_are_used_by_the_tags_of_the_policy(server: Secured, calls: grpc.Channel):
    assert server.generate(calls, "librarian", edited(steered("joy-one")))
    answer = server.refused(calls, "librarian", edited(steered("secret")))
    assert (answer.code, field(answer)) == (DENIED, "program.edits[0].add.vector.artifact")


def test_an_id_is_as_good_as_the_tags_of_its_artifact(server: Secured, calls: grpc.Channel):
    with client(server, "free") as free:
        joy, secret = free.get_artifact("joy-one").id, free.get_artifact("secret").id
    assert server.generate(calls, "librarian", edited(steered(joy)))
    assert server.refused(calls, "librarian", edited(steered(secret))).code is DENIED


def test_artifacts_that_may_not_be_used_are_not_shown(server: Secured):
    with client(server, "librarian") as librarian, client(server, "free") as free:
        assert [artifact.tags for artifact in librarian.list_artifacts()] == [("joy-one",)]
        assert len(list(free.list_artifacts())) >= 2
        assert code(lambda: librarian.get_artifact("secret")) == "PERMISSION_DENIED"
        assert code(lambda: librarian.download_artifact("secret")) == "PERMISSION_DENIED"


def test_references_in_sparse_policies_grounding_heads_and_watches_are_checked(server: Secured, calls: grpc.Channel):
    with_profile = generation(sparsity=sparse.Sparsity(profile="secret"))
    with_heads = generation(grounding=pb.Grounding(head_set="secret"))
    for request in (with_profile, with_heads):
        assert server.refused(calls, "librarian", request).code is DENIED
    with client(server, "librarian") as librarian:
        assert code(lambda: librarian.start_watch("secret")) == "PERMISSION_DENIED"
        assert code(lambda: librarian.compare_head_sets(["secret", "joy-one"])) == "PERMISSION_DENIED"
    stored_heads = head_edit(heads=head_pb2.HeadSelection(head_set="secret"))
    job = head_pb2_grpc.HeadServiceStub(calls).EvaluateHeadEdit(stored_heads, metadata=server.metadata("librarian"))
    assert refusal(lambda: list(job)).code is DENIED
    assert server.generate(calls, "librarian", generation(sparsity=sparse.Sparsity(policy=griffin())))


def test_a_tag_cannot_make_a_foreign_artifact_ones_own(server: Secured):
    with client(server, "librarian") as librarian:
        assert code(lambda: librarian.tag_artifact("joy-mine", "secret")) == "PERMISSION_DENIED"
        assert code(lambda: librarian.tag_artifact("secret", "joy-one")) == "PERMISSION_DENIED"
        assert code(lambda: librarian.untag_artifact("only-secret")) == "PERMISSION_DENIED"
        assert librarian.tag_artifact("joy-two", "joy-one").tags == ("joy-one", "joy-two")
        librarian.untag_artifact("joy-two")


def test_who_may_not_upload_is_refused_before_the_file_travels(server: Secured, calls: grpc.Channel):
    header = artifact_pb2.UploadHeader(
        kind=artifact_pb2.ARTIFACT_KIND_VECTOR, format=artifact_pb2.ARTIFACT_FORMAT_SAFETENSORS, size_bytes=1 << 20
    )
    upload = artifact_pb2_grpc.ArtifactServiceStub(calls).Upload
    answer = refusal(
        lambda: upload(
            iter([artifact_pb2.UploadRequest(header=header)]), metadata=server.metadata("librarian"), timeout=60
        )
    )
    assert answer.code is DENIED
    header.tags.append("joy-one")
    answer = refusal(
        lambda: upload(iter([artifact_pb2.UploadRequest(header=header)]), metadata=server.metadata("writer"))
    )
    assert (answer.code, field(answer)) == (DENIED, "header.tags[0]")


def test_a_job_that_could_not_store_its_result_is_refused_before_it_begins(server: Secured, calls: grpc.Channel):
    request = steering_pb2.ExtractVectorsRequest(tags=["joy-new"])
    service = steering_pb2_grpc.SteeringServiceStub(calls)
    for tenant, path in (("librarian", ""), ("writer", "tags[0]")):
        answer = refusal(lambda t=tenant: list(service.ExtractVectors(request, metadata=server.metadata(t))))
        assert (answer.code, field(answer)) == (DENIED, path)


def test_what_one_uploads_is_ones_own_by_its_tag(server: Secured, calls: grpc.Channel):
    with client(server, "writer") as writer:
        own = save({"layer.1": torch.arange(32, dtype=torch.float32)})
        stored = writer.put_artifact(own, tags=["own-one"])
        assert server.generate(calls, "writer", edited(steered("own-one")))
        assert code(lambda: writer.delete_artifact("joy-one")) == "PERMISSION_DENIED"
        writer.delete_artifact(stored.id)


def test_what_others_have_tagged_is_not_deleted(server: Secured):
    with client(server, "writer") as writer, client(server, "free") as free:
        own = save({"layer.0": torch.arange(32, dtype=torch.float32)})
        writer.put_artifact(own, tags=["own-two"])
        free.tag_artifact("used", "own-two")
        assert code(lambda: writer.delete_artifact("own-two")) == "PERMISSION_DENIED"
        free.untag_artifact("used")
        writer.delete_artifact("own-two")


def test_tokens_beyond_the_rate_are_owed_and_the_refusal_says_for_how_long(server: Secured, calls: grpc.Channel):
    # 5 of the prompt and 100 generated, of 60 a minute: 45 are owed.
    assert server.generate(calls, "slow", generation())
    answer = server.refused(calls, "slow", generation())
    assert (answer.code, answer.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUOTA_EXCEEDED")
    assert 1.0 < answer.details["RetryInfo"].retry_delay.ToSeconds() <= 46
    # Neighbours do not pay, and what runs no tokens is free.
    assert server.generate(calls, "free", generation())
    models = model_pb2_grpc.ModelServiceStub(calls)
    assert models.ListModels(model_pb2.ListModelsRequest(), metadata=server.metadata("slow"))


@pytest.mark.parametrize("method", JOBS)
def test_tokens_that_jobs_compute_at_the_exclusive_door_are_counted(server: Secured, calls: grpc.Channel, method: str):
    """The first begins with a full bucket and takes more than it holds."""
    stub, request = JOBS[method]

    def run() -> None:
        answer = getattr(stub(calls), method)(request, metadata=server.metadata(method.lower()))
        if isinstance(answer, grpc.RpcContext):
            list(answer)

    if method == "FindCircuit":
        # It computes before it sees that the model cannot tell the prompts of the pair apart.
        assert refusal(run).code is grpc.StatusCode.INVALID_ARGUMENT
    else:
        run()
    answer = refusal(run)
    assert (answer.code, answer.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUOTA_EXCEEDED")
    assert answer.details["RetryInfo"].retry_delay.ToSeconds() > 0


def test_calls_at_once_are_bounded(server: Secured, calls: grpc.Channel):
    stream = Stream(calls, server.metadata("narrow"))
    stream.tokens(1)
    answer = server.refused(calls, "narrow", generation())
    assert (answer.code, answer.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUOTA_EXCEEDED")
    assert answer.details["RetryInfo"].retry_delay.ToSeconds() == 1
    assert server.generate(calls, "free", generation())
    stream.end()
    # The place is free when the server has seen the end of the stream.
    gauge = 'patchclamp_requests_in_flight{method="Session",service="patchclamp.v1.GenerationService"}'
    until(lambda: server.server.metric(gauge) == 0)
    assert server.generate(calls, "narrow", generation())


def test_calls_are_counted_by_tenants_of_the_policy(server: Secured, calls: grpc.Channel):
    samples = [
        f'patchclamp_tenant_requests_total{{code="PERMISSION_DENIED",tenant="{t}"}}' for t in ("reader", "other")
    ]
    before = [server.server.metric(sample) for sample in samples]
    server.refused(calls, "reader", generation())
    server.refused(calls, "stranger", generation())
    assert [server.server.metric(sample) for sample in samples] == [n + 1 for n in before]
    assert "stranger" not in server.server.metrics()


def test_a_new_policy_holds_for_the_stream_that_runs(live_server: LiveServer, tmp_path: Path):
    with (
        secured(live_server.model, tmp_path, "research", policy="tenants: {research: {}}") as server,
        grpc.insecure_channel(server.server.address) as channel,
    ):
        edit = add(name="push", strength=5.0)
        stream = Stream(channel, server.metadata("research"), program=program.Program(edits=[edit]))
        stream.tokens(1)
        server.write_policy("tenants: {research: {edits: {max_strength: 1}}}")
        # What was allowed when it was asked for goes on; what is asked for now is refused.
        assert len(stream.tokens(2)) == 2
        stream.set_strength("push", 2.0)
        assert stream.refusal().code is DENIED


def test_a_broken_policy_keeps_the_old_one_and_counts(live_server: LiveServer, tmp_path: Path):
    policy = "tenants: {research: {methods: ['ModelService/*']}}"
    with (
        secured(live_server.model, tmp_path, "research", policy=policy) as server,
        grpc.insecure_channel(server.server.address) as channel,
    ):
        server.write_policy("tenants: {research: {method: []}}", outcome="failed")
        assert server.refused(channel, "research", generation()).reason == "METHOD_NOT_ALLOWED"


def test_without_tokens_the_default_holds_for_everybody(live_server: LiveServer, tmp_path: Path):
    (tmp_path / "policy").write_text("default: {methods: ['ModelService/*']}")
    with (
        LiveServer(live_server.model, tmp_path / "artifacts", policy=str(tmp_path / "policy")) as server,
        grpc.insecure_channel(server.address) as channel,
    ):
        assert model_pb2_grpc.ModelServiceStub(channel).ListModels(model_pb2.ListModelsRequest())
        answer = refusal(lambda: list(GenerationServiceStub(channel).Generate(generation())))
    assert (answer.code, answer.reason) == (DENIED, "METHOD_NOT_ALLOWED")


def refused_calls(server: Secured, tenant: str) -> float:
    return server.server.metric(f'patchclamp_tenant_requests_total{{code="RESOURCE_EXHAUSTED",tenant="{tenant}"}}')


def test_a_burst_beyond_the_limit_waits_and_none_of_it_is_refused(server: Secured):
    with client(server, "sixteen") as sixteen, ThreadPoolExecutor(40) as pool:
        streams = [pool.submit(lambda: sixteen.generate("hi", max_tokens=2).result()) for _ in range(200)]
        assert all(stream.result().usage.generated_tokens for stream in streams)
    assert refused_calls(server, "sixteen") == 0


def test_clients_that_find_the_line_full_come_back_rarely_and_are_all_served(server: Secured):
    """A line of two for a burst of forty: what is refused is asked for again after a longer and longer time."""
    with (
        Client(server.server.address, token=server.tokens["short"], retry=Retry(120.0)) as short,
        ThreadPoolExecutor(40) as pool,
    ):
        streams = [pool.submit(lambda: short.generate("hi", max_tokens=2).result()) for _ in range(40)]
        assert all(stream.result().usage.generated_tokens for stream in streams)
    assert refused_calls(server, "short") < 40 * 8

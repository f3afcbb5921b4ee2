"""JobService through a real channel: jobs that outlive their client, with the checks and limits of their call."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from live import LiveServer
from secured import generation, refusal, secured, until
from statuses import failure

from patchclamp import Client
from patchclamp.monitoring import watch_neurons
from patchclamp.v1 import job_pb2 as pb
from patchclamp.v1 import monitoring_pb2, steering_pb2
from patchclamp.v1.generation_pb2 import Prompt
from patchclamp.v1.job_pb2_grpc import JobServiceStub
from patchclamp.v1.steering_pb2_grpc import SteeringServiceStub
from patchclamp_server.rpc.call.detached_jobs import MAX_KEPT, DetachedJob, DetachedJobs, JobState
from patchclamp_server.rpc.contract import SERVICES
from patchclamp_server.rpc.services.job import job_methods
from patchclamp_server.security.tenants import BESIDE_PER_PLACE

CODES = grpc.StatusCode
FOLLOWING = 'patchclamp_requests_in_flight{method="FollowJob",service="patchclamp.v1.JobService"}'


@pytest.fixture(scope="module")
def server(live_server: LiveServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    with LiveServer(live_server.model, tmp_path_factory.mktemp("jobs")) as server, Client(server.address) as client:
        client.create_watch([watch_neurons("n", 0, [1])], tags=["quiet"])
        client.start_watch("quiet")
        yield server


@pytest.fixture
def jobs(server: LiveServer) -> Iterator[JobServiceStub]:
    with grpc.insecure_channel(server.address) as channel:
        yield JobServiceStub(channel)


def extraction(**fields: Any) -> steering_pb2.ExtractVectorsRequest:
    request = steering_pb2.ExtractVectorsRequest(
        method=steering_pb2.EXTRACTION_METHOD_DIFFERENCE_OF_MEANS, seed=1, **fields
    )
    for i in range(4):
        pair = steering_pb2.ContrastPair(positive=Prompt(text=f"{i} yes!"), negative=Prompt(text=f"{i} no?"))
        request.pairs.append(pair)
    return request


def endless() -> pb.StartJobRequest:
    """A reference of a watch that sees no token."""
    return pb.StartJobRequest(record_reference=monitoring_pb2.RecordReferenceRequest(name="quiet", tokens=1000))


def ended(jobs: JobServiceStub, job_id: str) -> pb.Job:
    until(lambda: jobs.GetJob(pb.GetJobRequest(id=job_id)).job.state != pb.JOB_STATE_RUNNING)
    return jobs.GetJob(pb.GetJobRequest(id=job_id)).job


def test_every_method_with_progress_can_be_a_job():
    progress = {
        method.name
        for service in SERVICES
        for method in _methods(service)
        if method.server_streaming and "progress" in method.output_type.fields_by_name
    }
    assert {method.name for method in job_methods(SERVICES).values()} == progress
    of_requests = pb.StartJobRequest.DESCRIPTOR.oneofs_by_name["request"].fields
    of_responses = pb.FollowJobResponse.DESCRIPTOR.oneofs_by_name["response"].fields
    assert [f.name for f in of_requests] == [f.name for f in of_responses]


def _methods(service: str) -> Any:
    from google.protobuf import descriptor_pool

    return descriptor_pool.Default().FindServiceByName(service).methods


def test_a_job_goes_on_without_its_client_and_finds_what_a_call_finds(server: LiveServer):
    with grpc.insecure_channel(server.address) as channel:
        job = JobServiceStub(channel).StartJob(pb.StartJobRequest(extract_vectors=extraction())).job
        assert (job.method, job.id[:4]) == ("SteeringService/ExtractVectors", "job-")
    with grpc.insecure_channel(server.address) as channel:
        jobs = JobServiceStub(channel)
        done = ended(jobs, job.id)
        assert (done.state, done.stage, done.done, done.total) == (pb.JOB_STATE_SUCCEEDED, "evidence", 2, 2)
        responses = [r.extract_vectors for r in jobs.FollowJob(pb.FollowJobRequest(id=job.id))]
        called = list(SteeringServiceStub(channel).ExtractVectors(extraction()))
        assert [r.WhichOneof("event") for r in responses] == ["result", "progress"]
        assert responses[0].result == called[-1].result


def test_a_follower_sees_progress_and_the_result_as_they_come(jobs: JobServiceStub):
    job = jobs.StartJob(pb.StartJobRequest(extract_vectors=extraction(layers=[0]))).job
    events = [r.extract_vectors.WhichOneof("event") for r in jobs.FollowJob(pb.FollowJobRequest(id=job.id))]
    assert events.count("result") == 1
    assert set(events) == {"progress", "result"}


def test_a_bad_request_is_the_failure_of_its_job_with_the_path_of_the_field(jobs: JobServiceStub):
    job = jobs.StartJob(pb.StartJobRequest(extract_vectors=extraction(layers=[9]))).job
    with pytest.raises(grpc.RpcError) as caught:
        list(jobs.FollowJob(pb.FollowJobRequest(id=job.id)))
    refused = failure(caught.value)
    assert refused.code is CODES.INVALID_ARGUMENT
    assert refused.details["BadRequest"].field_violations[0].field == "layers[0]"
    done = ended(jobs, job.id)
    assert (done.state, done.error_code) == (pb.JOB_STATE_FAILED, "INVALID_ARGUMENT")
    assert done.error_message.startswith("layers[0]: ")


def test_a_cancelled_job_ends_and_says_so(server: LiveServer, jobs: JobServiceStub):
    job = jobs.StartJob(endless()).job
    following = jobs.FollowJob(pb.FollowJobRequest(id=job.id))
    assert next(following).record_reference.progress.total == 1000
    cancelled = jobs.CancelJob(pb.CancelJobRequest(id=job.id)).job
    assert (cancelled.state, cancelled.stage) == (pb.JOB_STATE_CANCELLED, "tokens")
    assert cancelled.HasField("ended")
    assert refusal(lambda: list(following)).code is CODES.CANCELLED
    # Once more changes nothing.
    assert jobs.CancelJob(pb.CancelJobRequest(id=job.id)).job == cancelled
    in_flight = 'patchclamp_requests_in_flight{method="RecordReference",service="patchclamp.v1.MonitoringService"}'
    assert server.metric(in_flight) == 0


def test_a_follower_that_leaves_ends_nothing(jobs: JobServiceStub):
    job = jobs.StartJob(endless()).job
    following = jobs.FollowJob(pb.FollowJobRequest(id=job.id))
    next(following)
    following.cancel()
    assert jobs.GetJob(pb.GetJobRequest(id=job.id)).job.state == pb.JOB_STATE_RUNNING
    jobs.CancelJob(pb.CancelJobRequest(id=job.id))


def test_jobs_are_listed_the_newest_first(jobs: JobServiceStub):
    started = [jobs.StartJob(pb.StartJobRequest(extract_vectors=extraction())).job.id for _ in range(2)]
    assert [job.id for job in jobs.ListJobs(pb.ListJobsRequest()).jobs][:2] == started[::-1]


def test_an_unknown_job_is_not_found(jobs: JobServiceStub):
    for call in (
        lambda: jobs.GetJob(pb.GetJobRequest(id="job-0")),
        lambda: jobs.CancelJob(pb.CancelJobRequest(id="job-0")),
        lambda: list(jobs.FollowJob(pb.FollowJobRequest(id="job-0"))),
    ):
        assert refusal(call).code is CODES.NOT_FOUND


def test_a_job_without_a_request_is_refused(jobs: JobServiceStub):
    assert refusal(lambda: jobs.StartJob(pb.StartJobRequest())).code is CODES.INVALID_ARGUMENT


def test_a_drain_waits_for_jobs(live_server: LiveServer, tmp_path: Path):
    with LiveServer(live_server.model, tmp_path, drain_seconds=60.0) as server:
        with grpc.insecure_channel(server.address) as channel:
            JobServiceStub(channel).StartJob(pb.StartJobRequest(extract_vectors=extraction()))
        server.run(server.server.stop())
        [job] = server.server.services.detached.of("")
        assert job.state is JobState.SUCCEEDED


def test_a_drain_ends_jobs_when_its_time_is_over(live_server: LiveServer, tmp_path: Path):
    with LiveServer(live_server.model, tmp_path, drain_seconds=0.0) as server:
        with grpc.insecure_channel(server.address) as channel:
            JobServiceStub(channel).StartJob(pb.StartJobRequest(extract_vectors=extraction()))
        server.run(server.server.stop())
        [job] = server.server.services.detached.of("")
        assert job.state is JobState.FAILED
        assert job.status is not None
        assert job.status.code is CODES.UNAVAILABLE


POLICY = """
tenants:
  one: {max_concurrent: 2}
  two: {}
  reader: {methods: ["JobService/*"]}
"""


def test_a_job_has_the_rights_and_the_quota_of_who_began_it(live_server: LiveServer, tmp_path: Path):
    with (
        secured(live_server.model, tmp_path, "one", "two", "reader", policy=POLICY) as server,
        grpc.insecure_channel(server.server.address) as channel,
    ):
        jobs = JobServiceStub(channel)
        one, two, reader = map(server.metadata, ("one", "two", "reader"))
        mine = jobs.StartJob(pb.StartJobRequest(extract_vectors=extraction(tags=["own"])), metadata=one).job
        done = list(jobs.FollowJob(pb.FollowJobRequest(id=mine.id), metadata=one))[-1]
        assert done.extract_vectors.WhichOneof("event") in ("result", "progress")
        # Of another tenant it is no job.
        assert refusal(lambda: jobs.GetJob(pb.GetJobRequest(id=mine.id), metadata=two)).code is CODES.NOT_FOUND
        assert list(jobs.ListJobs(pb.ListJobsRequest(), metadata=two).jobs) == []
        # Who may not call the method may not run it as a job.
        denied = jobs.StartJob(pb.StartJobRequest(extract_vectors=extraction()), metadata=reader).job
        refused = refusal(lambda: list(jobs.FollowJob(pb.FollowJobRequest(id=denied.id), metadata=reader)))
        assert (refused.code, refused.reason) == (CODES.PERMISSION_DENIED, "METHOD_NOT_ALLOWED")
    lines = {(line["tenant"], line["method"], line["code"]) for line in server.audit()}
    assert ("one", "SteeringService/ExtractVectors", "OK") in lines


def test_a_tenant_of_one_call_at_a_time_runs_follows_and_cancels_a_job(live_server: LiveServer, tmp_path: Path):
    policy = "tenants:\n  one: {max_concurrent: 1}\n"
    with (
        secured(live_server.model, tmp_path, "one", policy=policy) as server,
        Client(server.server.address, token=server.tokens["one"]) as client,
        grpc.insecure_channel(server.server.address) as channel,
    ):
        client.create_watch([watch_neurons("n", 0, [1])], tags=["quiet"])
        client.start_watch("quiet")
        jobs, one = JobServiceStub(channel), server.metadata("one")
        job = jobs.StartJob(endless(), metadata=one).job
        following = jobs.FollowJob(pb.FollowJobRequest(id=job.id), metadata=one)
        assert next(following).record_reference.progress.total == 1000
        assert jobs.CancelJob(pb.CancelJobRequest(id=job.id), metadata=one).job.state == pb.JOB_STATE_CANCELLED
        assert server.generate(channel, "one", generation())


def job(number: int, state: JobState, tenant: str = "") -> DetachedJob:
    made = DetachedJob(f"job-{number}", "S/M", tenant)
    if state is not JobState.RUNNING:
        made.end(state)
    return made


async def test_the_oldest_ended_jobs_are_forgotten_and_none_that_runs():
    jobs = DetachedJobs()
    jobs._jobs = {f"job-{n}": job(n, JobState.RUNNING if n == 0 else JobState.SUCCEEDED) for n in range(MAX_KEPT + 9)}

    async def nothing(job: DetachedJob) -> None: ...

    newest = jobs.start("S/M", "", nothing)
    kept = [j.id for j in jobs.of("")]
    assert kept[0] == newest.id
    assert kept[-1] == "job-0"
    assert len(kept) == MAX_KEPT + 1


async def test_no_tenant_forgets_the_jobs_of_another():
    jobs = DetachedJobs()
    jobs._jobs = {f"job-{n}": job(n, JobState.SUCCEEDED, "" if n else "other") for n in range(MAX_KEPT + 9)}

    async def nothing(job: DetachedJob) -> None: ...

    jobs.start("S/M", "", nothing)
    assert [j.id for j in jobs.of("other")] == ["job-0"]
    assert len(jobs.of("")) == MAX_KEPT


def test_the_followers_of_a_tenant_with_a_quota_are_bounded(live_server: LiveServer, tmp_path: Path):
    """They take no place of max_concurrent, but they take of the calls that the server answers at once."""
    policy = "tenants:\n  one: {max_concurrent: 1}\n  two: {}\n"
    with (
        secured(live_server.model, tmp_path, "one", "two", policy=policy) as server,
        Client(server.server.address, token=server.tokens["one"]) as client,
        grpc.insecure_channel(server.server.address) as channel,
    ):
        client.create_watch([watch_neurons("n", 0, [1])], tags=["quiet"])
        client.start_watch("quiet")
        jobs, one = JobServiceStub(channel), server.metadata("one")
        running = jobs.StartJob(endless(), metadata=one).job
        following = [jobs.FollowJob(pb.FollowJobRequest(id=running.id), metadata=one) for _ in range(BESIDE_PER_PLACE)]
        assert all(next(each).record_reference.progress.total == 1000 for each in following)
        refused = refusal(lambda: jobs.ListJobs(pb.ListJobsRequest(), metadata=one))
        assert (refused.code, refused.reason) == (CODES.RESOURCE_EXHAUSTED, "QUOTA_EXCEEDED")
        assert list(jobs.ListJobs(pb.ListJobsRequest(), metadata=server.metadata("two")).jobs) == []
        following[0].cancel()
        until(lambda: server.server.metric(FOLLOWING) == BESIDE_PER_PLACE - 1)
        jobs.CancelJob(pb.CancelJobRequest(id=running.id), metadata=one)


def test_a_start_that_is_sent_again_begins_no_second_job(server: LiveServer, jobs: JobServiceStub):
    asked = pb.StartJobRequest(extract_vectors=extraction(layers=[0]), key="once")
    first, again = jobs.StartJob(asked).job, jobs.StartJob(asked).job
    assert first.id == again.id
    assert ended(jobs, first.id).state == pb.JOB_STATE_SUCCEEDED
    assert jobs.StartJob(asked).job.id == first.id
    others = [pb.StartJobRequest(extract_vectors=extraction(layers=[0]), key=key) for key in ("twice", "", "")]
    assert len({first.id, *(jobs.StartJob(other).job.id for other in others)}) == 4


def test_a_key_that_is_too_long_is_refused_by_name(jobs: JobServiceStub):
    refused = refusal(lambda: jobs.StartJob(pb.StartJobRequest(extract_vectors=extraction(), key="k" * 129)))
    assert refused.code is CODES.INVALID_ARGUMENT
    assert refused.details["BadRequest"].field_violations[0].field == "key"


async def test_a_key_is_of_one_tenant():
    jobs = DetachedJobs()

    async def nothing(job: DetachedJob) -> None: ...

    ids = {jobs.start("S/M", tenant, nothing, "key").id for tenant in ("one", "two", "one")}
    assert len(ids) == 2

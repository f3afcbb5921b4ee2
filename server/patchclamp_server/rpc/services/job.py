"""JobService runs long calls of the other services, which outlive their client."""

from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing
from typing import Any

from google.protobuf import descriptor_pool

from patchclamp.v1 import job_pb2 as pb
from patchclamp.v1.job_pb2_grpc import JobServiceServicer
from patchclamp_server.callers import CALLER
from patchclamp_server.engine.call_observer import OBSERVER
from patchclamp_server.errors import Cancelled, InvalidArgument
from patchclamp_server.interventions.field_checks import chosen
from patchclamp_server.rpc.call.detached_jobs import DetachedContext, DetachedJob, DetachedJobs, JobState
from patchclamp_server.rpc.call.interceptors import CallInterceptor, Method
from patchclamp_server.rpc.codecs.times import timestamp

Context = Any
MAX_KEY_BYTES = 128


def job_methods(services: tuple[str, ...]) -> dict[str, Method]:
    """Returns the method by the field of StartJobRequest that holds its request."""
    streams = {
        method.input_type.full_name: Method(service, method.name)
        for service in services
        for method in descriptor_pool.Default().FindServiceByName(service).methods
        if method.server_streaming and not method.client_streaming
    }
    fields: Any = pb.StartJobRequest.DESCRIPTOR.oneofs_by_name["request"].fields
    return {field.name: streams[field.message_type.full_name] for field in fields}


class JobService(JobServiceServicer):
    """Runs jobs. `servicers` has them by the full name of their service; every call, and so every job, passes through
    `calls`."""

    def __init__(self, jobs: DetachedJobs, servicers: Mapping[str, Any], calls: CallInterceptor) -> None:
        self._jobs = jobs
        self._servicers = servicers
        self._calls = calls
        self._methods = job_methods(tuple(servicers))

    async def StartJob(self, request: pb.StartJobRequest, context: Context) -> pb.StartJobResponse:
        kind = chosen(request, "request", "")
        if len(request.key.encode()) > MAX_KEY_BYTES:
            raise InvalidArgument("key", f"expected at most {MAX_KEY_BYTES} bytes, got {len(request.key.encode())}")
        method = self._methods[kind]
        handler = getattr(self._servicers[method.service], method.name)
        message = getattr(request, kind)

        async def call(job: DetachedJob) -> None:
            # The trace of the call that began it ends with that call.
            OBSERVER.set(None)
            await self._calls.answer_detached(method, handler, message, DetachedContext(context, job))

        name = f"{method.service.rpartition('.')[2]}/{method.name}"
        job = self._jobs.start(name, CALLER.get().tenant, call, request.key)
        return pb.StartJobResponse(job=encode_job(job))

    async def FollowJob(self, request: pb.FollowJobRequest, context: Context) -> AsyncIterator[pb.FollowJobResponse]:
        job = self._get(request.id)
        kind = next(kind for kind, method in self._methods.items() if job.method.endswith(f"/{method.name}"))
        async with aclosing(job.responses()) as responses:
            async for response in responses:
                of_kind: dict[str, Any] = {kind: response}
                yield pb.FollowJobResponse(**of_kind)
        if job.status is not None:
            await context.abort(job.status.code, job.status.details, job.status.trailing_metadata)
        if job.state is JobState.CANCELLED:
            raise Cancelled("", f"{job.id} was cancelled")

    async def GetJob(self, request: pb.GetJobRequest, context: Context) -> pb.GetJobResponse:
        return pb.GetJobResponse(job=encode_job(self._get(request.id)))

    async def ListJobs(self, request: pb.ListJobsRequest, context: Context) -> pb.ListJobsResponse:
        return pb.ListJobsResponse(jobs=map(encode_job, self._jobs.of(CALLER.get().tenant)))

    async def CancelJob(self, request: pb.CancelJobRequest, context: Context) -> pb.CancelJobResponse:
        job = self._get(request.id)
        await self._jobs.cancel(job)
        return pb.CancelJobResponse(job=encode_job(job))

    def _get(self, job_id: str) -> DetachedJob:
        return self._jobs.get(job_id, CALLER.get().tenant)


def encode_job(job: DetachedJob) -> pb.Job:
    state = pb.JobState.Value(f"JOB_STATE_{job.state.name}")
    message = pb.Job(id=job.id, method=job.method, state=state, created=timestamp(job.created))
    if job.ended is not None:
        message.ended.CopyFrom(timestamp(job.ended))
    if job.progress is not None:
        progress: Any = job.progress.progress  # type: ignore[attr-defined]
        # A recording counts tokens, and has one stage.
        counts_tokens = "tokens" in progress.DESCRIPTOR.fields_by_name
        message.stage = "tokens" if counts_tokens else progress.stage
        message.done = progress.tokens if counts_tokens else progress.done
        message.total = progress.total
    if job.status is not None:
        message.error_code, message.error_message = job.status.code.name, job.status.details
    return message

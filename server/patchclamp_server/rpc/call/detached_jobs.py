"""Detached jobs are calls that go on without their client; this keeps what they need of gRPC, and their results."""

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import grpc
from google.protobuf.message import Message

from patchclamp_server.errors import NotFound

# So much is kept of the jobs of a tenant that have ended: no results are dropped for those of another tenant.
KEPT_SECONDS = 24 * 3600.0
MAX_KEPT = 256
MAX_KEPT_BYTES = 64 * 1024 * 1024
PROGRESS = "progress"


class JobState(Enum):
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


@dataclass(eq=False)
class DetachedJob:
    """One job, in the event loop of the server. `results` has its responses but those that report progress."""

    id: str
    method: str
    tenant: str
    key: str = ""
    created: float = field(default_factory=time.time)
    ended: float | None = None
    state: JobState = JobState.RUNNING
    results: list[Message] = field(default_factory=list)
    # These are the last response that reported progress, and how many did.
    progress: Message | None = None
    told: int = 0
    status: grpc.Status | None = None
    task: "asyncio.Task[None] | None" = None
    _changed: asyncio.Event = field(default_factory=asyncio.Event)

    def add(self, response: Message) -> None:
        if response.WhichOneof("event") == PROGRESS:
            self.progress = response
            self.told += 1
        else:
            self.results.append(response)
        self._wake()

    def end(self, state: JobState) -> None:
        self.state, self.ended = state, time.time()
        self._wake()

    async def responses(self) -> AsyncGenerator[Message, None]:
        """Yields all results, the latest progress, and what comes later, until the job has ended."""
        given, told = 0, 0
        while True:
            changed = self._changed
            if given < len(self.results):
                given += 1
                yield self.results[given - 1]
            elif told < self.told and self.progress is not None:
                told = self.told
                yield self.progress
            elif self.ended is not None:
                return
            else:
                await changed.wait()

    @property
    def bytes(self) -> int:
        return sum(result.ByteSize() for result in self.results)

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()


class DetachedContext:
    """Replaces gRPC's context: it knows who called, nobody waits, and what is written is kept."""

    def __init__(self, call: Any, job: DetachedJob) -> None:
        self._metadata = tuple(call.invocation_metadata() or ())
        self._auth = call.auth_context()
        self._peer = call.peer()
        self._job = job

    def invocation_metadata(self) -> tuple[Any, ...]:
        return self._metadata

    def auth_context(self) -> Any:
        return self._auth

    def peer(self) -> Any:
        return self._peer

    def time_remaining(self) -> None:
        """Returns None: a job has no deadline."""

    def code(self) -> None:
        """Returns None: a handler that returns has succeeded."""

    async def write(self, response: Message) -> None:
        self._job.add(response)

    async def abort(self, code: grpc.StatusCode, details: str, trailing_metadata: Any = ()) -> None:
        self._job.status = _Status(code, details, trailing_metadata)


@dataclass(frozen=True)
class _Status(grpc.Status):
    code: grpc.StatusCode
    details: str
    trailing_metadata: Any


class DetachedJobs:
    """The jobs of one server process, for one event loop."""

    def __init__(self) -> None:
        self._jobs: dict[str, DetachedJob] = {}

    def start(
        self, method: str, tenant: str, call: Callable[[DetachedJob], Awaitable[None]], key: str = ""
    ) -> DetachedJob:
        """Starts a job, which `call` answers in a task of its own, in a copy of this context. A job of the tenant that
        was started with this key is not started again."""
        self._forget(tenant)
        for job in self.of(tenant) if key else ():
            if job.key == key:
                return job
        job = DetachedJob(f"job-{secrets.token_hex(8)}", method, tenant, key)
        self._jobs[job.id] = job
        job.task = asyncio.ensure_future(call(job))
        job.task.add_done_callback(lambda task: job.end(_state(job, task)))
        return job

    def get(self, job_id: str, tenant: str) -> DetachedJob:
        """Raises NotFound, also for a job of another tenant."""
        job = self._jobs.get(job_id)
        if job is None or job.tenant != tenant:
            raise NotFound("id", f"no job {job_id!r}; jobs end with the server, and are forgotten after a day")
        return job

    def of(self, tenant: str) -> list[DetachedJob]:
        """Returns the tenant's jobs, the newest first."""
        return [job for job in reversed(self._jobs.values()) if job.tenant == tenant]

    async def cancel(self, job: DetachedJob) -> None:
        """Cancels a job and returns when it has ended."""
        if job.task is not None and not job.task.done():
            job.task.cancel()
            await asyncio.wait([job.task])
            # A callback marks its end, which comes after those who waited.
            await asyncio.sleep(0)

    async def ended(self, seconds: float) -> None:
        """Returns when no job runs any more, or after `seconds`: a job may compute for long before it checks."""
        if running := [job.task for job in self._jobs.values() if job.task is not None and not job.task.done()]:
            await asyncio.wait(running, timeout=seconds)

    def _forget(self, tenant: str) -> None:
        """Drops jobs that ended a day ago, and the tenant's oldest ended ones until the rest is within its bounds."""
        now = time.time()
        for job in list(self._jobs.values()):
            if job.ended is not None and now - job.ended > KEPT_SECONDS:
                del self._jobs[job.id]
        over = [job for job in self._jobs.values() if job.ended is not None and job.tenant == tenant]
        kept = sum(job.bytes for job in over)
        for i, job in enumerate(over):
            if len(over) - i < MAX_KEPT and kept <= MAX_KEPT_BYTES:
                break
            kept -= job.bytes
            del self._jobs[job.id]


def _state(job: DetachedJob, task: "asyncio.Future[None]") -> JobState:
    if task.cancelled():
        return JobState.CANCELLED
    if job.status is None and task.exception() is None:
        return JobState.SUCCEEDED
    return JobState.CANCELLED if job.status and job.status.code is grpc.StatusCode.CANCELLED else JobState.FAILED

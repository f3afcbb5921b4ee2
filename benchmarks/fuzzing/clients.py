"""Makes random calls to a server, and keeps what came of them."""

import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import grpc
from google.protobuf import text_format
from seed_requests import preparation
from serving import ServerProcess, at_rest

from fuzzing.cases import Case, methods
from fuzzing.times import WORST_SECONDS, Probe, seconds_to_idle
from patchclamp.v1 import job_pb2
from patchclamp.v1.job_pb2_grpc import JobServiceStub

CODES = grpc.StatusCode
DECLARED = frozenset(
    {
        CODES.OK,
        CODES.INVALID_ARGUMENT,
        CODES.NOT_FOUND,
        CODES.ALREADY_EXISTS,
        CODES.FAILED_PRECONDITION,
        CODES.RESOURCE_EXHAUSTED,
        CODES.ABORTED,
        CODES.CANCELLED,
        CODES.DEADLINE_EXCEEDED,
    }
)
CLIENTS = 8
# Calls that the growth of memory is not measured over: caches fill, pools of threads and allocators reach their size.
WARM_UP = 0.3
MOST_SHOWN_CHARACTERS = 4000


@dataclass
class Found:
    """Of all calls. `seconds`: that each took; `slowest`: of them, and which it was."""

    codes: Counter[str] = field(default_factory=Counter)
    by_method: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    slowest: tuple[float, str] = (0.0, "")


@dataclass
class Ended:
    """A server after its calls. `waited`: the longest that a small call took beside them; `idle_seconds`: how long the
    server went on."""

    alive: bool
    serving: bool
    held: dict[str, float]
    growth: float
    waited: float
    idle_seconds: float
    log: str


def status_of(channel: grpc.Channel, case: Case) -> tuple[CODES, str]:
    """Makes the call; its code and message. The answer is read as bytes: what is in it is others' to test."""
    requests = [m if isinstance(m, bytes) else m.SerializeToString() for m in case.messages]
    path = case.method.path
    options = {"timeout": case.deadline, "metadata": case.metadata}
    call = (
        channel.stream_stream(path)(iter(requests), **options)
        if case.streams
        else channel.unary_stream(path)(requests[0], **options)
    )
    try:
        for received, _ in enumerate(call, start=1):
            if case.leaves_after is not None and received > case.leaves_after:
                break
    except grpc.RpcError:
        pass
    if case.leaves_after is not None:
        call.cancel()
    return call.code(), call.details()


class Fuzzer:
    def __init__(self) -> None:
        self.found = Found()
        self._lock = threading.Lock()

    def serve(self, model: Path, everything: Sequence[Case]) -> Ended:
        """All calls to a server of its own, which then ends."""
        warm_up = int(len(everything) * WARM_UP)
        with _prepared(model) as server:
            with Probe(server) as probe:
                self._run(server, everything[:warm_up])
                before = server.rss_bytes() if server.is_alive else 0
                self._run(server, everything[warm_up:])
            alive = server.is_alive
            if alive:
                self._end_jobs(server)
            return Ended(
                alive=alive,
                serving=alive and _is_serving(server),
                held=at_rest(server) if alive else {"everything": 1.0},
                growth=server.rss_bytes() / before if alive and before else 0.0,
                waited=probe.worst,
                idle_seconds=seconds_to_idle(server) if alive else 0.0,
                log=server.log(),
            )

    def _end_jobs(self, server: ServerProcess) -> None:
        """Jobs go on without their clients, some for ever; what ended them is looked at like what ended a call."""
        with grpc.insecure_channel(server.address) as channel:
            stub = JobServiceStub(channel)
            for job in stub.ListJobs(job_pb2.ListJobsRequest()).jobs:
                ended = stub.CancelJob(job_pb2.CancelJobRequest(id=job.id)).job
                if ended.error_code and CODES[ended.error_code] not in DECLARED:
                    self.found.failures.append(f"# job {ended.method} ended with {ended.error_code}")

    def _run(self, server: ServerProcess, everything: Sequence[Case]) -> None:
        # One channel a client: what breaks a connection must not stop the others.
        shares = [everything[i::CLIENTS] for i in range(CLIENTS)]
        with ThreadPoolExecutor(CLIENTS) as pool:
            for done in [pool.submit(self._call, server, share) for share in shares]:
                done.result()

    def _call(self, server: ServerProcess, share: Sequence[Case]) -> None:
        with grpc.insecure_channel(server.address) as channel:
            for case in share:
                started = time.monotonic()
                code, detail = status_of(channel, case)
                seconds = time.monotonic() - started
                with self._lock:
                    self._keep(case, code, detail, seconds)

    def _keep(self, case: Case, code: CODES, detail: str, seconds: float) -> None:
        found = self.found
        found.codes[code.name] += 1
        found.by_method[case.method.path] += 1
        found.seconds.append(seconds)
        found.slowest = max(found.slowest, (seconds, f"{case.kind}: {case.method.path}"))
        if code not in _allowed(case) or seconds > WORST_SECONDS:
            found.failures.append(_as_text(case, f"{code.name} after {seconds:.1f} s ({detail})"))


@contextmanager
def _prepared(model: Path) -> Iterator[ServerProcess]:
    """A server with the artifacts and the watch that calls name."""
    with (
        tempfile.TemporaryDirectory(prefix="patchclamp-fuzz-") as artifacts,
        ServerProcess(str(model), Path(artifacts), f"--match-model=other={model}") as server,
    ):
        with grpc.insecure_channel(server.address) as channel:
            for name, messages in preparation():
                method = methods()[name]
                code, detail = status_of(channel, Case("right", method, messages, method.streams))
                if code is not CODES.OK:
                    raise SystemExit(f"{name}, which the calls need, ended with {code.name}: {detail}")
        yield server


def _is_serving(server: ServerProcess) -> bool:
    """Not, when it does not say so in time."""
    try:
        return server.is_serving()
    except grpc.RpcError:
        return False


def _allowed(case: Case) -> frozenset[CODES]:
    if case.kind == "unknown method":
        return frozenset({CODES.UNIMPLEMENTED})
    return DECLARED


def _as_text(case: Case, how: str) -> str:
    lines = [f"# {case.kind}: {case.method.path} ended with {how}"]
    for message in case.messages:
        shown = repr(message) if isinstance(message, bytes) else text_format.MessageToString(message)
        lines.append(shown if len(shown) <= MOST_SHOWN_CHARACTERS else shown[:MOST_SHOWN_CHARACTERS] + " …")
    return "\n".join(lines)

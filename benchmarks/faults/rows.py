"""The rows of benchmarks/faults: one fault each, done to a running server, with what was lost by it."""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
from serving import PATIENCE_SECONDS, ServerProcess, at_rest

from faults.clients import OK, Client, Lockstep, Seen, killed_client, request, seen, status_of
from faults.credentials import Secrets
from patchclamp.v1 import program_pb2, sparse_policy_pb2, sparsity_pb2
from patchclamp.v1.sparsity_pb2_grpc import SparsityServiceStub

NEIGHBOUR = "A neighbour who wants nothing but its tokens"
RETRY, TO_MEND = "RESOURCE_EXHAUSTED with RetryInfo", "FAILED_PRECONDITION with PreconditionFailure"


@dataclass(frozen=True)
class Row:
    """`lost`: what there should have been and was not, by name; nothing when all its values are empty or 0."""

    fault: str
    sent: str
    seen: str
    expected: str
    lost: dict[str, Any]

    @property
    def lost_nothing(self) -> bool:
        return not any(self.lost.values())

    def as_text(self) -> str:
        lost = {name: value for name, value in self.lost.items() if value}
        lines = [
            self.fault,
            f"    sent: {self.sent}",
            f"    seen: {self.seen}" + ("" if self.seen == self.expected else f"   EXPECTED: {self.expected}"),
            f"    lost: {lost or 'nothing'} (of {', '.join(self.lost) or 'what is outside the process'})",
        ]
        return "\n".join(lines)


@dataclass
class Matrix:
    """What the rows share: what an undisturbed server answers, and the artifacts that were acknowledged so far."""

    tokens: int
    width: int
    layers: int
    truth: tuple[int, ...] = ()
    finished: list[str] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    _uploads: int = 0

    def learn(self, client: Client) -> None:
        """What the neighbour must get, and something that can be lost."""
        self.truth = client.generate(request(NEIGHBOUR, self.tokens)).tokens
        self.upload(client)

    def upload(self, client: Client, tag: str = "") -> str:
        self._uploads += 1
        artifact = client.upload(self._uploads, self.width, tag)
        self.finished.append(artifact)
        return artifact

    def add(self, fault: str, sent: str, seen: str, expected: str, **lost: Any) -> None:
        self.rows.append(Row(fault, sent, seen, expected, lost))
        print(self.rows[-1].as_text(), flush=True)

    def missing(self, got: Seen) -> int:
        """Tokens of the neighbour that did not come, or were others."""
        same = sum(a == b for a, b in zip(got.tokens, self.truth, strict=False))
        return len(self.truth) - same

    @contextmanager
    def neighbour(self, client: Client) -> Iterator[Callable[[], int]]:
        """A request that runs through the fault. Called after it: the tokens that were lost."""
        session = Lockstep(client.channel, request(NEIGHBOUR, self.tokens))
        first = session.begin()

        def lost() -> int:
            rest = session.end(self.tokens - 1)
            return self.missing(Seen(rest.status, (first, *rest.tokens)))

        yield lost


Run = Callable[[Matrix, ServerProcess, Client], None]


def cancel(matrix: Matrix, server: ServerProcess, client: Client) -> None:
    with matrix.neighbour(client) as lost:
        stream = client.stream(request("Once", matrix.tokens))
        next(stream)
        stream.cancel()
        status = seen(stream).status
        sent = f"Generate of {matrix.tokens} tokens, cancelled after the first"
        matrix.add("cancel", sent, status, "CANCELLED", tokens_of_the_neighbour=lost(), held=at_rest(server))


def deadline(matrix: Matrix, server: ServerProcess, client: Client) -> None:
    with matrix.neighbour(client) as lost:
        session = Lockstep(client.channel, request("Once", matrix.tokens), timeout=1.0)
        session.begin()
        status = session.wait().status
        sent = "a lockstep Session with a deadline of 1 s, which was granted one token"
        matrix.add("deadline", sent, status, "DEADLINE_EXCEEDED", tokens_of_the_neighbour=lost(), held=at_rest(server))


def disconnect(matrix: Matrix, server: ServerProcess, client: Client) -> None:
    with matrix.neighbour(client) as lost:
        ended = killed_client(server.address, request("Once", matrix.tokens))
        sent = "a Session from a process that was killed"
        expected = f"one token, then killed ({-signal.SIGKILL})"
        matrix.add("disconnect", sent, ended, expected, tokens_of_the_neighbour=lost(), held=at_rest(server))


def slow_reader(matrix: Matrix, server: ServerProcess, client: Client) -> None:
    """More than the window of a stream holds; nothing is read before all of it was made."""
    neurons = program_pb2.NeuronReadout(neurons=range(64))
    readout = program_pb2.Readout(site="SITE_MLP_POST", all_layers=True, neurons=neurons)
    asked = request(NEIGHBOUR, matrix.tokens, program=program_pb2.Program(readouts=[readout]))
    with matrix.neighbour(client) as lost:
        before = server.metrics()["patchclamp_prefill_tokens_total"]
        stream = client.stream(asked)
        while server.metrics()["patchclamp_prefill_tokens_total"] == before:
            time.sleep(0.05)
        # The neighbour's is left.
        while server.metrics()["patchclamp_sequences_running"] > 1:
            time.sleep(0.05)
        got = seen(stream)
        matrix.add(
            "slow reader",
            f"Generate of {matrix.tokens} tokens with readouts, read after all of them were made",
            got.status,
            OK,
            tokens_of_the_reader=matrix.missing(got),
            tokens_of_the_neighbour=lost(),
            held=at_rest(server),
        )


def kill_during_uploads(matrix: Matrix, server: ServerProcess, client: Client) -> Callable[[Client], None]:
    """One upload half sent, and others one after another until the connection breaks. What to look at afterwards."""
    waiting, half_sent = client.upload_that_waits(matrix.width)
    half_sent.wait(PATIENCE_SECONDS)
    enough, broken = threading.Event(), []

    def upload() -> None:
        try:
            for number in range(100_000):
                matrix.upload(client, tag="last")
                if number == 3:
                    enough.set()
        except grpc.RpcError as error:
            broken.append(status_of(error))

    uploading = threading.Thread(target=upload)
    before = len(matrix.finished)
    uploading.start()
    enough.wait(PATIENCE_SECONDS)
    server.kill()
    uploading.join()
    status = waiting.result(PATIENCE_SECONDS)

    def after(restarted: Client) -> None:
        sent = f"half an upload, and {len(matrix.finished) - before} whole ones until kill -9"
        lost = restarted.broken(matrix.finished)
        others = restarted.broken(sorted(restarted.listed()))
        seen_by_both = " and ".join(sorted({status, *broken}))
        matrix.add(
            "kill -9 during uploads",
            sent,
            seen_by_both,
            "UNAVAILABLE",
            finished_artifacts=lost,
            broken_artifacts=others,
        )

    return after


def kill_during_calibration(matrix: Matrix, server: ServerProcess, client: Client) -> Callable[[Client], None]:
    asked = sparsity_pb2.CalibrateProfileRequest(
        policy=sparse_policy_pb2.SparsePolicy(cats={}, keep_ratio=0.5),
        text=sparsity_pb2.SparsityText(texts=["It rained, and the river rose. " * 400], document_tokens=32),
        tags=["calibrated"],
    )
    progress = SparsityServiceStub(client.channel).CalibrateProfile(asked)
    next(progress)
    server.kill()
    status = OK
    try:
        for response in progress:
            if response.HasField("result"):
                matrix.finished.append(response.result.artifact.id)
    except grpc.RpcError as error:
        status = status_of(error)

    def after(restarted: Client) -> None:
        lost = restarted.broken(matrix.finished)
        others = restarted.broken(sorted(restarted.listed()))
        sent = "CalibrateProfile, and kill -9 at its first progress"
        matrix.add(
            "kill -9 during a calibration",
            sent,
            status,
            "UNAVAILABLE",
            finished_artifacts=lost,
            broken_artifacts=others,
        )

    return after


def bad_certificate(matrix: Matrix, server: ServerProcess, client: Client, secrets: Secrets) -> None:
    """`client` shows the right ones."""
    with matrix.neighbour(client) as lost, secrets.bad(server.address) as channels:
        begun = server.metrics()["patchclamp_steps_total"]
        statuses = {Client(channel).generate(request("Once", 4)).status for channel in channels.values()}
        matrix.add(
            "bad certificate",
            f"Generate with {', '.join(channels)}",
            " and ".join(sorted(statuses)),
            "UNAVAILABLE",
            steps_that_they_got=server.metrics()["patchclamp_steps_total"] - begun,
            tokens_of_the_neighbour=lost(),
            held=at_rest(server),
        )


def expired_token(matrix: Matrix, server: ServerProcess, client: Client, secrets: Secrets) -> None:
    with matrix.neighbour(client) as lost, secrets.with_an_expired_token(server.address) as channel:
        begun = server.metrics()["patchclamp_steps_total"]
        status = Client(channel).generate(request("Once", 4)).status
        matrix.add(
            "expired token",
            "Generate with a token that expired an hour ago",
            status,
            "UNAUTHENTICATED",
            steps_that_it_got=server.metrics()["patchclamp_steps_total"] - begun,
            tokens_of_the_neighbour=lost(),
            held=at_rest(server),
        )


def spoil(artifacts: Path, artifact: str) -> None:
    """Changes one byte in the middle of an artifact's file."""
    digest = artifact.removeprefix("sha256:")
    path = artifacts / "objects" / digest[:2] / f"{digest[2:]}.safetensors"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)


def corrupted(matrix: Matrix, server: ServerProcess, client: Client, artifact: str) -> None:
    """`artifact` was spoiled before the server started."""
    vector = program_pb2.Vector(artifact=artifact)
    edit = program_pb2.Edit(site="SITE_RESID_POST", layers=[0], add=program_pb2.AddVector(vector=vector))
    program = program_pb2.Program(edits=[edit])
    statuses = {client.generate(request("Once", 4, program=program)).status}
    try:
        client.download(artifact)
        statuses.add(OK)
    except grpc.RpcError as error:
        statuses.add(status_of(error))
    others = [each for each in matrix.finished if each != artifact]
    lost = client.broken(others)
    # The same content again mends it.
    index = matrix.finished.index(artifact)
    mended = client.upload(index + 1, matrix.width)
    matrix.add(
        "corrupted artifact",
        "Download and Generate with an artifact of which one byte was changed on the disk",
        " and ".join(sorted(statuses)),
        TO_MEND,
        other_artifacts=lost,
        not_mended_by_a_new_upload=client.broken([artifact]) if mended == artifact else [artifact],
        held=at_rest(server),
    )


def drain(matrix: Matrix, server: ServerProcess, client: Client, streams: int = 16) -> None:
    """SIGTERM while streams run: they end as if nothing had been, and new calls are refused."""
    sessions = [Lockstep(client.channel, request(NEIGHBOUR, matrix.tokens)) for _ in range(streams)]
    begun = [session.begin() for session in sessions]
    server.signal(signal.SIGTERM)
    refused = OK
    # One that crosses the GOAWAY on its way is reset.
    while refused in (OK, "CANCELLED"):
        refused = client.generate(request("late", 1)).status
    for session in sessions:
        session.advance(matrix.tokens - 1)
    results = [session.wait() for session in sessions]
    tokens = sum(matrix.missing(Seen(r.status, (first, *r.tokens))) for first, r in zip(begun, results, strict=True))
    statuses = {each.status for each in results}
    matrix.add(
        "SIGTERM under load",
        f"{streams} Sessions, SIGTERM, and a Generate",
        f"{' and '.join(sorted(statuses))}; late: {refused}; exit {server.wait()}",
        f"{OK}; late: UNAVAILABLE; exit 0",
        tokens=tokens,
    )


def second_signal(matrix: Matrix, server: ServerProcess, client: Client) -> None:
    session = Lockstep(client.channel, request(NEIGHBOUR, matrix.tokens))
    session.begin()
    server.signal(signal.SIGTERM)
    while client.generate(request("late", 1)).status != "UNAVAILABLE":
        pass
    server.signal(signal.SIGTERM)
    exit_status = server.wait()
    matrix.add(
        "a second SIGTERM",
        "a Session that stays open through two SIGTERM",
        f"{session.wait().status}; exit {exit_status}",
        f"UNAVAILABLE; exit {-signal.SIGTERM}",
    )


def disk_full(matrix: Matrix, server: ServerProcess, client: Client, root: Path, how: str) -> None:
    """`root`: the artifact store as seen from here."""
    kept: list[str] = []
    status = ""
    for number in range(100_000, 110_000):
        try:
            kept.append(client.upload(number, matrix.width, tag=f"t{number}"))
        except grpc.RpcError as error:
            status = status_of(error)
            break
    lost = client.broken(kept)
    unfinished = [path.name for path in (root / "tmp").iterdir()]
    others = sorted(client.listed() - set(kept))
    client.delete(kept.pop())
    client.delete(kept.pop())
    again = client.upload(200_000, matrix.width)
    matrix.add(
        "disk full",
        f"{len(kept) + 3} uploads into {how}",
        status,
        RETRY,
        finished_artifacts=lost,
        left_behind=unfinished + others,
        not_stored_after_a_delete=client.broken([again]),
        held=at_rest(server),
    )


def step_fault(matrix: Matrix, server: ServerProcess, client: Client, fault: str, number: int, expected: str) -> None:
    """A step of two requests fails; a third one waits meanwhile."""
    with matrix.neighbour(client) as lost:
        sessions = [Lockstep(client.channel, request("Once", matrix.tokens)) for _ in range(2)]
        for session in sessions:
            session.begin()
        server.signal(number)
        statuses = {session.end(matrix.tokens - 1).status for session in sessions[:1]}
        server.signal(number)
        statuses |= {session.end(matrix.tokens - 1).status for session in sessions[1:]}
        again = client.generate(request(NEIGHBOUR, matrix.tokens))
        matrix.add(
            fault,
            "Sessions whose next step fails",
            " and ".join(sorted(statuses)),
            expected,
            tokens_of_the_neighbour=lost(),
            tokens_of_the_next_request=matrix.missing(again),
            held=at_rest(server),
        )


def fatal(matrix: Matrix, server: ServerProcess, client: Client, fault: str, number: int, steps: int) -> None:
    """After `steps` failed steps the process ends, and whoever has a call learns it."""
    session = Lockstep(client.channel, request(NEIGHBOUR, matrix.tokens))
    session.begin()
    server.signal(number)
    statuses = [client.generate(request("Once", 4)).status for _ in range(steps)]
    waiting = session.wait().status
    exit_status = server.wait()
    matrix.add(
        fault,
        f"{steps} Generate one after another, and a Session that waits",
        f"{' '.join(statuses)}; {waiting}; exit {exit_status}",
        f"{' '.join(['INTERNAL'] * (steps - 1) + ['UNAVAILABLE'])}; UNAVAILABLE; exit 1",
    )

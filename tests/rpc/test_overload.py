"""What a full server answers, over every way there is to be refused, and what clients that are slow cost it."""

import asyncio
import queue
import re
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from live import LiveServer
from patience import PATIENCE_SECONDS
from safetensors.torch import save
from statuses import Failure, failure
from test_generation_service import request
from test_session import Client

import patchclamp_server
from patchclamp.v1 import artifact_pb2, model_pb2
from patchclamp.v1 import generation_pb2 as pb
from patchclamp.v1 import program_pb2 as program
from patchclamp.v1.artifact_pb2_grpc import ArtifactServiceStub
from patchclamp.v1.generation_pb2_grpc import GenerationServiceStub
from patchclamp.v1.model_pb2_grpc import ModelServiceStub
from patchclamp_server import errors
from patchclamp_server.engine.config import EngineConfig
from patchclamp_server.engine.request import Readouts, ReadoutValue, Token
from patchclamp_server.errors import DeadlineExceeded
from patchclamp_server.model.load import LoadedModel
from patchclamp_server.rpc.call.errors import to_status
from patchclamp_server.rpc.call.upload_space import UploadLimits, UploadSpace
from patchclamp_server.rpc.streams.stream import EVENT_VALUES, MAX_WAITING_VALUES, values_of

FULL = grpc.StatusCode.RESOURCE_EXHAUSTED
LONG = request(stop=pb.StopConditions(max_tokens=200, ignore_eos=True))
ASK: dict[str, Callable[[grpc.Channel], Any]] = {
    "Generate": lambda channel: list(GenerationServiceStub(channel).Generate(request())),
    "Session": lambda channel: list(
        GenerationServiceStub(channel).Session(iter([pb.SessionRequest(start=pb.SessionStart(request=request()))]))
    ),
    "Score": lambda channel: GenerationServiceStub(channel).Score(
        pb.ScoreRequest(prompt=pb.Prompt(text="hello"), text=" there")
    ),
    "Compare": lambda channel: list(GenerationServiceStub(channel).Compare(pb.CompareRequest(request=request()))),
}


def refused(call: Callable[[], Any]) -> Failure:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return failure(caught.value)


def retry_seconds(refusal: Failure) -> float:
    assert refusal.code is FULL
    return float(refusal.details["RetryInfo"].retry_delay.ToNanoseconds()) / 1e9


@pytest.fixture
def model(live_server: LiveServer) -> LoadedModel:
    return live_server.model


@pytest.fixture
def full(model: LoadedModel, tmp_path: Path) -> Iterator[tuple[LiveServer, grpc.Channel]]:
    """A server of one place and one that waits, both held by sessions whose clients do nothing."""
    engine = EngineConfig(max_sequences=1, max_waiting=1)
    with LiveServer(model, tmp_path, engine=engine) as server, grpc.insecure_channel(server.address) as channel:
        sessions = [Client(channel), Client(channel)]
        sessions[0].send(advance=pb.Advance(tokens=1))
        sessions[0].tokens(1)
        until(lambda: server.server.engine.stats().running + server.server.engine.stats().waiting == 2)
        yield server, channel
        for session in sessions:
            session.close()
            session.finished()


def until(condition: Callable[[], bool]) -> None:
    waited = threading.Event()
    for _ in range(int(PATIENCE_SECONDS / 0.01)):
        if condition():
            return
        waited.wait(0.01)
    raise AssertionError("it did not come to that")


@pytest.mark.parametrize("method", list(ASK))
def test_every_call_that_a_full_queue_refuses_is_told_when_to_come_back(
    full: tuple[LiveServer, grpc.Channel], method: str
):
    server, channel = full
    refusal = refused(lambda: ASK[method](channel))
    assert refusal.reason == "SERVER_FULL"
    assert 0.1 <= retry_seconds(refusal) <= 60.0
    assert server.metric('patchclamp_admission_refused_total{reason="queue_requests"}') == 1
    assert server.metric("patchclamp_queue_kv_tokens") > 0


def test_the_prompt_of_a_refused_call_is_not_looked_at(full: tuple[LiveServer, grpc.Channel]):
    """Refusing costs next to nothing: what is wrong with a request is said when there is room for it."""
    _, channel = full
    bad = request(sampling=pb.Sampling(temperature=-1.0))
    assert refused(lambda: list(GenerationServiceStub(channel).Generate(bad))).code is FULL


def test_there_is_room_again_when_work_has_ended(full: tuple[LiveServer, grpc.Channel], model: LoadedModel):
    server, channel = full
    engine = server.server.engine
    for request_id in list(engine.live.requests):
        engine.finish(request_id)
    until(lambda: not engine.live.requests)
    assert list(GenerationServiceStub(channel).Generate(request()))[-1].HasField("finished")


def test_calls_are_bounded_whatever_they_ask(model: LoadedModel, tmp_path: Path):
    with LiveServer(model, tmp_path, max_calls=2) as server, grpc.insecure_channel(server.address) as channel:
        sessions = [Client(channel), Client(channel)]
        for session in sessions:
            session.send(advance=pb.Advance(tokens=1))
            session.tokens(1)
        refusal = refused(lambda: ModelServiceStub(channel).ListModels(model_pb2.ListModelsRequest()))
        assert retry_seconds(refusal) > 0
        sessions[0].close()
        sessions[0].finished()
        until(lambda: len(server.server._in_flight._running) < 2)
        assert ModelServiceStub(channel).ListModels(model_pb2.ListModelsRequest()).models
        sessions[1].close()
        sessions[1].finished()


def test_every_class_of_refusal_carries_a_time():
    classes = [errors.ResourceExhausted]
    for cls in classes:
        classes += cls.__subclasses__()
    for cls in classes:
        error = cls("", "full")
        status = to_status(error)
        assert status.code is FULL
        assert b"google.rpc.RetryInfo" in dict(status.trailing_metadata)["grpc-status-details-bin"]
        assert error.retry_after_seconds > 0


def test_no_other_code_says_that_the_server_is_full():
    """Statuses are made in one place; a limit of gRPC itself, such as maximum_concurrent_rpcs, has no time to retry."""
    package = Path(patchclamp_server.__file__).parent
    sources = {path.relative_to(package).as_posix(): path.read_text() for path in package.rglob("*.py")}
    say_so = {name for name, text in sources.items() if re.search(r"StatusCode\.RESOURCE_EXHAUSTED", text)}
    assert say_so == {"rpc/call/errors.py"}
    assert not [name for name, text in sources.items() if "maximum_concurrent_rpcs" in text]


# Uploads

FILE = save({"layer.1": torch.arange(32, dtype=torch.float32)})


class Upload:
    """An upload that goes on as it is told."""

    def __init__(self, channel: grpc.Channel, size: int) -> None:
        self._sent: queue.Queue[artifact_pb2.UploadRequest | None] = queue.Queue()
        header = artifact_pb2.UploadHeader(
            kind=artifact_pb2.ARTIFACT_KIND_VECTOR, format=artifact_pb2.ARTIFACT_FORMAT_SAFETENSORS, size_bytes=size
        )
        self._sent.put(artifact_pb2.UploadRequest(header=header))
        self.call = ArtifactServiceStub(channel).Upload.future(iter(self._sent.get, None))

    def send(self, chunk: bytes) -> None:
        self._sent.put(artifact_pb2.UploadRequest(chunk=chunk))
        self._sent.put(None)

    def end(self) -> None:
        self.call.cancel()
        self._sent.put(None)


@pytest.fixture
def uploads(model: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LiveServer]:
    """A server with room for one upload of 600 bytes or two of FILE at a time."""
    spool = tmp_path / "spool"
    spool.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(spool))
    limits = {"max_upload_bytes": 1000, "max_concurrent_upload_bytes": 900, "upload_idle_seconds": 30.0}
    with LiveServer(model, tmp_path / "artifacts", **limits) as server:
        yield server


def arriving(tmp_path: Path) -> int:
    return len(list((tmp_path / "spool").iterdir()))


def test_uploads_beyond_the_bytes_that_may_arrive_at_once_are_refused(uploads: LiveServer, tmp_path: Path):
    with grpc.insecure_channel(uploads.address) as channel:
        first = Upload(channel, 600)
        until(lambda: arriving(tmp_path) == 1)
        refusal = refused(lambda: Upload(channel, 600).call.result())
        assert retry_seconds(refusal) >= 0.1
        assert refusal.details["ErrorInfo"].metadata["field"] == "header.size_bytes"
        second = Upload(channel, len(FILE))
        second.send(FILE)
        assert second.call.result().artifact.id
        first.end()


def test_an_upload_that_is_left_gives_back_its_bytes_and_its_file(uploads: LiveServer, tmp_path: Path):
    with grpc.insecure_channel(uploads.address) as channel:
        for _ in range(5):
            left = Upload(channel, 600)
            until(lambda: arriving(tmp_path) == 1)
            left.end()
            until(lambda: arriving(tmp_path) == 0)
        whole = Upload(channel, len(FILE))
        whole.send(FILE)
        assert whole.call.result().artifact.id
        until(lambda: arriving(tmp_path) == 0)


def test_more_than_may_ever_arrive_at_once_is_no_matter_of_time(uploads: LiveServer):
    with grpc.insecure_channel(uploads.address) as channel:
        assert refused(lambda: Upload(channel, 950).call.result()).fields == ["header.size_bytes"]


def test_an_upload_that_stops_sending_is_ended(model: LoadedModel, tmp_path: Path):
    with (
        LiveServer(model, tmp_path, upload_idle_seconds=0.2) as server,
        grpc.insecure_channel(server.address) as channel,
    ):
        slow = Upload(channel, 600)
        refusal = refused(slow.call.result)
        assert refusal.code is grpc.StatusCode.DEADLINE_EXCEEDED
        assert "nothing came for 0.2 s" in refusal.message
        slow.end()


async def test_an_upload_that_falls_behind_what_it_announced_is_ended_though_it_never_stops():
    """It would keep the bytes that it announced, and others out, as long as these may take: of a large one, days."""

    async def trickle() -> AsyncIterator[bytes]:
        for _ in range(1_000_000):
            await asyncio.sleep(0)
            yield b"x"

    space = UploadSpace(UploadLimits(idle_seconds=0.05, bytes_per_second=1e9))
    with pytest.raises(DeadlineExceeded, match=r"bytes in 0 s; expected 1e\+09 in a second"):
        async for _ in space.in_time(trickle(), len):
            pass


# Readers


def test_a_reader_that_stops_reading_holds_its_sequence_back_and_gets_everything_in_the_end(
    live_server: LiveServer, channel: grpc.Channel
):
    """Every neuron at every token, twenty times: far more than a connection takes that nobody reads."""
    every = program.NeuronReadout(neurons=range(64))
    readouts = [
        program.Readout(name=f"r{i}", site=program.SITE_MLP_POST, all_layers=True, neurons=every) for i in range(20)
    ]
    tokens = 200
    asked = request(
        stop=pb.StopConditions(max_tokens=tokens, ignore_eos=True), program=program.Program(readouts=readouts)
    )
    engine = live_server.server.engine
    # A window that is not widened by the speed of the connection.
    options = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 65536)]
    with grpc.insecure_channel(live_server.address, options) as slow:
        call = GenerationServiceStub(slow).Generate(asked)
        until(lambda: any(sequence.request.held() for sequence in list(engine.live.sequences.values())))
        [sequence] = engine.live.sequences.values()
        assert len(sequence.output_ids) < tokens / 2
        # Nobody else waits for it.
        assert list(GenerationServiceStub(channel).Generate(request()))[-1].HasField("finished")
        got = [token for response in call for token in response.tokens]
    assert [token.position for token in got] == list(range(5, 5 + tokens))
    # The last token is not computed.
    assert all(len(token.readouts) == 20 * 2 for token in got[:-1])


def test_what_waits_in_a_stream_is_counted_in_the_numbers_it_carries():
    readouts = Readouts(3, (ReadoutValue("a", 0, 3, (1.0,) * 100), ReadoutValue("a", 1, 3, (1.0,) * 100)))
    assert values_of(readouts) == 200 + 3 * EVENT_VALUES
    assert values_of(("edited", readouts)) == values_of(readouts)
    assert values_of(Token(1, 2, 0.5, ((1, 0.5),) * 20)) == 20 + EVENT_VALUES
    assert MAX_WAITING_VALUES > 1000 * EVENT_VALUES

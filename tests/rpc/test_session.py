"""Session: strengths that change between tokens, lockstep, and the ways it can end."""

import queue
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from live import LiveServer
from statuses import Failure, failure
from test_bad_input import add
from test_generation_service import STRONG, generate, request

from patchclamp.v1 import generation_pb2 as pb
from patchclamp.v1 import program_pb2 as program
from patchclamp.v1.generation_pb2_grpc import GenerationServiceStub
from patchclamp_server.engine.config import EngineConfig

PUSH = program.Program(edits=[add(name="push", add=STRONG, strength=0.0)])


class Client:
    """A session driven step by step. `close` ends the client's side of the stream."""

    def __init__(self, channel: grpc.Channel, *, lockstep: bool = True, **fields: Any) -> None:
        self._sent: queue.Queue[pb.SessionRequest | None] = queue.Queue()
        start = pb.SessionStart(request=request(**fields), lockstep=lockstep)
        self._sent.put(pb.SessionRequest(start=start))
        self.responses = GenerationServiceStub(channel).Session(iter(self._sent.get, None))
        self._finished: pb.Finished | None = None

    def send(self, **event: Any) -> None:
        self._sent.put(pb.SessionRequest(**event))

    def close(self) -> None:
        self._sent.put(None)

    def tokens(self, n: int) -> list[int]:
        """The next n tokens, of a lockstep session that was granted exactly these."""
        got: list[int] = []
        while len(got) < n:
            response = next(self.responses)
            got += [t.id for t in response.tokens]
            if response.HasField("finished"):
                self._finished = response.finished
        return got

    def finished(self) -> pb.Finished:
        """The rest of the stream has no tokens."""
        for response in self.responses:
            assert not response.tokens
            self._finished = response.finished
        assert self._finished is not None
        return self._finished

    def failure(self) -> Failure:
        with pytest.raises(grpc.RpcError) as caught:
            list(self.responses)
        self.close()
        return failure(caught.value)


@pytest.fixture
def unedited(channel: grpc.Channel) -> list[int]:
    return [t.id for t in generate(channel)[1]]


def test_without_lockstep_a_session_generates_like_generate(channel: grpc.Channel, unedited: list[int]):
    session = Client(channel, lockstep=False)
    session.close()
    responses = list(session.responses)
    assert [t.id for r in responses for t in r.tokens] == unedited
    assert responses[-1].finished.reason == pb.FINISH_REASON_LENGTH


def test_lockstep_gives_as_many_tokens_as_were_granted(channel: grpc.Channel, unedited: list[int]):
    session = Client(channel)
    session.send(advance=pb.Advance(tokens=2))
    assert session.tokens(2) == unedited[:2]
    session.send(advance=pb.Advance(tokens=3))
    assert session.tokens(3) == unedited[2:5]
    session.send(stop=pb.Stop())
    assert session.finished().reason == pb.FINISH_REASON_CLIENT
    session.close()


def test_a_strength_acts_from_the_next_token_on(channel: grpc.Channel, unedited: list[int]):
    session = Client(channel, program=PUSH)
    session.send(advance=pb.Advance(tokens=3))
    assert session.tokens(3) == unedited[:3]
    session.send(set_strength=pb.SetStrength(edit="push", strength=5.0))
    session.send(advance=pb.Advance(tokens=5))
    steered = session.tokens(5)
    finished = session.finished()
    assert steered != unedited[3:]
    assert finished.receipt.touched
    session.close()


def test_a_lockstep_client_that_closes_its_side_gets_what_it_granted(channel: grpc.Channel, unedited: list[int]):
    session = Client(channel)
    session.send(advance=pb.Advance(tokens=4))
    session.close()
    assert session.tokens(4) == unedited[:4]
    assert session.finished().reason == pb.FINISH_REASON_CLIENT


def test_a_session_ends_by_itself_when_the_tokens_are_used_up(channel: grpc.Channel):
    session = Client(channel)
    session.send(advance=pb.Advance(tokens=100))
    assert len(session.tokens(8)) == 8
    assert session.finished().reason == pb.FINISH_REASON_LENGTH
    session.close()


def test_an_unknown_edit_is_not_found(channel: grpc.Channel):
    session = Client(channel, program=PUSH)
    session.send(set_strength=pb.SetStrength(edit="pull", strength=1.0))
    refused = session.failure()
    assert refused.code is grpc.StatusCode.NOT_FOUND
    assert refused.details["ErrorInfo"].metadata["field"] == "set_strength.edit"


@pytest.mark.parametrize(
    ("event", "field"),
    [
        ({"set_strength": pb.SetStrength(edit="push", strength=float("nan"))}, "set_strength.strength"),
        ({"set_strength": pb.SetStrength(strength=1.0)}, "set_strength.edit"),
        ({"advance": pb.Advance(tokens=0)}, "advance.tokens"),
        ({"start": pb.SessionStart()}, "start"),
        ({}, "event"),
    ],
)
def test_a_wrong_message_ends_the_session_with_its_field(channel: grpc.Channel, event: dict[str, Any], field: str):
    session = Client(channel, program=PUSH)
    session.send(**event)
    refused = session.failure()
    assert (refused.code, refused.fields) == (grpc.StatusCode.INVALID_ARGUMENT, [field])


def test_advance_is_for_lockstep_only(channel: grpc.Channel):
    session = Client(channel, lockstep=False, stop=pb.StopConditions(max_tokens=250, ignore_eos=True))
    session.send(advance=pb.Advance(tokens=1))
    assert session.failure().fields == ["advance"]


def test_a_session_begins_with_start(channel: grpc.Channel):
    messages: Iterator[pb.SessionRequest] = iter([pb.SessionRequest(stop=pb.Stop())])
    with pytest.raises(grpc.RpcError) as caught:
        list(GenerationServiceStub(channel).Session(messages))
    assert failure(caught.value).fields == ["start"]


def test_paths_inside_the_request_begin_with_start(channel: grpc.Channel):
    session = Client(channel, sampling=pb.Sampling(temperature=-1.0))
    assert session.failure().fields == ["start.request.sampling.temperature"]


def test_a_full_server_says_when_to_come_back(live_server: LiveServer, tmp_path: Path):
    engine = EngineConfig(max_sequences=1, max_waiting=1)
    with (
        LiveServer(live_server.model, tmp_path, engine=engine) as server,
        grpc.insecure_channel(server.address) as channel,
    ):
        running = Client(channel)
        running.send(advance=pb.Advance(tokens=1))
        running.tokens(1)
        waiting = Client(channel)
        refused = None
        # The waiting one is in the queue once its call has been handled; until then there is room.
        while refused is None:
            third = Client(channel)
            third.close()
            try:
                list(third.responses)
            except grpc.RpcError as error:
                refused = failure(error)
        assert (refused.code, refused.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "SERVER_FULL")
        assert refused.details["RetryInfo"].retry_delay.ToMilliseconds() > 0
        for session in (running, waiting):
            session.close()
            assert session.finished().reason == pb.FINISH_REASON_CLIENT

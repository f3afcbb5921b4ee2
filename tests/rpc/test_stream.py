"""The bridge from the engine's thread to a client's stream, and the responses made of what it carries."""

import asyncio
import threading

import pytest

from patchclamp_server.engine.request import (
    Failed,
    Finished,
    FinishReason,
    Readouts,
    Text,
    Token,
    Usage,
)
from patchclamp_server.errors import Aborted
from patchclamp_server.interventions.program import ReadoutValue, Receipt
from patchclamp_server.rpc.call.response_builder import RESPONSE_BYTES, ResponseBuilder
from patchclamp_server.rpc.streams.stream import EVENT_VALUES, MAX_WAITING_VALUES, EventBridge, EventStream

FINISHED = Finished(
    FinishReason.LENGTH,
    Receipt("sha256:0", ()),
    Usage(1, 0, 1, 0.1, 0.2, 0),
    seed=7,
)


def in_thread(work) -> None:
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()


async def test_a_reader_that_was_away_gets_everything_in_one_batch_in_order():
    stream: EventStream[int] = EventStream(EventBridge(asyncio.get_running_loop()))
    in_thread(lambda: [stream.put(i) for i in range(1000)])
    assert await stream.batch() == list(range(1000))


async def test_a_reader_racing_the_engine_misses_nothing():
    stream: EventStream[int] = EventStream(EventBridge(asyncio.get_running_loop()))
    thread = threading.Thread(target=lambda: [stream.put(i) for i in range(20_000)])
    thread.start()
    seen: list[int] = []
    while len(seen) < 20_000:
        seen += await stream.batch()
    thread.join()
    assert seen == list(range(20_000))


async def test_one_wake_up_serves_every_stream_of_a_step(monkeypatch: pytest.MonkeyPatch):
    loop = asyncio.get_running_loop()
    wake_ups = []
    original = loop.call_soon_threadsafe
    monkeypatch.setattr(loop, "call_soon_threadsafe", lambda f, *a: (wake_ups.append(f), original(f, *a))[1])
    bridge = EventBridge(loop)
    streams: list[EventStream[int]] = [EventStream(bridge) for _ in range(256)]
    in_thread(lambda: [stream.put(i) for i, stream in enumerate(streams)])
    assert [await stream.batch() for stream in streams] == [[i] for i in range(256)]
    assert len(wake_ups) == 1


def large(values: int) -> Readouts:
    """An event that counts this much."""
    return Readouts(0, (ReadoutValue("r", 0, 0, (0.0,) * (values - 2 * EVENT_VALUES)),))


async def test_whoever_is_told_of_a_read_finds_the_stream_no_longer_full():
    told: list[bool] = []
    bridge = EventBridge(asyncio.get_running_loop())
    stream: EventStream[Readouts] = EventStream(bridge, on_read=lambda: told.append(stream.is_full()))
    stream.put(large(MAX_WAITING_VALUES - 1))
    assert not stream.is_full()
    stream.put(large(2 * EVENT_VALUES))
    assert stream.is_full()
    await stream.batch()
    assert told == [False]


@pytest.mark.parametrize(("values", "times"), [(MAX_WAITING_VALUES // 2, 1), (MAX_WAITING_VALUES // 2 - 1, 0)])
async def test_a_batch_that_may_have_been_half_of_a_full_stream_is_told_of(values: int, times: int):
    """What was put between the reading of a batch and its count held the sequence back: nothing else would wake it."""
    told: list[None] = []
    stream: EventStream[Readouts] = EventStream(EventBridge(asyncio.get_running_loop()), lambda: told.append(None))
    stream.put(large(values))
    await stream.batch()
    assert len(told) == times


def test_tokens_and_text_of_a_batch_share_a_response():
    builder = ResponseBuilder(3, wait_for_readouts=False, piece=str)
    events = [Token(5, 3), Text("a"), Token(6, 4), Text("b"), FINISHED]
    [response] = builder.responses(events)
    assert response.text == "ab"
    assert [t.id for t in response.tokens] == [5, 6]
    assert response.finished.seed == 7


def test_a_backlog_is_cut_into_responses_a_client_accepts_and_nothing_is_lost():
    builder = ResponseBuilder(0, wait_for_readouts=True, piece=str)
    wide = tuple(float(i) for i in range(50_000))
    events = [
        event for p in range(40) for event in (Token(p, p), Text("x"), Readouts(p, (ReadoutValue("r", 0, p, wide),)))
    ]
    responses = list(builder.responses([*events, FINISHED]))
    assert len(responses) > 1
    assert max(r.ByteSize() for r in responses) < 2 * RESPONSE_BYTES
    assert [t.id for r in responses for t in r.tokens] == list(range(40))
    assert [t.readouts[0].position for r in responses for t in r.tokens] == list(range(40))


def test_a_token_waits_for_its_readouts_while_its_text_does_not():
    builder = ResponseBuilder(3, wait_for_readouts=True, piece=str)
    [first] = builder.responses([Token(5, 3), Text("a")])
    assert (first.text, len(first.tokens)) == ("a", 0)
    value = ReadoutValue("r", 0, 3, (1.0,))
    [second] = builder.responses([Readouts(3, (value,)), Token(6, 4)])
    assert [(t.id, t.readouts[0].position) for t in second.tokens] == [(5, 3)]


def test_in_lockstep_a_token_goes_at_once_and_its_readouts_ride_on_the_next():
    builder = ResponseBuilder(3, wait_for_readouts=False, piece=str)
    [first] = builder.responses([Token(5, 3)])
    assert [t.id for t in first.tokens] == [5]
    [second] = builder.responses([Readouts(3, (ReadoutValue("r", 0, 3, (1.0,)),)), Token(6, 4)])
    assert [(t.id, t.readouts[0].position) for t in second.tokens] == [(6, 3)]


def test_a_late_readout_rides_on_one_token_alone():
    builder = ResponseBuilder(3, wait_for_readouts=False, piece=str)
    list(builder.responses([Token(5, 3)]))
    [response] = builder.responses([Readouts(3, (ReadoutValue("r", 0, 3, (1.0,)),)), Token(6, 4), Token(7, 5)])
    assert [[v.position for v in t.readouts] for t in response.tokens] == [[3], []]


def test_readouts_of_the_prompt_are_kept_apart():
    builder = ResponseBuilder(3, wait_for_readouts=True, piece=str)
    [response] = builder.responses([Readouts(2, (ReadoutValue("r", 0, 2, (1.0,)),))])
    assert [v.position for v in response.prompt_readouts] == [2]


def test_a_failure_is_raised_after_the_tokens_before_it():
    builder = ResponseBuilder(3, wait_for_readouts=True, piece=str)
    responses = builder.responses([Token(5, 3), Text("a"), Failed(Aborted("program.abort_when[0]", "fired"))])
    assert [t.id for t in next(responses).tokens] == [5]
    with pytest.raises(Aborted):
        next(responses)

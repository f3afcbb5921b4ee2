"""What waits between the engine and a call that follows a watch: bounded, in order, and nothing is lost unsaid."""

import asyncio
from collections.abc import AsyncIterator

import numpy as np
import pytest
import torch

from patchclamp_server.errors import Unavailable
from patchclamp_server.monitoring.activations import Activations
from patchclamp_server.monitoring.reference import Reference
from patchclamp_server.rpc.streams.stream import EventBridge
from patchclamp_server.rpc.streams.watch import MAX_WAITING, ActivationStream, RecordingStream, first


def batch(n: int, value: float = 0.0, dropped: int = 0) -> Activations:
    ints = np.arange(n)
    generated, numbers = np.ones(n, dtype=bool), np.full(n, value)
    return Activations(ints, numbers, ints, ints, ints, generated, numbers, dropped)


async def all_of(stream: ActivationStream) -> list[tuple[int, int]]:
    """(events, dropped) of what waits."""
    stream.put(None)
    return [(len(events.items), dropped) async for events, dropped in stream.batches()]


def activation_stream(counted: list[int]) -> ActivationStream:
    return ActivationStream(EventBridge(asyncio.get_running_loop()), counted.append)


async def test_batches_come_in_order_and_end() -> None:
    counted: list[int] = []
    stream = activation_stream(counted)
    for n in (1, 3, 2):
        stream.put(batch(n))
    assert await all_of(stream) == [(1, 0), (3, 0), (2, 0)]
    assert counted == []


async def test_what_finds_no_room_is_dropped_and_told_with_what_comes_next() -> None:
    counted: list[int] = []
    stream = activation_stream(counted)
    stream.put(batch(MAX_WAITING))
    stream.put(batch(5))
    stream.put(batch(7))
    assert await all_of(stream) == [(MAX_WAITING, 12)]
    assert counted == [5, 7]


async def test_there_is_room_again_for_what_comes_after_a_batch_was_read() -> None:
    stream = activation_stream([])
    stream.put(batch(MAX_WAITING))
    stream.put(batch(1))
    batches = stream.batches()
    assert (await anext(batches))[1] == 1
    stream.put(batch(2))
    events, dropped = await anext(batches)
    assert (len(events.items), dropped) == (2, 0)


async def test_what_the_engine_has_cut_counts_too() -> None:
    counted: list[int] = []
    stream = activation_stream(counted)
    stream.put(batch(4, dropped=9))
    assert await all_of(stream) == [(4, 9)]
    assert counted == [9]


async def test_an_error_ends_the_stream_after_what_came_before() -> None:
    stream = activation_stream([])
    stream.put(batch(1))
    stream.end(Unavailable("", "going down"))
    batches: AsyncIterator[object] = stream.batches()
    await anext(batches)
    with pytest.raises(Unavailable):
        await anext(batches)


def test_the_first_of_a_batch_are_the_oldest() -> None:
    cut = first(batch(5, value=2.0, dropped=3), 2)
    assert cut.items.tolist() == [0, 1]
    assert cut.values.tolist() == [2.0, 2.0]
    assert (len(cut.times), cut.dropped) == (2, 3)


async def test_of_progress_that_was_not_read_only_the_latest_is_kept() -> None:
    stream = RecordingStream(EventBridge(asyncio.get_running_loop()))
    for tokens in (1, 2, 3):
        stream.on_progress(tokens, 9)
    edges, figures = torch.zeros(1, 1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    reference = Reference(edges, torch.zeros(1, 2, dtype=torch.int64), figures, figures)
    stream.on_done(reference)
    assert [event async for event in stream.events()] == [(3, 9), reference]

"""Work at the engine's exclusive door: slices between steps, bounded beside requests, ended with who asked for it."""

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import aclosing

import pytest
import torch
from engine_runs import Outcome, loaded, started
from kept_sites import KeepSite
from tiny_models import FAMILIES

from patchclamp_server.analysis.documents import forward, inputs_of, pool_for, pools_for
from patchclamp_server.analysis.heads.circuits.runs import run
from patchclamp_server.analysis.requests import MAX_UNTAKEN, exclusively, result_of
from patchclamp_server.callers import CALLER, Caller
from patchclamp_server.engine.config import EngineConfig
from patchclamp_server.engine.engine import Engine
from patchclamp_server.engine.exclusive import (
    FIRST_ROWS,
    Entry,
    ExclusiveDoor,
    Slice,
    Sliced,
    Work,
    at_once,
)
from patchclamp_server.engine.pace import ALONE_SECONDS, StepRows
from patchclamp_server.engine.request import Priority, Request, StopParams
from patchclamp_server.errors import QuotaExceeded, ResourceExhausted, Unavailable
from patchclamp_server.model.sites import Site

DECODE_SECONDS = 0.01


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with started(loaded("llama")) as engine:
        yield engine


def slices(n: int, log: list[int] | None = None, rows: int = 10**6) -> Work[int]:
    """Tells each slice by its number, and logs what it was sent."""
    for i in range(n):
        granted = yield Slice(rows)
        if log is not None:
            log.append(granted)
        yield i


class Door:
    """One without an engine: works enter and are run by hand."""

    def __init__(self, charge: Callable[[int], None] = lambda tokens: None) -> None:
        self.door = ExclusiveDoor(torch.device("cpu"), charge)
        self.told: list[int] = []
        self.ends: list[BaseException | None] = []

    def enter(self, work: Work[int]) -> Entry:
        return self.door.enter(work, self.told.append, self.ends.append)

    def run(self, seconds: float = ALONE_SECONDS) -> None:
        self.door.run(seconds)


async def test_what_a_work_tells_comes_in_order_and_its_end_ends_the_iteration(engine: Engine) -> None:
    assert [event async for event in exclusively(engine, slices(100))] == list(range(100))


async def test_work_runs_on_the_thread_of_the_engine_in_the_context_of_its_caller(engine: Engine) -> None:
    seen: list[tuple[str, str]] = []

    def work() -> Work[int]:
        for _ in range(2):
            yield Slice(1)
            seen.append((threading.current_thread().name, CALLER.get().tenant))
        yield 0

    CALLER.set(Caller("reader"))
    assert [event async for event in exclusively(engine, work())] == [0]
    assert seen == [("patchclamp-engine", "reader")] * 2


async def test_what_a_work_raises_is_raised_after_what_it_told(engine: Engine) -> None:
    def fails() -> Work[int]:
        yield Slice(1)
        yield 1
        raise ValueError("broken")

    seen: list[int] = []

    async def follow() -> None:
        async for event in exclusively(engine, fails()):
            seen.append(event)

    with pytest.raises(ValueError, match="broken"):
        await follow()
    assert seen == [1]
    assert [event async for event in exclusively(engine, slices(1))] == [0]


async def test_a_work_whose_events_nobody_takes_waits_until_somebody_does(engine: Engine) -> None:
    log: list[int] = []
    async with aclosing(exclusively(engine, slices(3 * MAX_UNTAKEN, log))) as events:
        assert await anext(events) == 0
        # Another work has its turn meanwhile, which shows that the engine goes on.
        assert [event async for event in exclusively(engine, slices(3 * MAX_UNTAKEN))] == [*range(3 * MAX_UNTAKEN)]
        assert len(log) == MAX_UNTAKEN
        assert [event async for event in events] == [*range(1, 3 * MAX_UNTAKEN)]
    assert len(log) == 3 * MAX_UNTAKEN


async def test_leaving_a_work_ends_it_before_the_iteration_is_over(engine: Engine) -> None:
    closed: list[bool] = []

    def endless() -> Work[int]:
        try:
            while True:
                yield Slice(1)
                yield 0
        finally:
            closed.append(True)

    async with aclosing(exclusively(engine, endless())) as events:
        assert await anext(events) == 0
    assert closed == [True]
    assert not engine.exclusive.busy


async def test_a_task_that_is_cancelled_waits_for_the_slice_that_runs(engine: Engine) -> None:
    running, release, log = asyncio.Event(), threading.Event(), []
    loop = asyncio.get_running_loop()

    def work() -> Work[int]:
        try:
            yield Slice(1)
            loop.call_soon_threadsafe(running.set)
            release.wait(30)
            log.append("slice")
            yield Slice(1)
            log.append("never")
        finally:
            log.append("closed")

    task = asyncio.create_task(result_of(engine, work()))  # type: ignore[arg-type]
    await running.wait()
    task.cancel()
    await asyncio.sleep(0)
    assert not task.done()
    release.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert log == ["slice", "closed"]


def test_work_gets_on_beside_a_stream_and_the_stream_beside_it() -> None:
    """Both end, however long the other would go on."""
    engine, outcome, log = Engine(loaded("llama")), Outcome(), list[int]()
    ended: list[BaseException | None] = []
    engine.submit(Request((5, 6, 7), outcome.on_event, stop=StopParams(max_tokens=40, ignore_eos=True)))
    engine.enter(slices(20, log), lambda event: None, ended.append)
    while engine.step():
        pass
    assert len(outcome.tokens) == 40
    assert (len(log), ended) == (20, [None])


def test_a_slice_has_as_many_rows_as_take_the_seconds_that_it_may_take() -> None:
    door, log = Door(), list[int]()
    entry = door.enter(slices(9, log))
    door.run()
    for _ in range(2):
        door.run(DECODE_SECONDS)
        entry.row_seconds = DECODE_SECONDS / 24
    door.run(0.0)
    assert log == [FIRST_ROWS, 24, 1]


class Turns:
    """An engine with a work at its door whose steps and slices take what a simulated server's would."""

    def __init__(self) -> None:
        self.engine, self.log = Engine(loaded("llama"), EngineConfig(enable_prefix_cache=False)), list[int]()
        self.engine.enter(slices(10**6, self.log), lambda event: None, lambda error: None)
        # What ran, in order: "door", or the rows of a step.
        self.ran: list[str | StepRows] = []
        # Of each slice that had some: the seconds that it was to take.
        self.asked: list[float] = []
        took, run = self.engine.scheduler.took, self.engine.exclusive.run

        def clocked_step(rows: StepRows, seconds: float) -> None:
            self.ran.append(rows)
            took(rows, DECODE_SECONDS * (rows.decode > 0) + DECODE_SECONDS / 8 * (rows.prompt + rows.analysis))

        def clocked_slice(seconds: float) -> float:
            run(seconds)
            self.ran.append("door")
            self.asked.append(seconds)
            return seconds

        self.engine.scheduler.took, self.engine.exclusive.run = clocked_step, clocked_slice  # type: ignore[method-assign]

    def submit(self, priority: Priority, length: int, max_tokens: int) -> None:
        stop = StopParams(max_tokens=max_tokens, ignore_eos=True)
        tokens = tuple(5 + i % 50 for i in range(length))
        self.engine.submit(Request(tokens, lambda event: None, stop=stop, priority=priority))

    def steps(self, n: int) -> None:
        for _ in range(n):
            assert self.engine.step()


def test_requests_of_analysis_and_the_door_take_turns_so_that_who_comes_waits_for_one_of_them() -> None:
    turns = Turns()
    for _ in range(8):
        turns.submit(Priority.ANALYSIS, 100, 0)
    turns.steps(8)
    assert [ran == "door" for ran in turns.ran] == [False, True] * 4
    assert turns.asked == [ALONE_SECONDS] * 4


def test_beside_a_stream_requests_of_analysis_and_the_door_have_one_share_together() -> None:
    turns = Turns()
    for _ in range(8):
        turns.submit(Priority.ANALYSIS, 100, 0)
    turns.submit(Priority.INTERACTIVE, 3, 100)
    turns.steps(90)
    share = turns.engine.config.analysis_slowdown - 1
    rows = [ran for ran in turns.ran if isinstance(ran, StepRows)]
    analysis = sum(turns.asked) + sum(ran.analysis for ran in rows) * DECODE_SECONDS / 8
    assert sum(turns.asked) > 0.3 * analysis
    assert 0.8 * share * 90 * DECODE_SECONDS < analysis < share * 90 * DECODE_SECONDS + 3 * DECODE_SECONDS


def test_the_door_alone_has_the_whole_share_beside_a_stream() -> None:
    turns = Turns()
    turns.submit(Priority.INTERACTIVE, 3, 100)
    turns.steps(60)
    share = turns.engine.config.analysis_slowdown - 1
    assert sum(turns.asked) == pytest.approx(share * 60 * DECODE_SECONDS, rel=0.1)


def test_of_two_works_that_which_had_less_time_for_its_weight_is_next() -> None:
    door = Door()
    first = door.enter(slices(9))
    heavy = CALLER.set(Caller("heavy", weight=4.0))
    second = door.enter(slices(9))
    CALLER.reset(heavy)
    first.service, second.service = 1.0, 0.5
    door.run()
    assert (first.wanted, second.wanted) == (None, Slice(10**6))
    second.service = 1.5
    door.run()
    assert first.wanted == Slice(10**6)
    before = second.service
    first.service = 9.0
    door.run()
    assert second.weight * (second.service - before) > second.service - before


def test_tokens_are_paid_for_before_they_are_computed() -> None:
    def charge(tokens: int) -> None:
        if sum(paid) + tokens > 5:
            raise QuotaExceeded("", "no tokens are left")
        paid.append(tokens)

    def work() -> Work[int]:
        yield Slice(1, tokens=5)
        yield Slice(1)
        yield Slice(1, tokens=1)
        yield 1

    paid: list[int] = []
    door = Door(charge)
    door.enter(work())
    for _ in range(4):
        door.run()
    assert paid == [5]
    assert door.told == []
    assert [type(end) for end in door.ends] == [QuotaExceeded]


async def test_work_is_refused_where_an_analysis_request_would_be() -> None:
    engine = Engine(loaded("llama"), EngineConfig(max_sequences=1, max_waiting=2))
    for _ in range(2):
        engine.submit(Request((5, 6), lambda event: None, priority=Priority.INTERACTIVE))
    with pytest.raises(ResourceExhausted):
        await anext(exclusively(engine, slices(1)))
    engine.drain(0)
    with pytest.raises(Unavailable):
        engine.exclusive.enter(slices(1), lambda event: None, lambda error: None)


async def test_work_that_fails_while_it_is_ended_ends_nothing_else(engine: Engine) -> None:
    def clings() -> Work[int]:
        try:
            yield Slice(1)
            yield 0
            yield Slice(1)
        finally:
            raise ValueError("not now")

    async with aclosing(exclusively(engine, clings())) as events:
        assert await anext(events) == 0
    assert [event async for event in exclusively(engine, slices(2))] == [0, 1]


async def test_work_that_an_engine_leaves_behind_ends_as_unavailable() -> None:
    with started(loaded("llama")) as engine:
        events = exclusively(engine, slices(10**9))
        await anext(events)
    with pytest.raises(Unavailable):
        async for _ in events:
            pass


def test_draining_waits_for_work_that_runs() -> None:
    with started(loaded("llama")) as engine:
        engine.enter(slices(50), lambda event: None, lambda error: None)
        assert engine.drain(30)
        assert not engine.exclusive.busy


def test_a_lost_device_ends_the_engine() -> None:
    def lost() -> Work[int]:
        yield Slice(1)
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with started(loaded("llama")) as engine:
        ended = threading.Event()
        errors: list[BaseException | None] = []
        engine.enter(lost(), lambda event: None, lambda error: (errors.append(error), ended.set()))
        assert ended.wait(30)
    assert isinstance(errors[0], Unavailable)
    assert isinstance(engine.failure, RuntimeError)


@pytest.mark.parametrize("rows", [1, 7, 10])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_pass_in_slices_is_bit_for_bit_the_whole_pass(family: str, rows: int) -> None:
    decoder = loaded(family).decoder
    documents = torch.randint(3, 90, (2, 5), generator=torch.Generator().manual_seed(1))
    inputs = inputs_of(documents, 0, 5, decoder)
    whole, cut = KeepSite(Site.MLP_POST), KeepSite(Site.MLP_POST)
    expected = decoder.forward(inputs, pools_for(decoder, documents), whole)
    asked: list[Slice] = []

    def granted() -> Sliced[torch.Tensor]:
        """The pass, sent no more than `rows` each time."""
        part = forward(decoder, inputs, pool_for(decoder, documents), cut)
        asked.append(next(part))
        while True:
            try:
                asked.append(part.send(min(rows, asked[-1].rows)))
            except StopIteration as end:
                return end.value
        yield

    assert torch.equal(at_once(granted()), expected)
    assert all(torch.equal(cut.kept[layer], kept) for layer, kept in whole.kept.items())
    assert len(asked) == {1: decoder.spec.n_layers, 7: 2, 10: 1}[rows]
    assert [slice_.tokens for slice_ in asked] == [10] + [0] * (len(asked) - 1)


def test_a_run_of_a_prompt_keeps_the_states_of_all_layers() -> None:
    decoder = loaded("qwen3").decoder
    found = at_once(run(decoder, (5, 6, 7)))
    assert found.resid_pre.shape == (decoder.spec.n_layers, 3, decoder.spec.d_model)

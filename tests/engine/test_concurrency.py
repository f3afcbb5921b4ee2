"""Many streams at once, and what is given back when they go away."""

import threading
import time
from collections.abc import Callable

import torch
from engine_runs import Outcome, loaded
from patience import PATIENCE_SECONDS

from patchclamp_server.engine.config import EngineConfig, Unobserved
from patchclamp_server.engine.engine import Engine
from patchclamp_server.engine.request import Event, Failed, FinishReason, Priority, Request, StopParams, Token
from patchclamp_server.errors import Cancelled, DeadlineExceeded, InvalidArgument
from patchclamp_server.interventions.bind import bind
from patchclamp_server.interventions.bound import BoundProgram
from patchclamp_server.interventions.program import AddVector, Edit, Program, Vector
from patchclamp_server.model.sites import Site

FAMILY = "llama"
STREAMS = 64


class PreemptionCounter(Unobserved):
    def __init__(self) -> None:
        self.seen = 0

    def on_preemption(self) -> None:
        self.seen += 1


def program(seed: int) -> BoundProgram:
    values = torch.randn(loaded(FAMILY).info.d_model, generator=torch.Generator().manual_seed(seed))
    edit = Edit(AddVector(Vector(values=values)), Site.RESID_POST, layers=(1, 2), strength=0.05 * seed)
    return bind(Program(edits=(edit,)), loaded(FAMILY).info)


def prompt(seed: int) -> tuple[int, ...]:
    return tuple(2 + (13 * seed + i) % 190 for i in range(20))


def request(seed: int, on_event: object, max_tokens: int, **others: object) -> Request:
    stop = StopParams(max_tokens=max_tokens, ignore_eos=True)
    return Request(prompt(seed), on_event, program=program(seed), stop=stop, **others)  # type: ignore[arg-type]


def test_64_streams_with_64_programs_all_complete() -> None:
    engine = Engine(loaded(FAMILY), EngineConfig(max_sequences=STREAMS))
    outcomes = [Outcome() for _ in range(STREAMS)]
    for seed, outcome in enumerate(outcomes):
        engine.submit(request(seed, outcome.on_event, max_tokens=12))
    engine.start()
    for outcome in outcomes:
        assert outcome.done.wait(PATIENCE_SECONDS)
        assert outcome.end().reason is FinishReason.LENGTH
        assert len(outcome.tokens) == 12
        assert outcome.end().receipt.edits[0].rows == 2 * (20 + 11)
    engine.shutdown()
    assert len({outcome.end().receipt.program_fingerprint for outcome in outcomes}) == STREAMS
    assert engine.stats().kv_blocks_free == engine.stats().kv_blocks_total


def test_cancelling_half_of_64_streams_returns_all_their_blocks() -> None:
    engine = Engine(loaded(FAMILY), EngineConfig(max_sequences=STREAMS))
    outcomes = [Outcome() for _ in range(STREAMS)]
    ids = [engine.submit(request(seed, o.on_event, max_tokens=40)) for seed, o in enumerate(outcomes)]
    while not all(outcome.tokens for outcome in outcomes):
        assert engine.step()
    total = engine.stats().kv_blocks_total
    held = total - engine.stats().kv_blocks_free
    held_by = [len(s.blocks) for s in engine.scheduler.running]
    assert held == sum(held_by)
    assert len(held_by) == STREAMS
    for request_id in ids[::2]:
        engine.cancel(request_id)
    engine.step()
    assert all(isinstance(outcome.error, Cancelled) for outcome in outcomes[::2])
    remaining = sum(len(s.blocks) for s in engine.scheduler.running)
    assert len(engine.scheduler.running) == STREAMS // 2
    assert total - engine.stats().kv_blocks_free == remaining
    while engine.step():
        pass
    assert all(len(outcome.tokens) == 40 for outcome in outcomes[1::2])
    assert engine.stats().kv_blocks_free == total


def test_cancellation_takes_effect_before_the_next_step() -> None:
    engine = Engine(loaded(FAMILY))
    outcome = Outcome()
    request_id = engine.submit(request(1, outcome.on_event, max_tokens=40))
    engine.step()
    seen = len(outcome.tokens)
    engine.cancel(request_id)
    assert not engine.step()
    assert len(outcome.tokens) == seen
    assert isinstance(outcome.error, Cancelled)


def test_a_deadline_ends_a_running_request_and_frees_its_blocks() -> None:
    engine = Engine(loaded(FAMILY))
    outcome = Outcome()
    engine.start()
    engine.submit(request(1, outcome.on_event, max_tokens=100, deadline=0.0))
    assert outcome.done.wait(PATIENCE_SECONDS)
    engine.shutdown()
    assert isinstance(outcome.error, DeadlineExceeded)
    assert engine.stats().kv_blocks_free == engine.stats().kv_blocks_total


def test_shutdown_ends_what_still_runs() -> None:
    engine = Engine(loaded(FAMILY))
    outcome = Outcome()
    started = threading.Event()

    def on_event(event: Event) -> None:
        outcome.on_event(event)
        if isinstance(event, Token):
            started.set()

    engine.start()
    engine.submit(request(1, on_event, max_tokens=200))
    assert started.wait(PATIENCE_SECONDS)
    engine.shutdown()
    assert outcome.done.is_set()
    assert engine.drain(0.0)


def test_interactive_requests_displace_analysis_when_every_place_is_taken() -> None:
    engine = Engine(loaded(FAMILY), EngineConfig(max_sequences=2))
    engine.observer = counter = PreemptionCounter()
    low = [Outcome(), Outcome()]
    for seed, outcome in enumerate(low):
        engine.submit(request(seed, outcome.on_event, max_tokens=30, priority=Priority.ANALYSIS))
    while not all(outcome.tokens for outcome in low):
        assert engine.step()
    high = Outcome()
    engine.submit(request(7, high.on_event, max_tokens=3))
    while not high.done.is_set():
        assert engine.step()
    assert not any(outcome.done.is_set() for outcome in low)
    while engine.step():
        pass
    assert [len(outcome.tokens) for outcome in low] == [30, 30]
    assert sorted(outcome.end().usage.preemptions for outcome in low) == [0, 1]
    assert counter.seen == engine.stats().preemptions == 1
    assert engine.stats().kv_blocks_free == engine.stats().kv_blocks_total


def test_an_edit_that_overflows_fails_its_own_request_and_leaves_no_trace() -> None:
    """NaN in a freed block would reach the next holder through masked positions, where 0 * NaN is NaN."""
    # Two requests of these lengths fill the cache, so that every block is handed on.
    config = EngineConfig(kv_block_size=4, kv_cache_tokens=64)
    engine = Engine(loaded(FAMILY), config)
    values = torch.full((loaded(FAMILY).info.d_model,), 3e38)
    edit = Edit(AddVector(Vector(values=values)), Site.RESID_POST, layers=(0,), strength=2.0)
    overflowing = bind(Program(edits=(edit,)), loaded(FAMILY).info)
    stop = StopParams(max_tokens=8, ignore_eos=True)
    expected, beside, broken, after = Outcome(), Outcome(), Outcome(), Outcome()

    def run(*requests: Request) -> None:
        for each in requests:
            engine.submit(each)
        while engine.step():
            pass

    plain = [Request(prompt(3), outcome.on_event, stop=stop) for outcome in (expected, beside, after)]
    run(plain[0])
    run(Request(prompt(4), broken.on_event, program=overflowing, stop=stop), plain[1])
    run(plain[2], Request(prompt(5), Outcome().on_event, stop=stop))
    assert isinstance(broken.error, InvalidArgument)
    assert broken.error.field == "program.edits"
    assert expected.tokens == beside.tokens == after.tokens
    assert len(expected.tokens) == 8
    assert all(bool(torch.isfinite(rows).all()) for pool in engine.cache.pools for rows in pool.rows())


def test_a_shutdown_between_two_steps_is_not_missed() -> None:
    """The wake of a shutdown that comes just before the loop clears its wakes must not be the only sign of it."""
    engine = Engine(loaded(FAMILY))

    class Wake(threading.Event):
        def clear(self) -> None:
            if not engine._stopping:
                engine._stopping = True
                self.set()
            super().clear()

    engine._wake = Wake()
    engine.start()
    engine._thread.join(PATIENCE_SECONDS)
    assert not engine._thread.is_alive()


def test_of_two_that_no_longer_fit_the_less_urgent_one_is_preempted() -> None:
    config = EngineConfig(kv_block_size=4, kv_cache_tokens=13 * 4, enable_prefix_cache=False)
    engine = Engine(loaded(FAMILY), config)
    engine.scheduler.expected_length = lambda sequence: len(sequence.tokens)
    urgent, patient = Outcome(), Outcome()
    engine.submit(request(1, patient.on_event, max_tokens=16, priority=Priority.BATCH))
    engine.submit(request(2, urgent.on_event, max_tokens=16))
    while engine.step():
        pass
    assert urgent.end().usage.preemptions == 0
    assert patient.end().usage.preemptions > 0
    assert len(urgent.tokens) == len(patient.tokens) == 16


def test_of_two_deadlines_the_nearer_one_ends_its_request_first() -> None:
    """Both wait for their clients, so that nothing but a deadline wakes the engine."""
    engine = Engine(loaded(FAMILY))
    ended: list[str] = []
    done = {name: threading.Event() for name in ("far", "near")}

    def ending(name: str) -> Callable[[Event], None]:
        def on_event(event: Event) -> None:
            if isinstance(event, Failed):
                ended.append(name)
                done[name].set()

        return on_event

    now = time.monotonic()
    engine.submit(request(1, ending("far"), max_tokens=4, credits=0, deadline=now + 1.0))
    engine.submit(request(2, ending("near"), max_tokens=4, credits=0, deadline=now + 0.1))
    engine.start()
    for event in done.values():
        assert event.wait(PATIENCE_SECONDS)
    engine.shutdown()
    assert ended == ["near", "far"]


def test_a_request_that_was_held_back_goes_on_when_the_engine_is_woken() -> None:
    engine = Engine(loaded(FAMILY))
    outcome, held = Outcome(), threading.Event()
    behind = [True]

    def is_held() -> bool:
        held.set()
        return behind[0]

    engine.submit(request(1, outcome.on_event, max_tokens=4, held=is_held))
    engine.step()
    assert held.is_set()
    engine.start()
    behind[0] = False
    engine.wake()
    assert outcome.done.wait(PATIENCE_SECONDS)
    engine.shutdown()
    assert len(outcome.tokens) == 4

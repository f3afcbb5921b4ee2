"""What fails in the engine: who is told, what is given back, and when the engine itself has to end."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from engine_runs import Outcome, loaded
from faulty_executor import FaultyExecutor, allocate_too_much
from patience import PATIENCE_SECONDS

from patchclamp_server.engine.config import EngineConfig
from patchclamp_server.engine.engine import Engine
from patchclamp_server.engine.faults import fault_of, is_device_lost
from patchclamp_server.engine.request import Event, Finished, Request, StopParams, Text, Token
from patchclamp_server.errors import EngineFailure, ResourceExhausted, Unavailable
from patchclamp_server.interventions.bind import bind
from patchclamp_server.interventions.bound import BoundProgram
from patchclamp_server.interventions.program import AddVector, Edit, Program, ProjectionReadout, Readout, Vector
from patchclamp_server.model.attention.pools import TiledPool
from patchclamp_server.model.sites import Site

FAMILY = "llama"
WIDTH = 48


def program() -> BoundProgram:
    vector = Vector(values=torch.ones(WIDTH))
    edit = Edit(AddVector(vector), Site.RESID_POST, layers=(1,), strength=0.1)
    readout = Readout(ProjectionReadout((vector,)), Site.RESID_POST, layers=(1,))
    return bind(Program(edits=(edit,), readouts=(readout,)), loaded(FAMILY).info)


def request(on_event: Callable[[Event], None], max_tokens: int = 6, first: int = 2, **others: Any) -> Request:
    tokens = tuple(first + i for i in range(20))
    stop = StopParams(max_tokens=max_tokens, ignore_eos=True)
    return Request(tokens, on_event, **{"program": program(), "stop": stop, **others})


def engine_with(fault: Callable[[int], None], **config: Any) -> Engine:
    engine = Engine(loaded(FAMILY), EngineConfig(**config))
    engine.runner.executor = FaultyExecutor(engine.executor, fault)
    return engine


def run(engine: Engine) -> None:
    while engine.step():
        pass


def at(step: int, error: Exception) -> Callable[[int], None]:
    def fault(number: int) -> None:
        if number == step:
            raise error

    return fault


def never(_: int) -> None: ...


def assert_nothing_is_held(engine: Engine) -> None:
    stats = engine.stats()
    assert stats.kv_blocks_free == stats.kv_blocks_total
    assert (stats.running, stats.waiting, stats.program_rows) == (0, 0, 0)
    assert not engine.live.requests


@pytest.fixture(scope="module")
def expected() -> list[int]:
    """Tokens of `request` where nothing fails."""
    engine, outcome = Engine(loaded(FAMILY)), Outcome()
    engine.submit(request(outcome.on_event))
    run(engine)
    return outcome.tokens


@pytest.mark.parametrize("step", [0, 3], ids=["prefill", "decode"])
def test_a_step_that_fails_ends_its_requests_and_the_next_ones_run(step: int, expected: list[int]) -> None:
    engine = engine_with(at(step, ValueError("a defect")))
    outcomes = [Outcome(), Outcome()]
    for outcome in outcomes:
        engine.submit(request(outcome.on_event))
    run(engine)
    assert [type(o.error) for o in outcomes] == [EngineFailure, EngineFailure]
    assert engine.stats().failed_steps == 1
    assert_nothing_is_held(engine)
    after = Outcome()
    engine.submit(request(after.on_event))
    run(engine)
    assert after.tokens == expected
    assert_nothing_is_held(engine)


def test_requests_that_were_not_in_the_failed_step_go_on(expected: list[int]) -> None:
    engine = engine_with(at(0, ValueError("a defect")), max_sequences=1)
    outcomes = [Outcome(), Outcome()]
    for first, outcome in zip((60, 2), outcomes, strict=True):
        engine.submit(request(outcome.on_event, first=first))
    run(engine)
    assert isinstance(outcomes[0].error, EngineFailure)
    assert outcomes[1].tokens == expected
    assert_nothing_is_held(engine)


def test_the_allocators_own_error_is_out_of_memory() -> None:
    def fault(step: int) -> None:
        if step == 1:
            allocate_too_much()

    engine, outcome = engine_with(fault), Outcome()
    engine.submit(request(outcome.on_event))
    run(engine)
    assert isinstance(outcome.error, ResourceExhausted)
    assert outcome.error.retry_after_seconds > 0
    assert_nothing_is_held(engine)


@pytest.mark.parametrize(
    ("error", "told", "lost"),
    [
        (MemoryError(), ResourceExhausted, False),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), ResourceExhausted, False),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"), ResourceExhausted, False),
        (RuntimeError("shapes do not match"), EngineFailure, False),
        (ValueError("CUDA error"), EngineFailure, False),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), EngineFailure, True),
        (RuntimeError("Triton Error [CUDA]: unspecified launch failure"), EngineFailure, True),
        (torch.AcceleratorError("device-side assert triggered"), EngineFailure, True),
    ],
    ids=str,
)
def test_what_an_exception_means(error: Exception, told: type[Exception], lost: bool) -> None:
    assert type(fault_of(error)) is told
    assert is_device_lost(error) is lost


def test_blocks_that_a_failed_step_wrote_are_clean_when_others_get_them() -> None:
    """What is not finite would reach their next holder through masked positions."""
    engine, outcome = Engine(loaded(FAMILY)), Outcome()

    def spoil(_: int) -> None:
        for sequence in engine.scheduler.running:
            for pool in engine.cache.pools:
                assert isinstance(pool, TiledPool)
                pool.keys[sequence.blocks] = pool.values[sequence.blocks] = math.nan
        raise ValueError("a defect")

    engine.runner.executor = FaultyExecutor(engine.executor, spoil)
    engine.submit(request(outcome.on_event))
    run(engine)
    assert isinstance(outcome.error, EngineFailure)
    assert all(rows.isfinite().all() for pool in engine.cache.pools for rows in pool.rows())


@pytest.mark.parametrize("kind", [Token, Text, Finished])
def test_a_callback_that_fails_ends_its_own_request_alone(kind: type[Event], expected: list[int]) -> None:
    engine, good, bad = engine_with(never), Outcome(), Outcome()

    def on_event(event: Event) -> None:
        if isinstance(event, kind):
            raise ValueError("a defect of this request's consumer")
        bad.on_event(event)

    engine.submit(request(on_event))
    engine.submit(request(good.on_event))
    run(engine)
    assert isinstance(bad.error, EngineFailure)
    assert good.tokens == expected
    assert_nothing_is_held(engine)


def test_a_callback_that_always_fails_leaves_nothing_behind(expected: list[int]) -> None:
    def on_event(event: Event) -> None:
        raise ValueError("a defect of this request's consumer")

    engine, good = engine_with(never), Outcome()
    engine.submit(request(on_event))
    engine.cancel(engine.submit(request(on_event)))
    engine.submit(request(on_event, compare_baseline=True))
    engine.submit(request(on_event, score_from=15))
    engine.submit(request(good.on_event))
    run(engine)
    assert good.tokens == expected
    assert_nothing_is_held(engine)


def test_a_detokenizer_that_fails_ends_its_own_request_alone(expected: list[int]) -> None:
    engine, good, bad = engine_with(never), Outcome(), Outcome()
    bad_id = engine.submit(request(bad.on_event))
    engine.submit(request(good.on_event))
    engine.step()

    def push(token: int) -> str:
        raise UnicodeDecodeError("utf-8", b"\xff", 0, 1, "a defect")

    engine.live.sequences[bad_id].output_or_fail().detokenizer.push = push  # type: ignore[method-assign]
    run(engine)
    assert isinstance(bad.error, EngineFailure)
    assert good.tokens == expected
    assert_nothing_is_held(engine)


def test_a_sampler_that_fails_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch, expected: list[int]) -> None:
    engine, outcome, after = engine_with(never), Outcome(), Outcome()
    with monkeypatch.context() as patch:
        # A real operator of torch that the sampler calls, made to raise.
        patch.setattr("torch.Tensor.gather", _raise)
        patch.setattr("torch.gather", _raise)
        engine.submit(request(outcome.on_event))
        run(engine)
    assert isinstance(outcome.error, EngineFailure)
    assert_nothing_is_held(engine)
    engine.submit(request(after.on_event))
    run(engine)
    assert after.tokens == expected


def _raise(*_: object, **__: object) -> None:
    raise RuntimeError("a defect")


def test_a_program_that_cannot_be_loaded_fails_alone_and_holds_no_row(
    monkeypatch: pytest.MonkeyPatch, expected: list[int]
) -> None:
    engine, good, bad = engine_with(never), Outcome(), Outcome()
    with monkeypatch.context() as patch:
        patch.setattr("torch.cat", lambda *_: allocate_too_much())
        engine.submit(request(bad.on_event))
        engine._commands.get()()
    assert isinstance(bad.error, ResourceExhausted)
    assert_nothing_is_held(engine)
    engine.submit(request(good.on_event))
    run(engine)
    assert good.tokens == expected


def test_steps_that_fail_in_a_row_end_the_engine_and_everybody_is_told() -> None:
    engine = engine_with(_always(ValueError("a defect")), max_failed_steps=3, max_sequences=1)
    outcomes = [Outcome() for _ in range(5)]
    for outcome in outcomes:
        engine.submit(request(outcome.on_event))
    engine.start()
    for outcome in outcomes:
        assert outcome.done.wait(PATIENCE_SECONDS)
    assert [type(o.error) for o in outcomes] == [EngineFailure] * 2 + [Unavailable] * 3
    assert engine.shutdown()
    assert isinstance(engine.failure, ValueError)
    assert_nothing_is_held(engine)
    with pytest.raises(Unavailable):
        engine.submit(request(outcomes[0].on_event))


def _always(error: Exception) -> Callable[[int], None]:
    def fault(_: int) -> None:
        raise error

    return fault


def test_failures_with_successes_between_them_do_not_end_the_engine() -> None:
    def every_second(step: int) -> None:
        if step % 2:
            raise ValueError("a defect")

    engine = engine_with(every_second, max_failed_steps=2)
    for _ in range(6):
        outcome = Outcome()
        engine.submit(request(outcome.on_event))
        run(engine)
        assert isinstance(outcome.error, EngineFailure)
    assert_nothing_is_held(engine)


def test_a_lost_device_ends_the_engine_at_once() -> None:
    lost = torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
    engine = engine_with(at(1, lost), max_sequences=1)
    outcomes = [Outcome(), Outcome()]
    for outcome in outcomes:
        engine.submit(request(outcome.on_event))
    engine.start()
    for outcome in outcomes:
        assert outcome.done.wait(PATIENCE_SECONDS)
    assert [type(o.error) for o in outcomes] == [Unavailable, Unavailable]
    assert engine.shutdown()
    assert engine.failure is lost
    assert_nothing_is_held(engine)

"""What the queue refuses, with what word and what time; and that what runs is let run."""

import time

import pytest
from engine_runs import Outcome, loaded
from hypothesis import given, settings
from hypothesis import strategies as st

from patchclamp_server.callers import ANYONE, Caller
from patchclamp_server.engine.admission import (
    MAX_RETRY_SECONDS,
    MIN_RETRY_SECONDS,
    MIN_SAMPLES,
    UNMEASURED_RETRY_SECONDS,
    Admission,
    Demand,
    Reason,
)
from patchclamp_server.engine.config import EngineConfig, Unobserved
from patchclamp_server.engine.engine import Engine
from patchclamp_server.engine.request import Priority, Request, StopParams
from patchclamp_server.errors import ResourceExhausted

FAMILY = "llama"
LAB, OFFICE = Caller("lab"), Caller("office")


def queue(max_waiting: int = 8, max_sequences: int = 2, max_kv_tokens: int = 1000) -> Admission:
    """One whose places are all taken."""
    admission = Admission(max_waiting=max_waiting, max_sequences=max_sequences, max_kv_tokens=max_kv_tokens)
    taken = [-1 - i for i in range(max_sequences)]
    for request_id in taken:
        admission.enter(request_id, Demand(ANYONE, Priority.INTERACTIVE))
    admission.on_step(taken, 0.0, contended=True)
    return admission


def demand(caller: Caller = ANYONE, kv_tokens: int = 10, priority: Priority = Priority.INTERACTIVE) -> Demand:
    return Demand(caller, priority, kv_tokens=kv_tokens, prompt_tokens=4, max_tokens=kv_tokens - 4)


def fill(admission: Admission, asked: Demand, first_id: int = 0) -> int:
    """Lets in as many as may; how many."""
    n = 0
    while admission.check(asked) is None:
        admission.enter(first_id + n, asked)
        n += 1
    return n


def reason(admission: Admission, asked: Demand, seconds_left: float | None = None) -> Reason | None:
    refusal = admission.check(asked, seconds_left)
    return None if refusal is None else refusal.reason


def measured(*, tokens_per_second: float, waiting: int = 5, caller: Caller = ANYONE) -> Admission:
    """One whose queue has been seen to drain. A prompt token takes 0.1 s, a generated one 0.5 s."""
    admission = queue(max_waiting=100, max_kv_tokens=100_000)
    n = 2 * MIN_SAMPLES
    for request_id in range(n):
        admission.enter(request_id, demand())
    for request_id in range(n):
        admission.on_step([request_id], (request_id + 1) * 10 / tokens_per_second, contended=True)
        admission.on_finished(demand(), generated=6, prefill_seconds=0.4, decode_seconds=2.5, paced=False)
        admission.leave(request_id)
    for request_id in range(n, n + waiting):
        admission.enter(request_id, demand(caller))
    return admission


def test_as_many_wait_as_may_and_one_for_each_free_place() -> None:
    full = queue(max_waiting=8, max_sequences=2)
    assert fill(full, demand()) == 8
    assert reason(full, demand()) is Reason.QUEUE_REQUESTS
    full.leave(-1)
    assert fill(full, demand(), first_id=100) == 1


def test_what_waits_is_bounded_in_tokens_of_cache() -> None:
    admission = queue(max_kv_tokens=100)
    assert fill(admission, demand(kv_tokens=30)) == 3
    assert admission.kv_tokens == 90
    assert reason(admission, demand(kv_tokens=30)) is Reason.QUEUE_KV_TOKENS
    assert reason(admission, demand(kv_tokens=10)) is None
    admission.leave(0)
    assert admission.kv_tokens == 60


def test_a_request_that_needs_more_than_the_bound_can_still_be_the_only_one_that_waits() -> None:
    assert reason(queue(max_kv_tokens=100), demand(kv_tokens=500)) is None


def test_a_tenant_leaves_room_for_one_that_was_not_there_before() -> None:
    admission = queue(max_waiting=16)
    assert fill(admission, demand(LAB)) == 12
    assert reason(admission, demand(LAB)) is Reason.TENANT_SHARE
    assert fill(admission, demand(OFFICE), first_id=100) == 3


def test_a_tenant_does_not_take_all_of_the_cache_that_may_be_waited_for() -> None:
    admission = queue(max_waiting=100, max_kv_tokens=400)
    assert fill(admission, demand(LAB, kv_tokens=100)) == 3
    assert reason(admission, demand(LAB, kv_tokens=100)) is Reason.TENANT_SHARE
    assert reason(admission, demand(OFFICE, kv_tokens=100)) is None


def test_callers_without_a_tenant_may_use_the_whole_queue() -> None:
    assert fill(queue(max_waiting=16), demand(ANYONE)) == 16


def test_analysis_leaves_half_of_the_queue_to_others() -> None:
    admission = queue(max_waiting=8)
    assert fill(admission, demand(priority=Priority.ANALYSIS)) == 4
    assert fill(admission, demand(), first_id=100) == 4


@given(st.lists(st.tuples(st.sampled_from("abcd"), st.sampled_from([0.5, 1.0, 2.0]), st.integers(0, 3)), max_size=80))
@settings(deadline=None)
def test_whatever_comes_every_new_tenant_finds_room_until_the_queue_is_full(
    steps: list[tuple[str, float, int]],
) -> None:
    admission = queue(max_waiting=24, max_kv_tokens=240)
    inside: list[int] = []
    for i, (tenant, weight, leaving) in enumerate(steps):
        if admission.check(demand(Caller(tenant, weight))) is None:
            admission.enter(i, demand(Caller(tenant, weight)))
            inside.append(i)
        for _ in range(min(leaving, len(inside) - 1)):
            admission.leave(inside.pop(0))
        assert len(inside) <= 24
        assert admission.kv_tokens == 10 * len(inside) <= 240
        if len(inside) < 24:
            assert admission.check(demand(Caller("new"))) is None


def test_the_time_to_retry_is_when_half_of_what_waits_has_started() -> None:
    admission = measured(tokens_per_second=20, waiting=0)
    fill(admission, demand(), first_id=1000)
    refusal = admission.check(demand())
    assert refusal is not None
    assert refusal.retry_after_seconds == pytest.approx(100 * 10 / 2 / 20, rel=0.1)


@pytest.mark.parametrize(("rate", "bound"), [(1e-3, MAX_RETRY_SECONDS), (1e6, MIN_RETRY_SECONDS)])
def test_the_time_to_retry_is_bounded(rate: float, bound: float) -> None:
    admission = measured(tokens_per_second=rate, waiting=0)
    fill(admission, demand(), first_id=1000)
    refusal = admission.check(demand())
    assert refusal is not None
    assert refusal.retry_after_seconds == bound


def test_before_anything_was_measured_the_time_to_retry_is_a_guess() -> None:
    admission = queue()
    fill(admission, demand())
    refusal = admission.check(demand())
    assert refusal is not None
    assert refusal.retry_after_seconds == UNMEASURED_RETRY_SECONDS


def test_a_deadline_is_held_against_the_queue_and_the_own_time() -> None:
    # Five requests of 10 tokens at 20 a second: 2.5 s. Four prompt tokens at 0.1 s and six generated ones at 0.5 s.
    admission = measured(tokens_per_second=20)
    assert reason(admission, demand(), seconds_left=6.2) is None
    refusal = admission.check(demand(), seconds_left=5.0)
    assert refusal is not None
    assert refusal.reason is Reason.DEADLINE
    assert refusal.message == "it would take 5.9 s, 2.5 of them in the queue; its deadline is in 5.0 s"
    assert refusal.retry_after_seconds == pytest.approx(0.9, abs=0.15)


def test_a_deadline_is_refused_only_while_requests_wait_for_places() -> None:
    admission = measured(tokens_per_second=20)
    admission.on_step([], 1000.0, contended=False)
    assert reason(admission, demand(), seconds_left=0.1) is None


def test_no_deadline_is_refused_before_the_rates_are_known() -> None:
    admission = queue(max_waiting=100, max_kv_tokens=100_000)
    for request_id in range(MIN_SAMPLES - 1):
        admission.enter(request_id, demand())
        admission.on_step([request_id], 100.0 * request_id, contended=True)
        admission.on_finished(demand(), generated=6, prefill_seconds=50, decode_seconds=50, paced=False)
    assert reason(admission, demand(), seconds_left=0.1) is None


def test_a_tenant_waits_for_its_own_queue_and_as_much_of_others() -> None:
    admission = measured(tokens_per_second=20, waiting=40, caller=LAB)
    assert admission.wait_seconds(demand(LAB)) == pytest.approx(20.0, rel=0.1)
    assert admission.wait_seconds(demand(OFFICE)) == 0.0
    admission.enter(5000, demand(OFFICE))
    assert admission.wait_seconds(demand(OFFICE)) == pytest.approx(1.0, rel=0.1)
    assert admission.wait_seconds(demand(Caller("office", 0.5))) == pytest.approx(1.5, rel=0.1)


def test_analysis_waits_for_all_that_is_more_urgent() -> None:
    admission = measured(tokens_per_second=20, waiting=40, caller=LAB)
    assert admission.wait_seconds(demand(OFFICE, priority=Priority.ANALYSIS)) == pytest.approx(20.0, rel=0.1)


def test_how_much_a_request_generates_is_learned_from_those_that_may_stop_early() -> None:
    admission = queue()
    assert admission.expected_tokens(100, may_stop_early=True) == 100
    for _ in range(MIN_SAMPLES):
        admission.on_finished(
            Demand(ANYONE, Priority.INTERACTIVE, max_tokens=200),
            generated=50,
            prefill_seconds=1,
            decode_seconds=1,
            paced=False,
        )
    assert admission.expected_tokens(100, may_stop_early=True) == pytest.approx(25)
    assert admission.expected_tokens(100, may_stop_early=False) == 100


def test_requests_whose_clients_set_the_pace_teach_no_rates() -> None:
    admission = measured(tokens_per_second=20)
    for _ in range(200):
        admission.on_finished(demand(), generated=6, prefill_seconds=500, decode_seconds=500, paced=True)
    # Four prompt tokens at 0.1 s and six generated ones at 0.5 s, as before.
    assert admission.check_start(demand(), seconds_left=3.5) is None


# In the engine


class Refusals(Unobserved):
    def __init__(self) -> None:
        self.reasons: list[Reason] = []
        self.waits: list[float] = []

    def on_refused(self, reason: Reason) -> None:
        self.reasons.append(reason)

    def on_queue_wait(self, seconds: float) -> None:
        self.waits.append(seconds)


def request(seed: int, outcome: Outcome, max_tokens: int = 8, **others: object) -> Request:
    tokens = tuple(2 + (13 * seed + i) % 190 for i in range(12))
    stop = StopParams(max_tokens=max_tokens, ignore_eos=True)
    return Request(tokens, outcome.on_event, stop=stop, **others)  # type: ignore[arg-type]


def test_a_full_queue_refuses_with_a_time_to_retry_and_counts_it() -> None:
    engine = Engine(loaded(FAMILY), EngineConfig(max_sequences=1, max_waiting=2))
    engine.observer = seen = Refusals()
    for seed in range(3):
        engine.submit(request(seed, Outcome()))
    with pytest.raises(ResourceExhausted, match="3 requests wait") as caught:
        engine.submit(request(3, Outcome()))
    assert MIN_RETRY_SECONDS <= caught.value.retry_after_seconds <= MAX_RETRY_SECONDS
    with pytest.raises(ResourceExhausted):
        engine.check_room()
    assert seen.reasons == [Reason.QUEUE_REQUESTS] * 2
    assert engine.stats().queue_kv_tokens == 3 * 20
    while engine.step():
        pass
    engine.check_room()
    assert engine.stats().queue_kv_tokens == 0
    assert len(seen.waits) == 3


def test_cancelled_and_expired_requests_leave_the_queue() -> None:
    engine = Engine(loaded(FAMILY), EngineConfig(max_sequences=1, max_waiting=2))
    cancelled = [engine.submit(request(seed, Outcome())) for seed in range(3)]
    for request_id in cancelled:
        engine.cancel(request_id)
    engine.step()
    assert engine.stats().queue_kv_tokens == 0
    for seed in range(3):
        engine.submit(request(seed, Outcome()))


def test_a_deadline_that_the_queue_cannot_meet_is_refused_once_rates_are_known() -> None:
    engine = Engine(loaded(FAMILY), EngineConfig(max_sequences=1))
    for seed in range(3 * MIN_SAMPLES):
        engine.submit(request(seed, Outcome()))
    engine.submit(request(90, Outcome(), deadline=time.monotonic() + 0.001))
    for _ in range(2 * MIN_SAMPLES * 8):
        engine.step()
    assert engine.scheduler.contended
    engine.submit(request(91, Outcome(), deadline=time.monotonic() + 1000))
    with pytest.raises(ResourceExhausted, match=r"its deadline is in 0\.0 s") as caught:
        engine.submit(request(92, Outcome(), deadline=time.monotonic() + 0.001))
    assert caught.value.retry_after_seconds >= MIN_RETRY_SECONDS


def test_running_work_is_not_preempted_by_what_waits() -> None:
    """Twelve requests that need five blocks each in the end, one in the beginning, and a cache of sixteen."""
    config = EngineConfig(kv_block_size=4, kv_cache_tokens=64, max_sequences=12, enable_prefix_cache=False)
    engine = Engine(loaded(FAMILY), config)
    outcomes = [Outcome() for _ in range(12)]
    for seed, outcome in enumerate(outcomes):
        engine.submit(request(seed, outcome))
    most = 0
    while engine.step():
        most = max(most, len(engine.scheduler.running))
    assert all(len(outcome.tokens) == 8 for outcome in outcomes)
    assert engine.stats().preemptions == 0
    assert most == 3


def test_a_session_whose_client_pauses_gives_its_place_to_one_that_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("patchclamp_server.engine.places.PAUSE_SECONDS", 0.0)
    engine = Engine(loaded(FAMILY), EngineConfig(max_sequences=1))
    paused, other, alone = Outcome(), Outcome(), Outcome()
    session = engine.submit(request(1, paused, credits=2))
    engine.submit(request(2, other))
    while engine.step():
        pass
    assert len(paused.tokens) == 2
    assert other.done.is_set()
    engine.advance(session, 6)
    while engine.step():
        pass
    engine.submit(request(1, alone))
    while engine.step():
        pass
    assert paused.tokens == alone.tokens


def finished_in(engine: Engine, request_id: int, outcome: Outcome, *, grant: bool) -> None:
    while not outcome.done.is_set():
        engine.step()
        if grant:
            engine.advance(request_id, 1)


@pytest.mark.parametrize(("credits", "learned"), [(None, 1), (1, 0)], ids=["free", "lockstep"])
def test_what_a_lockstep_client_lets_wait_teaches_admission_nothing_about_speed(
    credits: int | None, learned: int
) -> None:
    engine = Engine(loaded(FAMILY), EngineConfig(max_sequences=1))
    outcome = Outcome()
    session = engine.submit(request(1, outcome, credits=credits))
    finished_in(engine, session, outcome, grant=credits is not None)
    assert engine.admission.token_seconds.samples == learned
    assert engine.admission.prompt_seconds.samples == learned


def test_a_request_that_was_held_for_its_reader_teaches_admission_nothing_about_speed() -> None:
    engine = Engine(loaded(FAMILY), EngineConfig(max_sequences=1))
    outcome, behind = Outcome(), [False]
    engine.submit(request(1, outcome, held=lambda: behind[0]))
    engine.step()
    behind[0] = True
    assert not engine.step()
    behind[0] = False
    while engine.step():
        pass
    assert len(outcome.tokens) == 8
    assert engine.admission.token_seconds.samples == 0
    assert engine.admission.prompt_seconds.samples == 0


def test_what_a_preempted_request_waited_teaches_admission_nothing_about_speed() -> None:
    engine = Engine(loaded(FAMILY), EngineConfig(max_sequences=1))
    preempted, urgent = Outcome(), Outcome()
    engine.submit(request(1, preempted, priority=Priority.BATCH))
    engine.step()
    engine.submit(request(2, urgent))
    while engine.step():
        pass
    assert preempted.end().usage.preemptions == 1
    assert engine.admission.token_seconds.samples == 1


def test_a_session_that_goes_on_has_not_been_paused_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("patchclamp_server.engine.places.PAUSE_SECONDS", 1e6)
    engine = Engine(loaded(FAMILY), EngineConfig(max_sequences=1))
    session, other = Outcome(), Outcome()
    request_id = engine.submit(request(1, session, credits=2))
    while engine.step():
        pass
    engine.advance(request_id, 5)
    engine.step()
    # From here on every pause is a long one, and this session's is over.
    monkeypatch.setattr("patchclamp_server.engine.places.PAUSE_SECONDS", 0.0)
    engine.submit(request(2, other))
    for _ in range(4):
        engine.step()
    assert session.tokens
    assert not other.tokens
    engine.advance(request_id, 1)
    while engine.step():
        pass
    assert session.end().usage.preemptions == 0
    assert other.done.is_set()


def test_a_session_keeps_its_place_for_a_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("patchclamp_server.engine.places.PAUSE_SECONDS", 1e6)
    engine = Engine(loaded(FAMILY), EngineConfig(max_sequences=1))
    session, other = Outcome(), Outcome()
    request_id = engine.submit(request(1, session, credits=2))
    engine.submit(request(2, other))
    while engine.step():
        pass
    assert not other.tokens
    engine.advance(request_id, 6)
    while engine.step():
        pass
    assert session.end().usage.preemptions == 0
    assert other.done.is_set()


def test_a_request_whose_reader_is_behind_gets_no_step() -> None:
    engine = Engine(loaded(FAMILY))
    outcome = Outcome()
    behind = [False]
    engine.submit(request(1, outcome, held=lambda: behind[0]))
    engine.step()
    behind[0] = True
    assert not engine.step()
    assert len(outcome.tokens) == 1
    behind[0] = False
    while engine.step():
        pass
    assert len(outcome.tokens) == 8


def test_work_that_would_be_lost_is_not_begun() -> None:
    # Four prompt tokens at 0.1 s and six generated ones at 0.5 s; what is before it no longer matters.
    admission = measured(tokens_per_second=20)
    assert admission.check_start(demand(), seconds_left=3.5) is None
    refusal = admission.check_start(demand(), seconds_left=3.0)
    assert refusal is not None
    assert refusal.reason is Reason.DEADLINE
    assert refusal.message == "it would take 3.4 s from now; its deadline is in 3.0 s"
    admission.on_step([], 1000.0, contended=False)
    assert admission.check_start(demand(), seconds_left=3.0) is None


def test_a_request_that_has_waited_too_long_is_refused_and_the_next_one_starts() -> None:
    engine = Engine(loaded(FAMILY), EngineConfig(max_sequences=1))
    engine.observer = seen = Refusals()
    late, others = Outcome(), [Outcome() for _ in range(2 * MIN_SAMPLES)]
    for seed, outcome in enumerate(others):
        engine.submit(request(seed, outcome))
        if seed == MIN_SAMPLES + 2:
            # Let in, for no rate is known yet. When it could start they are, and its time is over but for a moment.
            engine.submit(request(50, late, deadline=time.monotonic() + 1e-6))
    while engine.step():
        pass
    assert isinstance(late.error, ResourceExhausted)
    assert late.tokens == []
    assert seen.reasons == [Reason.DEADLINE]
    assert all(len(outcome.tokens) == 8 for outcome in others)
    assert engine.stats().queue_kv_tokens == 0

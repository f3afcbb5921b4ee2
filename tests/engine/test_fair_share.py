"""Who is next among those that wait: nobody starves, tenants get their shares, and a tenant is served in order."""

import sys
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import count

from engine_runs import Outcome, loaded
from hypothesis import given, settings
from hypothesis import strategies as st

from patchclamp_server.callers import ANYONE, CALLER, Caller
from patchclamp_server.engine.config import EngineConfig
from patchclamp_server.engine.engine import Engine
from patchclamp_server.engine.fair_queue import FairQueue
from patchclamp_server.engine.request import Priority, Request, StopParams
from patchclamp_server.engine.sequence import Sequence

FAMILY = "llama"
LONGEST = 20
ROUNDING = 1e-9
NUMBERS = count()

TENANTS = st.builds(Caller, st.sampled_from("abc"), st.just(1.0))
LENGTHS = st.integers(1, LONGEST)


def waiting(caller: Caller, length: int = 1, priority: Priority = Priority.INTERACTIVE) -> Sequence:
    """A sequence of `length` tokens that arrives after all others made here."""
    number = next(NUMBERS)
    request = Request((5,) * length, on_event=lambda event: None, caller=caller, priority=priority)
    return Sequence(
        id=number,
        request=request,
        seed=0,
        state=None,
        captures=(),
        output=None,
        prompt_length=length,
        arrival=float(number),
        tokens=[5] * length,
    )


def queue_of(*sequences: Sequence) -> FairQueue:
    queue = FairQueue()
    for sequence in sequences:
        queue.add(sequence)
    return queue


def serve(queue: FairQueue, n: int) -> list[Sequence]:
    """Starts the next `n`, each paid for at once."""
    served = []
    for _ in range(n):
        sequence = next(queue.in_turn())
        queue.start(sequence)
        queue.charge(sequence, len(sequence.tokens))
        served.append(sequence)
    return served


@given(st.lists(st.tuples(TENANTS, LENGTHS, st.sampled_from(Priority)), max_size=30))
@settings(deadline=None)
def test_everyone_is_served_once_by_priority_and_a_tenant_in_the_order_it_came(
    asked: list[tuple[Caller, int, Priority]],
) -> None:
    sequences = [waiting(caller, length, priority) for caller, length, priority in asked]
    served = serve(queue_of(*sequences), len(sequences))
    assert sorted(s.id for s in served) == [s.id for s in sequences]
    priorities = [s.request.priority for s in served]
    assert priorities == sorted(priorities)
    for caller in {s.request.caller for s in served}:
        for priority in Priority:
            own = [s.id for s in served if (s.request.caller, s.request.priority) == (caller, priority)]
            assert own == sorted(own)


@given(st.lists(LENGTHS, max_size=30))
@settings(deadline=None)
def test_one_tenant_alone_is_served_in_the_order_of_arrival(lengths: list[int]) -> None:
    sequences = [waiting(ANYONE, length) for length in lengths]
    assert serve(queue_of(*sequences), len(sequences)) == sequences


@given(
    st.dictionaries(st.sampled_from("abcd"), st.sampled_from([0.5, 1.0, 3.0]), min_size=2),
    st.data(),
    st.integers(10, 60),
)
@settings(deadline=None)
def test_tenants_that_always_wait_get_tokens_in_proportion_to_their_weights(
    weights: dict[str, float], data: st.DataObject, n: int
) -> None:
    queue = queue_of(*(waiting(Caller(t, w), data.draw(LENGTHS)) for t, w in weights.items()))
    got = dict.fromkeys(weights, 0.0)
    for _ in range(n):
        [served] = serve(queue, 1)
        caller = served.request.caller
        got[caller.tenant] += len(served.tokens) / caller.weight
        queue.add(waiting(caller, data.draw(LENGTHS)))
        # Nobody gets further ahead than by what a single sequence needs.
        assert max(got.values()) - min(got.values()) <= LONGEST / min(weights.values()) + ROUNDING


@given(st.integers(0, 40), st.lists(LENGTHS, min_size=1, max_size=40))
@settings(deadline=None)
def test_a_tenant_that_comes_to_a_long_queue_is_next_but_for_one(served: int, lengths: list[int]) -> None:
    flood = [waiting(Caller("flood"), length) for length in [*lengths, *[1] * served, 1]]
    queue = queue_of(*flood)
    serve(queue, served)
    late = waiting(Caller("late"))
    queue.add(late)
    assert late in serve(queue, 2)


def test_what_a_tenant_did_not_ask_for_is_not_saved_up() -> None:
    queue = queue_of(*(waiting(Caller("busy"), 10) for _ in range(20)))
    serve(queue, 10)
    for _ in range(10):
        queue.add(waiting(Caller("back"), 10))
    served = serve(queue, 10)
    assert Counter(s.request.caller.tenant for s in served) == {"busy": 5, "back": 5}


def test_a_sequence_that_lost_its_place_is_the_first_of_its_tenant_again() -> None:
    first, second = waiting(ANYONE), waiting(ANYONE)
    queue = queue_of(first, second)
    serve(queue, 1)
    queue.add(first)
    assert serve(queue, 2) == [first, second]


def test_a_request_belongs_to_the_caller_of_its_context() -> None:
    assert Request((1,), on_event=lambda event: None).caller == ANYONE
    token = CALLER.set(Caller("lab", 2.0))
    try:
        assert Request((1,), on_event=lambda event: None).caller == Caller("lab", 2.0)
    finally:
        CALLER.reset(token)


def submitted(engine: Engine, caller: Caller, n: int, finished: list[str]) -> None:
    """Requests of ten tokens each; the tenant is put on `finished` with every end."""
    stop = StopParams(max_tokens=6, ignore_eos=True)
    for _ in range(n):
        outcome = Outcome()

        def on_event(event: object, outcome: Outcome = outcome) -> None:
            outcome.on_event(event)  # type: ignore[arg-type]
            if outcome.done.is_set():
                finished.append(caller.tenant)

        engine.submit(Request((7, 8, 9, next(NUMBERS) % 200), on_event, stop=stop, caller=caller))


def test_a_tenant_that_floods_the_engine_does_not_keep_another_waiting() -> None:
    engine = Engine(loaded(FAMILY), EngineConfig(max_sequences=2))
    finished: list[str] = []
    submitted(engine, Caller("flood"), 40, finished)
    for _ in range(4):
        engine.step()
    submitted(engine, Caller("late"), 4, finished)
    while engine.step():
        pass
    assert Counter(finished) == {"flood": 40, "late": 4}
    assert finished.index("late") <= 4
    assert "late" not in finished[12:]


def test_the_engine_serves_tenants_by_their_weights_while_both_wait() -> None:
    engine = Engine(loaded(FAMILY), EngineConfig(max_sequences=4))
    finished: list[str] = []
    submitted(engine, Caller("three", 3.0), 45, finished)
    submitted(engine, Caller("one", 1.0), 45, finished)
    while engine.step():
        pass
    both = Counter(finished[: finished.index("three") + 48])
    assert 2.0 <= both["three"] / both["one"] <= 4.0


def test_the_length_may_be_read_while_others_come_and_go() -> None:
    """By a scrape, on another thread."""
    queue = FairQueue()
    callers = [Caller(str(i), 1.0) for i in range(8)]
    lengths: list[int] = []
    ended = threading.Event()

    def scrape() -> None:
        while not ended.is_set():
            lengths.append(len(queue))

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(1) as pool:
            scraping = pool.submit(scrape)
            for _ in range(300):
                sequences = [waiting(caller) for caller in callers]
                for sequence in sequences:
                    queue.add(sequence)
                for sequence in sequences[::2]:
                    queue.remove(sequence)
                serve(queue, 4)
            ended.set()
            scraping.result()
    finally:
        sys.setswitchinterval(interval)
    assert set(lengths) <= set(range(9))
    assert len(queue) == 0

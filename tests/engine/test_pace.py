"""What a step takes of analysis and batch prompts while somebody more urgent is in it."""

import pytest
from engine_runs import loaded

from patchclamp_server.engine.config import EngineConfig
from patchclamp_server.engine.engine import Engine
from patchclamp_server.engine.pace import LEAST_ROWS, Pace
from patchclamp_server.engine.request import Event, Finished, Priority, Request, StopParams
from patchclamp_server.engine.scheduler import Work

BLOCK, LONG = 4, 100
INTERACTIVE, BATCH, ANALYSIS = Priority.INTERACTIVE, Priority.BATCH, Priority.ANALYSIS


class Steps:
    """An engine that is stepped by hand, and the rows of each step by priority."""

    def __init__(self, **options: int) -> None:
        config = EngineConfig(kv_block_size=BLOCK, kv_cache_tokens=2048, enable_prefix_cache=False, **options)  # type: ignore[arg-type]
        self.engine = Engine(loaded("llama"), config)
        # What a step takes is not measured here.
        self.engine.scheduler.pace.record = lambda **_: None  # type: ignore[method-assign]
        self.finished: list[Priority] = []
        self._work: list[Work] = []
        schedule = self.engine.scheduler.schedule

        def remembered() -> list[Work]:
            self._work = schedule()
            return self._work

        self.engine.scheduler.schedule = remembered  # type: ignore[method-assign]

    def submit(self, priority: Priority, length: int, max_tokens: int = 50) -> None:
        def on_event(event: Event) -> None:
            if isinstance(event, Finished):
                self.finished.append(priority)

        tokens = tuple(5 + i % 50 for i in range(length))
        stop = StopParams(max_tokens=max_tokens, ignore_eos=True)
        self.engine.submit(Request(tokens, on_event, stop=stop, priority=priority))

    def step(self) -> dict[Priority, list[int]]:
        assert self.engine.step()
        rows: dict[Priority, list[int]] = {}
        for item in self._work:
            rows.setdefault(item.sequence.request.priority, []).append(item.n)
        return rows


def decoding(**options: int) -> Steps:
    """One interactive request decodes."""
    steps = Steps(**options)
    steps.submit(INTERACTIVE, 3)
    assert steps.step() == {INTERACTIVE: [3]}
    return steps


@pytest.mark.parametrize("priority", [BATCH, ANALYSIS])
def test_less_urgent_prompts_have_a_block_of_rows_together_beside_what_decodes(priority: Priority) -> None:
    steps = decoding()
    for _ in range(3):
        steps.submit(priority, LONG)
    for _ in range(3):
        assert steps.step() == {INTERACTIVE: [1], priority: [BLOCK]}


def test_prompts_as_urgent_as_what_decodes_have_all_rows_there_are() -> None:
    steps = decoding()
    steps.submit(INTERACTIVE, LONG)
    assert steps.step() == {INTERACTIVE: [1, LONG]}


def test_less_urgent_prompts_have_all_rows_when_nobody_else_could_run() -> None:
    steps = Steps()
    steps.submit(ANALYSIS, LONG)
    steps.submit(ANALYSIS, LONG + 1)
    assert steps.step() == {ANALYSIS: [LONG, LONG + 1]}


def test_they_have_as_many_as_double_the_time_of_a_decoding_step() -> None:
    steps = decoding()
    pace = Pace(BLOCK)
    pace.record(decode_rows=1, prefill_rows=0, seconds=0.75)
    pace.record(decode_rows=1, prefill_rows=8, seconds=1.0)
    steps.engine.scheduler.pace = pace
    steps.submit(ANALYSIS, LONG)
    assert steps.step() == {INTERACTIVE: [1], ANALYSIS: [24]}


def test_an_urgent_prompt_that_arrives_finds_room_in_the_step_that_a_less_urgent_one_would_fill() -> None:
    steps = Steps(max_tokens_per_step=20)
    steps.submit(ANALYSIS, LONG)
    assert steps.step() == {ANALYSIS: [20]}
    steps.submit(INTERACTIVE, 15)
    assert steps.step() == {INTERACTIVE: [15], ANALYSIS: [BLOCK]}


def test_less_urgent_requests_that_decode_themselves_do_so_beside_the_others() -> None:
    steps = Steps()
    for _ in range(3):
        steps.submit(ANALYSIS, 3)
    steps.step()
    steps.submit(INTERACTIVE, 5)
    assert steps.step() == {ANALYSIS: [1, 1, 1], INTERACTIVE: [5]}


def test_everybody_comes_to_an_end() -> None:
    steps = decoding()
    steps.submit(ANALYSIS, LONG, max_tokens=2)
    steps.submit(BATCH, LONG, max_tokens=2)
    while len(steps.finished) < 3:
        steps.step()
    assert sorted(steps.finished) == [INTERACTIVE, BATCH, ANALYSIS]


def test_the_pace_is_unknown_until_a_step_has_decoded_alone_and_one_with_a_prompt() -> None:
    pace = Pace(16)
    assert pace.rows(512) == 16
    pace.record(decode_rows=3, prefill_rows=100, seconds=9.0)
    pace.record(decode_rows=3, prefill_rows=0, seconds=0.75)
    assert pace.rows(512) == 16
    pace.record(decode_rows=0, prefill_rows=64, seconds=1.0)
    assert pace.rows(512) == 48
    assert pace.rows(8) == 8


def test_rows_that_cost_nothing_fill_the_step_and_dear_ones_are_four() -> None:
    pace = Pace(16)
    pace.record(decode_rows=1, prefill_rows=0, seconds=0.1)
    pace.record(decode_rows=1, prefill_rows=64, seconds=0.05)
    assert pace.rows(512) == 512
    pace = Pace(16)
    pace.record(decode_rows=1, prefill_rows=0, seconds=0.01)
    pace.record(decode_rows=1, prefill_rows=64, seconds=1.0)
    assert pace.rows(512) == LEAST_ROWS == 4

"""What a step takes of analysis and batch work while somebody more urgent is in it, and what while nobody is.

Steps take what a simulated server would: all that is said here of seconds is arithmetic.
"""

import numpy as np
import pytest
from engine_runs import loaded

from patchclamp_server.engine.analysis_share import QUIET_AFTER, TURN, AnalysisShare
from patchclamp_server.engine.config import EngineConfig
from patchclamp_server.engine.engine import Engine
from patchclamp_server.engine.pace import (
    ALONE_SECONDS,
    GAP_SECONDS,
    LEAST_ROWS,
    PROMPT_ROWS,
    QUIET_SECONDS,
    Pace,
    StepRows,
)
from patchclamp_server.engine.request import Event, Finished, Priority, Request, StopParams
from patchclamp_server.engine.scheduler import Work

BLOCK, LONG = 4, 100
INTERACTIVE, BATCH, ANALYSIS = Priority.INTERACTIVE, Priority.BATCH, Priority.ANALYSIS
# Of the simulated server: a step that decodes, and a row more of a prompt or of analysis.
DECODE, PROMPT_ROW, ANALYSIS_ROW = 0.016, 0.002, 0.003
SLOWDOWN = EngineConfig().analysis_slowdown


def simulated(rows: StepRows) -> tuple[float, float]:
    """Seconds of what a step serves, and of its analysis."""
    return DECODE * (rows.decode > 0) + PROMPT_ROW * rows.prompt, ANALYSIS_ROW * rows.analysis


class Steps:
    """An engine that is stepped by hand, the rows of each step by priority, and what the steps took."""

    def __init__(self, **options: float) -> None:
        config = EngineConfig(kv_block_size=BLOCK, kv_cache_tokens=4096, enable_prefix_cache=False, **options)  # type: ignore[arg-type]
        self.engine = Engine(loaded("llama"), config)
        self.finished: list[Priority] = []
        self.held = False
        # Seconds of serving and of analysis, by step.
        self.seconds: list[tuple[float, float]] = []
        self._work: list[Work] = []
        scheduler = self.engine.scheduler
        schedule, took = scheduler.schedule, scheduler.took

        def remembered(*, with_analysis: bool = True) -> list[Work]:
            self._work = schedule(with_analysis=with_analysis)
            return self._work

        def clocked(rows: StepRows, seconds: float) -> None:
            self.seconds.append(simulated(rows))
            took(rows, sum(self.seconds[-1]))

        scheduler.schedule, scheduler.took = remembered, clocked  # type: ignore[method-assign]

    def submit(self, priority: Priority, length: int, max_tokens: int = 50) -> None:
        def on_event(event: Event) -> None:
            if isinstance(event, Finished):
                self.finished.append(priority)

        tokens = tuple(5 + i % 50 for i in range(length))
        stop = StopParams(max_tokens=max_tokens, ignore_eos=True)
        held = (lambda: self.held) if priority is INTERACTIVE else (lambda: False)
        self.engine.submit(Request(tokens, on_event, stop=stop, priority=priority, held=held))

    def step(self) -> dict[Priority, list[int]]:
        assert self.engine.step()
        rows: dict[Priority, list[int]] = {}
        for item in self._work:
            rows.setdefault(item.sequence.request.priority, []).append(item.n)
        return rows

    def steps(self, n: int) -> list[dict[Priority, list[int]]]:
        return [self.step() for _ in range(n)]


def decoding(**options: float) -> Steps:
    """One interactive request decodes, and the server knows how fast it is."""
    steps = Steps(**options)
    # Measures rows of analysis, rows of prompts, and steps that decode.
    steps.submit(ANALYSIS, 2 * BLOCK, max_tokens=0)
    steps.steps(2)
    steps.submit(INTERACTIVE, 3, max_tokens=100)
    steps.steps(2)
    assert steps.finished == [ANALYSIS]
    steps.seconds.clear()
    return steps


def beside_analysis(**options: float) -> Steps:
    """A stream decodes 90 tokens beside more analysis than gets done meanwhile."""
    steps = decoding(**options)
    for _ in range(24):
        steps.submit(ANALYSIS, LONG, max_tokens=0)
    steps.steps(90)
    return steps


@pytest.mark.parametrize("slowdown", [1.1, SLOWDOWN, 3.0])
def test_of_any_time_beside_a_stream_analysis_takes_no_more_than_its_share_and_two_turns(slowdown: float) -> None:
    steps = beside_analysis(analysis_slowdown=slowdown)
    serving, analysis = np.cumsum([(0.0, 0.0), *steps.seconds], axis=0).T
    taken = analysis[None, :] - analysis[:, None] - (slowdown - 1) * (serving[None, :] - serving[:, None])
    # With 1.1 a turn has the least rows there are, and so takes longer than it should.
    turn = max(TURN, slowdown - 1) * DECODE
    assert np.triu(taken).max() <= 2 * turn + LEAST_ROWS * ANALYSIS_ROW


@pytest.mark.parametrize("busy", [INTERACTIVE, BATCH])
def test_analysis_gets_on_while_more_urgent_requests_wait_for_every_place(busy: Priority) -> None:
    steps = Steps(max_sequences=3)
    steps.submit(ANALYSIS, LONG, max_tokens=0)
    for _ in range(40):
        steps.submit(busy, 3, max_tokens=20)
    steps.steps(140)
    assert steps.finished.count(ANALYSIS) == 1
    assert 0 < steps.finished.count(busy) < 40


def test_analysis_gets_on_while_batch_prompts_wait_for_rows() -> None:
    steps = decoding()
    steps.finished.clear()
    for _ in range(4):
        steps.submit(BATCH, 6 * LONG, max_tokens=0)
    steps.submit(ANALYSIS, LONG, max_tokens=0)
    while ANALYSIS not in steps.finished:
        steps.step()
    assert steps.finished.count(BATCH) < 3


@pytest.mark.parametrize("slowdown", [1.1, SLOWDOWN, 3.0])
def test_beside_a_stream_analysis_gets_its_share(slowdown: float) -> None:
    serving, analysis = np.sum(beside_analysis(analysis_slowdown=slowdown).seconds, axis=0)
    assert analysis >= 0.9 * (slowdown - 1) * serving


def test_no_step_of_a_stream_beside_analysis_takes_longer_than_a_turn_more() -> None:
    assert max(map(sum, beside_analysis().seconds)) <= (1 + TURN) * DECODE


def test_most_steps_of_a_stream_beside_analysis_have_none_in_them() -> None:
    assert np.mean([analysis == 0 for _, analysis in beside_analysis().seconds]) > 0.6


def test_a_stream_that_comes_has_its_first_steps_for_itself() -> None:
    steps = decoding()
    while INTERACTIVE not in steps.finished:
        steps.step()
    for _ in range(2):
        steps.submit(ANALYSIS, LONG)
    assert steps.step().keys() == {ANALYSIS}
    steps.submit(INTERACTIVE, 3)
    assert steps.steps(2) == [{INTERACTIVE: [3]}, {INTERACTIVE: [1]}]


def test_single_tokens_of_analysis_have_its_share_too() -> None:
    steps = Steps()
    for _ in range(3):
        steps.submit(ANALYSIS, BLOCK)
    steps.steps(3)
    steps.submit(INTERACTIVE, 5)
    ran = steps.steps(12)
    assert {INTERACTIVE: [1]} in ran
    assert {INTERACTIVE: [1], ANALYSIS: [1, 1, 1]} in ran


def test_analysis_with_nobody_else_runs_for_a_moment_at_a_time() -> None:
    """Who comes meanwhile waits for the end of a step."""
    steps = Steps()
    for _ in range(3):
        steps.submit(ANALYSIS, LONG)
    # What a row takes is not known before the first step.
    assert steps.step() == {ANALYSIS: [BLOCK]}
    assert [sum(rows[ANALYSIS]) for rows in steps.steps(3)] == [int(ALONE_SECONDS / ANALYSIS_ROW)] * 3
    assert max(map(sum, steps.seconds)) <= ALONE_SECONDS


def test_analysis_that_has_long_been_alone_has_longer_steps_until_somebody_comes() -> None:
    steps = Steps()
    for _ in range(30):
        steps.submit(ANALYSIS, LONG, max_tokens=0)
    while sum(map(sum, steps.seconds)) < QUIET_AFTER:
        assert sum(steps.step()[ANALYSIS]) <= int(ALONE_SECONDS / ANALYSIS_ROW)
    assert sum(steps.step()[ANALYSIS]) == int(QUIET_SECONDS / ANALYSIS_ROW)
    steps.submit(INTERACTIVE, 3, max_tokens=1)
    assert steps.step() == {INTERACTIVE: [3]}
    assert sum(steps.step()[ANALYSIS]) == int(ALONE_SECONDS / ANALYSIS_ROW)


def test_batch_prompts_with_nobody_else_run_for_a_moment_at_a_time() -> None:
    steps = Steps()
    for _ in range(2):
        steps.submit(BATCH, LONG)
    assert steps.step() == {BATCH: [BLOCK]}
    assert steps.step() == {BATCH: [int(ALONE_SECONDS / PROMPT_ROW)]}


def test_analysis_has_a_turn_at_a_time_while_a_client_has_just_paused() -> None:
    """Its next token is about to be asked for."""
    steps = decoding()
    for _ in range(2):
        steps.submit(ANALYSIS, LONG)
    steps.held = True
    assert steps.steps(2) == [{ANALYSIS: [int(TURN * DECODE / ANALYSIS_ROW)]}] * 2


def test_analysis_gets_on_while_what_is_more_urgent_waits_for_something_else() -> None:
    """Here for the prefix that another computes, whose reader is behind."""
    steps = Steps(max_tokens_per_step=2 * BLOCK)
    steps.engine.cache.share_prefixes = True
    steps.submit(INTERACTIVE, LONG)
    assert steps.step() == {INTERACTIVE: [2 * BLOCK]}
    steps.held = True
    tokens = tuple(5 + i % 50 for i in range(LONG))
    steps.engine.submit(Request(tokens, lambda event: None, priority=INTERACTIVE))
    steps.submit(ANALYSIS, 3 * BLOCK, max_tokens=0)
    while ANALYSIS not in steps.finished:
        steps.step()


def test_batch_prompts_beside_what_decodes_have_as_many_rows_as_double_its_time() -> None:
    steps = decoding()
    for _ in range(3):
        steps.submit(BATCH, LONG)
    assert steps.steps(3) == [{INTERACTIVE: [1], BATCH: [int(DECODE / PROMPT_ROW)]}] * 3


def test_batch_prompts_have_a_block_together_until_it_is_known_what_they_take() -> None:
    steps = Steps()
    steps.submit(INTERACTIVE, 3)
    steps.step()
    steps.submit(BATCH, LONG)
    assert steps.step() == {INTERACTIVE: [1], BATCH: [BLOCK]}


def test_prompts_as_urgent_as_what_decodes_have_as_many_rows_as_a_stream_may_wait_for() -> None:
    steps = decoding()
    rows = int(GAP_SECONDS / PROMPT_ROW)
    assert rows > PROMPT_ROWS
    steps.submit(INTERACTIVE, 2 * rows)
    steps.submit(INTERACTIVE, 2 * rows)
    # Together: the second one waits until the first leaves rows.
    assert steps.steps(2) == [{INTERACTIVE: [1, rows]}] * 2
    assert steps.step() == {INTERACTIVE: [1, 1, rows]}


def test_a_prompt_with_no_stream_beside_it_has_all_rows_there_are() -> None:
    steps = decoding()
    while steps.finished != [ANALYSIS, INTERACTIVE]:
        steps.step()
    steps.submit(INTERACTIVE, LONG)
    assert steps.step() == {INTERACTIVE: [LONG]}


def test_prompts_beside_a_stream_of_a_slow_model_have_the_least_rows_that_pay() -> None:
    pace = Pace(BLOCK)
    pace.record(StepRows(decode=0, prompt=BLOCK), 10.0)
    assert pace.rows_beside_equals(512) == PROMPT_ROWS
    assert pace.rows_beside_equals(8) == 8


def test_an_urgent_prompt_that_arrives_finds_room_in_the_step_that_a_less_urgent_one_would_fill() -> None:
    steps = Steps(max_tokens_per_step=20)
    steps.submit(BATCH, LONG)
    assert steps.steps(2) == [{BATCH: [BLOCK]}, {BATCH: [20]}]
    steps.submit(INTERACTIVE, 15)
    assert steps.step() == {INTERACTIVE: [15], BATCH: [BLOCK]}


def test_batch_requests_that_decode_themselves_do_so_beside_the_others() -> None:
    steps = Steps()
    for _ in range(3):
        steps.submit(BATCH, 1)
    steps.step()
    steps.submit(INTERACTIVE, 5)
    assert steps.step() == {BATCH: [1, 1, 1], INTERACTIVE: [5]}


def test_everybody_comes_to_an_end() -> None:
    steps = decoding()
    steps.submit(ANALYSIS, LONG, max_tokens=2)
    steps.submit(BATCH, LONG, max_tokens=2)
    while len(steps.finished) < 4:
        steps.step()
    assert sorted(steps.finished) == [INTERACTIVE, BATCH, ANALYSIS, ANALYSIS]


def test_the_pace_is_unknown_until_a_step_has_decoded_alone_and_one_with_a_prompt() -> None:
    pace = Pace(16)
    assert pace.rows_beside(512) == 16
    pace.record(StepRows(decode=3, prompt=100), 9.0)
    pace.record(StepRows(decode=3, prompt=0), 0.75)
    assert pace.rows_beside(512) == 16
    pace.record(StepRows(decode=0, prompt=64), 1.0)
    assert pace.rows_beside(512) == 48
    assert pace.rows_beside(8) == 8


def test_what_decoding_takes_is_no_cost_of_the_rows_of_prompts() -> None:
    pace = Pace(16)
    pace.record(StepRows(decode=1, prompt=0), 0.75)
    pace.record(StepRows(decode=1, prompt=8), 1.0)
    assert pace.rows_beside(512) == 24


def test_rows_that_cost_nothing_fill_the_step_and_dear_ones_are_four() -> None:
    pace = Pace(16)
    pace.record(StepRows(decode=1, prompt=0), 0.1)
    pace.record(StepRows(decode=1, prompt=64), 0.05)
    assert pace.rows_beside(512) == 512
    pace = Pace(16)
    pace.record(StepRows(decode=1, prompt=0), 0.01)
    pace.record(StepRows(decode=1, prompt=64), 1.0)
    assert pace.rows_beside(512) == LEAST_ROWS == 4


def test_rows_of_analysis_are_measured_apart_from_those_of_prompts() -> None:
    """Their reducers take time too."""
    pace = Pace(16)
    pace.record(StepRows(decode=1, prompt=0), 0.25)
    pace.record(StepRows(decode=0, prompt=64), 1.0)
    assert pace.record(StepRows(decode=0, prompt=0, analysis=16), 1.0) == 1.0
    assert pace.record(StepRows(decode=2, prompt=16, analysis=8), 1.5) == 1.0
    assert pace.decode_seconds == 0.25
    assert pace.rows_beside(512) == 16
    assert pace.analysis_beside(2.0, 512) == 16


def test_rows_of_analysis_in_steps_of_their_own_are_measured_apart_from_those_beside_others() -> None:
    pace = Pace(1)
    pace.record(StepRows(decode=1, prompt=0), 0.25)
    pace.record(StepRows(decode=0, prompt=0, analysis=64), 0.25)
    pace.record(StepRows(decode=1, prompt=0, analysis=8), 1.25)
    assert (pace.analysis_alone(0.5, 512), pace.analysis_beside(1.0, 512)) == (128, 8)


def test_a_step_of_analysis_that_took_longer_than_thought_counts_at_once() -> None:
    pace = Pace(4)
    for seconds in (0.01, 0.5):
        pace.record(StepRows(decode=0, prompt=0, analysis=50), seconds)
    assert pace.analysis_alone(ALONE_SECONDS, 512) == int(50 * ALONE_SECONDS / 0.5)


def test_what_analysis_takes_beside_steps_that_nobody_has_measured_goes_by_its_rows() -> None:
    assert Pace(16).record(StepRows(decode=1, prompt=0, analysis=3), 1.0) == 0.75


def test_a_turn_that_took_too_long_is_followed_by_none_until_serving_has_made_up_for_it() -> None:
    pace = Pace(16)
    pace.record(StepRows(decode=1, prompt=0), 1.0)
    share = AnalysisShare(pace, 1.5)
    share.served(3.0)
    assert share.is_due
    share.analysed(4.5)
    share.served(8.0)
    assert not share.is_due
    share.served(1.0)
    assert share.is_due


def test_what_analysis_did_not_take_is_saved_up_for_two_turns_at_most() -> None:
    pace = Pace(16)
    pace.record(StepRows(decode=1, prompt=0), 1.0)
    share = AnalysisShare(pace, 1.5)
    share.served(100.0)
    share.analysed(2.0 * share.turn_seconds)
    assert not share.is_due

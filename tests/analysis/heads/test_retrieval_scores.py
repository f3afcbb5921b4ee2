"""Retrieval scores from readouts, what is said of many runs, and when to stop: on readouts made by hand."""

import pytest
import torch

from patchclamp_server.analysis.heads.retrieval.retrieval_scores import RetrievalScores, best, overlap, run_scores
from patchclamp_server.analysis.heads.retrieval.rouge import recall
from patchclamp_server.analysis.heads.retrieval.stopping import StoppingRule
from patchclamp_server.errors import InvalidArgument
from patchclamp_server.interventions.program import ReadoutValue

# Prompt of six tokens with the needle at 2, 3, 4, 5; then the answer.
NEEDLE = range(2, 6)
TOKENS = (9, 11, 11, 12, 13, 11, 11, 12, 40)


def row(position: int, *keys: int) -> ReadoutValue:
    """Where the heads of layer 0 looked when the token after `position` was generated."""
    return ReadoutValue("heads", 0, position, (0.5,) * len(keys), keys)


def scores(*rows: ReadoutValue, heads: int = 1) -> list[float]:
    found: list[float] = run_scores(rows, TOKENS, NEEDLE, (1, heads))[0].tolist()
    return found


def test_a_hit_is_a_look_at_the_needle_token_that_is_generated() -> None:
    # Generated at position 5: token 11. It stands at 1 (no needle), 2 and 5; 12 stands at 3.
    assert scores(row(5, 2, 5, 1, 3), heads=4) == [0.25, 0.25, 0.0, 0.0]


def test_the_row_of_the_last_prompt_token_generates_the_first_token_of_the_answer() -> None:
    assert scores(row(5, 3)) == [0.0]
    assert scores(row(6, 3)) == [0.25]


def test_a_position_counts_once_however_often_it_is_copied() -> None:
    assert scores(row(4, 2), row(5, 2)) == [0.25]
    assert scores(row(4, 2), row(5, 5)) == [0.5]


def test_scores_are_of_the_layer_and_the_head_that_looked() -> None:
    value = ReadoutValue("heads", 2, 5, (0.1, 0.9), (0, 5))
    assert run_scores([value], TOKENS, NEEDLE, (3, 2)).nonzero().tolist() == [[2, 1]]


@pytest.mark.parametrize(
    ("text", "reference", "expected"),
    [
        ("A blue fish and a red boat.", "a red fish", 1.0),
        ("red RED red", "Red fish", 0.5),
        ("the fish", "the fish ate the fish", 0.4),
        ("red or red", "red, red fish", 2 / 3),
        ("redfish", "red fish", 0.0),
        ("", "red fish", 0.0),
        ("three", "...", 0.0),
    ],
)
def test_recall_counts_the_words_of_the_reference_that_are_in_the_text(
    text: str, reference: str, expected: float
) -> None:
    assert recall(text, reference) == pytest.approx(expected)


def runs(*rows: list[float]) -> RetrievalScores:
    """Of one layer: the scores of its heads in each run."""
    return RetrievalScores([torch.tensor([row], dtype=torch.float64) for row in rows])


def test_a_score_is_the_mean_over_runs_and_its_interval_holds_it() -> None:
    found = runs([0.0, 0.5], [0.4, 0.5], [0.2, 0.5])
    assert found.mean[0].tolist() == pytest.approx([0.2, 0.5])
    low, high = found.interval(seed=0)
    assert low[0, 0] < 0.2 < high[0, 0]
    assert low[0, 1] == high[0, 1] == 0.5


def test_always_on_is_a_score_in_every_run() -> None:
    assert runs([0.1, 0.0, 0.9], [0.1, 0.9, 0.9]).always_on[0].tolist() == [True, False, True]


def test_the_best_heads_never_include_one_without_a_score() -> None:
    assert best(torch.tensor([[0.2, 0.0], [0.0, 0.3]]), 3) == {0, 3}
    assert best(torch.tensor([[0.2, 0.2], [0.1, 0.2]]), 2) == {0, 1}


def test_overlap_is_of_the_larger_set() -> None:
    assert overlap({1, 2}, {2, 3, 4, 5}) == 0.25
    assert overlap(set(), set()) == 0.0


def test_stability_is_one_where_all_runs_agree_and_low_where_none_do() -> None:
    same = [0.0] * 40
    same[:12] = [1 - i / 20 for i in range(12)]
    assert runs(*[same] * 6).stability(0) == pytest.approx(1.0)
    assert runs(same).stability(0) == 0.0
    generator = torch.Generator().manual_seed(0)
    noise = RetrievalScores([torch.rand(1, 400, generator=generator) for _ in range(6)])
    assert noise.stability(0) < 0.3


RULE = StoppingRule(top_k=2, agreement=1.0, window=2, min_successes=4)


def test_it_stops_once_the_best_heads_were_the_same_some_successes_earlier() -> None:
    rows = [[0.9, 0.5, 0.0], [0.9, 0.5, 0.0], [0.9, 0.5, 0.0], [0.9, 0.5, 0.0]]
    assert not RULE.holds(runs(*rows[:3]))  # too few successes
    assert RULE.holds(runs(*rows))
    # The third head overtakes the second in the last two runs.
    assert not RULE.holds(runs(*rows[:2], [0.9, 0.4, 1.0], [0.9, 0.4, 1.0]))


def test_it_never_stops_before_there_is_something_to_compare_with() -> None:
    rule = StoppingRule(top_k=1, window=2, min_successes=1)
    assert not rule.holds(runs([0.9], [0.9]))
    assert rule.holds(runs([0.9], [0.9], [0.9]))


def test_heads_that_never_scored_are_no_stable_ranking() -> None:
    assert not RULE.holds(runs(*[[0.0, 0.0, 0.0]] * 8))


@pytest.mark.parametrize(
    ("rule", "field"),
    [
        (StoppingRule(top_k=0), "stopping.top_k"),
        (StoppingRule(top_k=9), "stopping.top_k"),
        (StoppingRule(top_k=2, agreement=0.0), "stopping.agreement"),
        (StoppingRule(top_k=2, agreement=1.1), "stopping.agreement"),
        (StoppingRule(top_k=2, window=0), "stopping.window"),
        (StoppingRule(top_k=2, min_successes=0), "stopping.min_successes"),
    ],
)
def test_a_rule_that_says_nothing_is_refused_by_field(rule: StoppingRule, field: str) -> None:
    with pytest.raises(InvalidArgument) as refused:
        rule.check(8, "stopping")
    assert refused.value.field == field

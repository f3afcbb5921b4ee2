"""What stands for a text: the rule of pooling.py on states that are made up."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from patchclamp_server.interventions.pooling import (
    LAST_TOKENS,
    MOST_LEFT_OUT,
    Pooled,
    Pooling,
    TokenPool,
    ordinary_tokens,
    outliers,
    pooled_tokens,
)

WIDTH = 6
CHUNKS = [1, 3, 7, 1000]


def text(n: int, sinks: dict[int, float], seed: int = 0) -> torch.Tensor:
    """[n, WIDTH] of norm 1, but for the tokens in `sinks`."""
    states = torch.nn.functional.normalize(torch.randn(n, WIDTH, generator=torch.Generator().manual_seed(seed)), dim=1)
    for token, norm in sinks.items():
        states[token] *= norm
    return states


def pooled(pooling: Pooling, states: torch.Tensor, chunk: int = 1000, *, scope: Sequence[int] | None = None) -> Pooled:
    chosen = None if scope is None else np.isin(np.arange(len(states)), scope)
    pool = TokenPool(pooling, (4,), len(states), chosen=chosen)
    for start in range(0, len(states), chunk):
        pool.add(4, states[start : start + chunk], start)
    return pool.result()


@pytest.mark.parametrize("chunk", CHUNKS)
def test_a_mean_leaves_out_the_first_token_and_every_outlier(chunk: int) -> None:
    states = text(40, {0: 100.0, 3: 20.0, 17: 3.1, 30: 2.9})
    found = pooled(Pooling.MEAN, states, chunk)
    kept = [t for t in range(1, 40) if t not in (3, 17)]
    torch.testing.assert_close(found.values[0], states[kept].mean(dim=0))
    assert (found.tokens.tolist(), found.left_out.tolist()) == ([37], [2])


@pytest.mark.parametrize("chunk", CHUNKS)
def test_the_last_token_that_is_no_outlier_stands_for_the_text(chunk: int) -> None:
    states = text(20, {0: 100.0, 5: 50.0, 17: 9.0, 19: 20.0})
    found = pooled(Pooling.LAST_TOKEN, states, chunk)
    assert torch.equal(found.values[0], states[18])
    assert (found.tokens.tolist(), found.left_out.tolist()) == ([1], [1])


@pytest.mark.parametrize("chunk", CHUNKS)
def test_a_maximum_is_of_each_unit_over_all_tokens_but_the_first(chunk: int) -> None:
    states = text(40, {0: 100.0, 3: 20.0, 17: 3.1, 30: 2.9})
    found = pooled(Pooling.MAX, states, chunk)
    assert torch.equal(found.values[0], states[1:].amax(dim=0))
    assert (found.tokens.tolist(), found.left_out.tolist()) == ([39], [0])


@pytest.mark.parametrize("chunk", CHUNKS)
def test_a_maximum_of_negative_units_is_negative(chunk: int) -> None:
    states = -text(200, {}).abs()
    assert torch.equal(pooled(Pooling.MAX, states, chunk).values[0], states[1:].amax(dim=0))


@pytest.mark.parametrize("pooling", Pooling)
def test_a_text_of_one_token_stands_for_itself(pooling: Pooling) -> None:
    states = text(1, {0: 100.0})
    found = pooled(pooling, states)
    assert torch.equal(found.values, states)
    assert (found.tokens.tolist(), found.left_out.tolist()) == ([1], [0])


@pytest.mark.parametrize("pooling", [Pooling.MEAN, Pooling.LAST_TOKEN])
def test_of_two_tokens_after_the_first_the_much_larger_is_the_outlier(pooling: Pooling) -> None:
    states = text(3, {0: 100.0, 2: 20.0})
    assert torch.equal(pooled(pooling, states).values[0], states[1])


@pytest.mark.parametrize("pooling", Pooling)
def test_a_text_that_begins_anew_is_not_counted_twice(pooling: Pooling) -> None:
    states = text(30, {7: 20.0})
    pool = TokenPool(pooling, (4,), 30)
    pool.add(4, states[:20], 0)
    pool.add(4, states, 0)
    torch.testing.assert_close(pool.result().values, pooled(pooling, states).values)


def test_the_largest_are_left_out_where_there_are_more_outliers_than_rows_are_kept_for() -> None:
    n = 4 * MOST_LEFT_OUT
    sinks = {t: 50.0 + t for t in range(2, 2 + MOST_LEFT_OUT + 5)}
    states = text(n, sinks)
    found = pooled(Pooling.MEAN, states, 32)
    kept = [1, *range(2, 7), *range(2 + MOST_LEFT_OUT + 5, n)]
    torch.testing.assert_close(found.values[0], states[kept].mean(dim=0))
    assert found.left_out.tolist() == [MOST_LEFT_OUT]


def test_the_very_last_stands_for_a_text_that_ends_with_outliers_only() -> None:
    states = text(40, dict.fromkeys(range(40 - LAST_TOKENS, 40), 50.0))
    found = pooled(Pooling.LAST_TOKEN, states)
    assert torch.equal(found.values[0], states[-1])
    assert found.left_out.tolist() == [0]


def test_half_precision_is_summed_in_float32() -> None:
    states = torch.ones(3001, WIDTH, dtype=torch.bfloat16)
    assert torch.equal(pooled(Pooling.MEAN, states, 100).values, torch.ones(1, WIDTH))


def test_states_are_kept_as_they_were_when_they_came() -> None:
    states = text(5, {})
    pool = TokenPool(Pooling.LAST_TOKEN, (4,), 5)
    given = states.clone()
    pool.add(4, given, 0)
    given.zero_()
    assert torch.equal(pool.result().values[0], states[-1])


@pytest.mark.parametrize("broken", [[torch.inf], [torch.nan], [torch.inf, torch.nan]], ids=str)
def test_a_norm_that_is_not_finite_is_a_fault_and_no_outlier(broken: list[float]) -> None:
    assert not outliers(torch.tensor([1.0, 1.0, 1.0, *broken])).any()


def test_where_most_states_are_zero_nothing_is_an_outlier() -> None:
    assert not outliers(torch.tensor([0.0, 0.0, 0.0, 5.0])).any()


def test_ordinary_tokens_are_told_text_by_text() -> None:
    states = torch.stack((text(5, {0: 9.0, 2: 9.0}), text(5, {4: 9.0})))
    assert ordinary_tokens(states).tolist() == [[False, True, False, True, True], [False, True, True, True, False]]
    assert ordinary_tokens(states[:, :1]).tolist() == [[True], [True]]


@pytest.mark.parametrize("chunk", CHUNKS)
def test_of_the_tokens_in_scope_outliers_are_left_out_by_the_norms_of_the_whole_text(chunk: int) -> None:
    # Of the tokens in scope alone, 12 would be the median.
    states = text(40, {0: 100.0, 12: 20.0, 13: 30.0, 20: 50.0})
    scope = [0, 11, 12, 13]
    mean = pooled(Pooling.MEAN, states, chunk, scope=scope)
    torch.testing.assert_close(mean.values[0], states[11])
    assert (mean.tokens.tolist(), mean.left_out.tolist()) == ([1], [2])
    last = pooled(Pooling.LAST_TOKEN, states, chunk, scope=scope)
    assert torch.equal(last.values[0], states[11])
    assert (last.tokens.tolist(), last.left_out.tolist()) == ([1], [2])
    assert torch.equal(pooled(Pooling.MAX, states, chunk, scope=scope).values[0], states[11:14].amax(dim=0))


@pytest.mark.parametrize("pooling", Pooling)
def test_the_first_token_stands_where_it_alone_is_in_scope(pooling: Pooling) -> None:
    states = text(9, {0: 100.0, 8: 100.0})
    assert torch.equal(pooled(pooling, states, scope=[0]).values[0], states[0])


@pytest.mark.parametrize("chunk", CHUNKS)
def test_where_all_tokens_in_scope_are_outliers_they_stand_as_if_none_were(chunk: int) -> None:
    states = text(40, {5: 50.0, 7: 60.0})
    mean = pooled(Pooling.MEAN, states, chunk, scope=[5, 7])
    torch.testing.assert_close(mean.values[0], states[[5, 7]].mean(dim=0))
    assert (mean.tokens.tolist(), mean.left_out.tolist()) == ([2], [0])
    assert torch.equal(pooled(Pooling.LAST_TOKEN, states, chunk, scope=[5, 7]).values[0], states[7])


@pytest.mark.parametrize("pooling", Pooling)
@pytest.mark.parametrize("n", [1, 2, 200])
def test_a_scope_of_all_tokens_is_none(pooling: Pooling, n: int) -> None:
    states = text(n, {t: 30.0 for t in (0, 50, 199) if t < n})
    scoped, whole = pooled(pooling, states, 16, scope=range(n)), pooled(pooling, states, 16)
    torch.testing.assert_close(scoped.values, whole.values)
    assert (scoped.tokens.tolist(), scoped.left_out.tolist()) == (whole.tokens.tolist(), whole.left_out.tolist())


def scoped(pooling: Pooling, states: torch.Tensor, tokens: list[int], chunk: int = 1000) -> Pooled:
    inside = np.isin(np.arange(len(states)), tokens)
    pool = TokenPool(pooling, (4,), len(states), chosen=inside)
    for start in range(0, len(states), chunk):
        pool.add(4, states[start : start + chunk], start)
    return pool.result()


@pytest.mark.parametrize("chunk", CHUNKS)
def test_only_the_tokens_of_a_scope_are_pooled(chunk: int) -> None:
    states = text(40, {0: 100.0, 3: 20.0, 17: 3.1, 30: 20.0})
    inside = [0, 2, 3, 9, 11, 30]
    mean, last, most = (
        scoped(pooling, states, inside, chunk) for pooling in (Pooling.MEAN, Pooling.LAST_TOKEN, Pooling.MAX)
    )
    torch.testing.assert_close(mean.values[0], states[[2, 9, 11]].mean(dim=0))
    assert (mean.tokens.tolist(), mean.left_out.tolist()) == ([3], [2])
    assert torch.equal(last.values[0], states[11])
    assert (last.tokens.tolist(), last.left_out.tolist()) == ([1], [1])
    assert torch.equal(most.values[0], states[inside[1:]].amax(dim=0))


@pytest.mark.parametrize("pooling", Pooling)
@pytest.mark.parametrize("tokens", [[0], [3], [5]])
def test_a_scope_of_one_token_is_that_token_sink_or_not(pooling: Pooling, tokens: list[int]) -> None:
    states = text(20, {0: 100.0, 3: 20.0})
    found = scoped(pooling, states, tokens, chunk=4)
    assert torch.equal(found.values[0], states[tokens[0]])
    assert (found.tokens.tolist(), found.left_out.tolist()) == ([1], [0])


def test_a_mean_of_a_scope_of_outliers_is_of_them() -> None:
    states = text(20, {0: 100.0, 3: 20.0, 7: 30.0})
    torch.testing.assert_close(scoped(Pooling.MEAN, states, [3, 7]).values[0], states[[3, 7]].mean(dim=0))


@pytest.mark.parametrize("pooling", [Pooling.MEAN, Pooling.LAST_TOKEN])
@pytest.mark.parametrize(
    ("n", "sinks"),
    [
        (1, {}),
        (2, {1: 50.0}),
        (9, {}),
        (9, {0: 40.0, 3: 9.0, 8: 7.0}),
        (40, dict.fromkeys(range(40 - LAST_TOKENS, 40), 20.0)),
        (2 * MOST_LEFT_OUT + 60, {2 * i + 1: 30.0 + i for i in range(MOST_LEFT_OUT + 9)}),
    ],
)
def test_the_tokens_that_are_pooled_are_told_by_their_norms(pooling: Pooling, n: int, sinks: dict[int, float]) -> None:
    states = text(n, sinks)
    chosen = pooled_tokens(states.norm(dim=1), pooling)
    torch.testing.assert_close(states[chosen].mean(0), pooled(pooling, states).values[0])
    assert int(chosen.sum()) == int(pooled(pooling, states).tokens[0])

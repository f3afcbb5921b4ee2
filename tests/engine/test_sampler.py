"""Sampling against a plain float64 reference, against the exact distribution, and across batches."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from patchclamp_server.engine.request import SamplingParams
from patchclamp_server.engine.sampler import (
    NOT_FINITE,
    SamplingRow,
    _argmax,
    _invert_cdf,
    _nucleus_thresholds,
    _penalise,
    _thresholds,
    sample,
)
from patchclamp_server.engine.uniforms import Uniforms, uniform

VOCAB = 4000


def row(
    params: SamplingParams, seed: int = 0, prompt: tuple[int, ...] = (), output: tuple[int, ...] = ()
) -> SamplingRow:
    return SamplingRow(params, seed, prompt, output)


def logits_like_a_model(n: int, vocab: int = VOCAB, scale: float = 3.0, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, vocab, generator=torch.Generator().manual_seed(seed)) * scale


def reference_penalties(logits: np.ndarray, r: SamplingRow) -> np.ndarray:
    p, out = r.params, list(r.output_ids)
    logits = logits.astype(np.float64)
    for i in set(r.prompt_ids) | set(out):
        logits[i] = logits[i] / p.repetition_penalty if logits[i] > 0 else logits[i] * p.repetition_penalty
    for i in set(out):
        logits[i] -= p.presence_penalty + p.frequency_penalty * out.count(i)
    return logits


def reference_kept(logits: np.ndarray, p: SamplingParams, slack: float = 0.0) -> set[int]:
    """Ids left by top-k, top-p, min-p; with `slack` added to top_p."""
    scores = (logits.astype(np.float64) - logits.max()) / p.temperature
    order = np.argsort(-scores, kind="stable")
    if p.top_k:
        order = [i for i in order if scores[i] >= scores[order[min(p.top_k, len(order)) - 1]]]
    mass = np.exp(scores[order]) / np.exp(scores[order]).sum()
    before = np.concatenate([[0.0], np.cumsum(mass)[:-1]])
    last = max(int((before < p.top_p + slack).sum()), 1) - 1
    return {int(i) for i in order if scores[i] >= scores[order[last]] and math.exp(scores[i]) >= p.min_p}


def kept_by(logits: torch.Tensor, rows: list[SamplingRow]) -> list[set[int]]:
    temperature = torch.tensor([r.params.temperature for r in rows])[:, None]
    scores = (logits - logits.max(-1, keepdim=True).values) / temperature
    threshold = _thresholds(scores, rows)
    assert threshold is not None
    return [set(torch.nonzero(s >= t).flatten().tolist()) for s, t in zip(scores, threshold, strict=True)]


def test_greedy_takes_the_first_of_equal_maxima() -> None:
    logits = torch.zeros(2, 50)
    logits[0, [7, 30]] = 2.0
    assert [s.id for s in sample(logits, [row(SamplingParams())] * 2)] == [7, 0]


def test_a_greedy_batch_without_logprobs_has_torch_compute_nothing_as_wide_as_the_vocabulary() -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    wide: list[str] = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            sizes = [a.numel() for a in (*args, out) if isinstance(a, torch.Tensor)]
            if max(sizes, default=0) >= VOCAB and func is not torch.ops.aten.gather.default:
                wide.append(str(func))
            return out

    logits = logits_like_a_model(8)
    with Record():
        sample(logits, [row(SamplingParams())] * 8)
    # The argmax of a CPU is numpy's, which looks at the same memory.
    assert wide == ["aten.detach.default"]


def test_the_argmax_of_numpy_is_that_of_torch_also_of_what_is_not_finite() -> None:
    logits = logits_like_a_model(6)
    logits[1, [9, 5]] = math.nan
    logits[2, [7, 3000]] = math.inf
    logits[3] = -math.inf
    logits[4, [30, 20]] = 100.0
    logits[5, 17] = -math.nan
    assert torch.equal(_argmax(logits), logits.argmax(dim=-1, keepdim=True))


def test_the_logits_are_left_unchanged() -> None:
    logits = logits_like_a_model(3)
    before = logits.clone()
    params = SamplingParams(temperature=0.7, top_k=40, top_p=0.9, min_p=0.01, repetition_penalty=1.3, logprobs=2)
    sample(logits, [row(params, output=(1, 2)), row(SamplingParams()), row(params, prompt=(4,))])
    assert torch.equal(logits, before)


def test_penalties_equal_the_reference() -> None:
    logits = logits_like_a_model(4)
    rows = [
        row(SamplingParams(repetition_penalty=1.4), prompt=(1, 2, 2, 9), output=(2, 5)),
        row(SamplingParams(presence_penalty=0.7, frequency_penalty=0.3), prompt=(1,), output=(3, 3, 3, 8)),
        row(SamplingParams(repetition_penalty=0.8, presence_penalty=-0.5, frequency_penalty=1.0), (), (6,), (6, 6, 7)),
        row(SamplingParams(repetition_penalty=2.0)),
    ]
    rows[2] = row(rows[2].params, prompt=(6,), output=(6, 6, 7))
    got = _penalise(logits, rows, range(4)).numpy()
    want = np.stack([reference_penalties(x, r) for x, r in zip(logits.numpy(), rows, strict=True)])
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)


def test_a_frequency_penalty_moves_the_greedy_choice_to_the_next_token() -> None:
    logits = torch.zeros(1, 10)
    logits[0, 3], logits[0, 4] = 2.0, 1.5
    params = SamplingParams(frequency_penalty=0.2)
    chosen = [sample(logits, [row(params, output=(3,) * n)])[0].id for n in range(5)]
    assert chosen == [3, 3, 3, 4, 4]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    scale=st.sampled_from([0.05, 0.5, 2.0, 5.0]),
    temperature=st.floats(0.3, 2.0),
    top_k=st.sampled_from([0, 1, 7, 300, 2000, VOCAB, VOCAB + 5]),
    top_p=st.sampled_from([0.0, 0.1, 0.5, 0.9, 0.99, 1.0]),
    min_p=st.sampled_from([0.0, 0.02, 0.5, 1.0]),
)
def test_the_kept_tokens_equal_a_float64_reference(
    seed: int, scale: float, temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    # A second row with a filter, so that there always is one.
    rows = [row(params), row(SamplingParams(temperature=1.0, top_k=3))]
    logits = logits_like_a_model(2, scale=scale, seed=seed)
    kept = kept_by(logits, rows)[0]
    # float32 decides a boundary closer than 1e-5 either way.
    assert reference_kept(logits[0].numpy(), params, -1e-5) <= kept <= reference_kept(logits[0].numpy(), params, 1e-5)


@pytest.mark.parametrize("scale", [0.01, 1.0, 6.0])
def test_a_nucleus_found_among_candidates_is_the_one_of_the_full_sort(scale: float) -> None:
    scores = logits_like_a_model(5, scale=scale)
    top_p = torch.tensor([0.1, 0.5, 0.9, 0.99, 0.999], dtype=torch.float64)
    assert torch.equal(_nucleus_thresholds(scores, top_p, (64, 1024)), _nucleus_thresholds(scores, top_p, ()))


def test_equal_logits_are_kept_together() -> None:
    logits = torch.zeros(1, 500)
    logits[0, 490:] = 4.0
    assert kept_by(logits, [row(SamplingParams(temperature=1.0, top_k=3))]) == [set(range(490, 500))]
    assert kept_by(logits, [row(SamplingParams(temperature=1.0, top_p=0.01))]) == [set(range(490, 500))]


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=1.0),
        SamplingParams(temperature=0.6),
        SamplingParams(temperature=1.0, top_k=5),
        SamplingParams(temperature=1.2, top_p=0.8),
        SamplingParams(temperature=1.0, min_p=0.15),
        SamplingParams(temperature=1.0, top_k=12, top_p=0.9, min_p=0.02, repetition_penalty=1.5, presence_penalty=0.3),
    ],
)
def test_draws_follow_the_exact_distribution(params: SamplingParams) -> None:
    draws, vocab = 20_000, 40
    logits = logits_like_a_model(1, vocab=vocab, scale=1.5, seed=3)
    prompt, output = (1, 2), (2, 3)
    exact = reference_penalties(logits[0].numpy(), row(params, 0, prompt, output))
    kept = sorted(reference_kept(exact, params))
    p = np.exp((exact[kept] - exact.max()) / params.temperature)
    p /= p.sum()
    rows = [row(params, seed, prompt, output) for seed in range(draws)]
    counts = np.bincount([s.id for s in sample(logits.expand(draws, -1), rows)], minlength=vocab)
    assert counts[kept].sum() == draws
    chi_square = float(((counts[kept] - draws * p) ** 2 / (draws * p)).sum())
    freedom = len(kept) - 1
    # Mean f, variance 2f; five standard deviations, and the seeds are fixed.
    assert chi_square < freedom + 5 * math.sqrt(2 * freedom)


def test_numbers_that_are_made_several_at_a_time_are_those_of_each_position() -> None:
    for seed in (0, 1234, 2**64 - 1):
        several = Uniforms(seed)
        asked = [*range(2 * Uniforms.AT_ONCE + 1), 5, 1000, 999, 2**31]
        assert [several.at(drawn) for drawn in asked] == [uniform(seed, drawn) for drawn in asked]


def test_the_positions_of_one_seed_draw_independent_uniform_numbers() -> None:
    u = np.array([uniform(1234, drawn) for drawn in range(20_000)])
    assert u.min() >= 0.0
    assert u.max() < 1.0
    counts = np.histogram2d(u[:-1], u[1:], bins=8, range=[[0, 1], [0, 1]])[0]
    expected = (len(u) - 1) / 64
    assert float(((counts - expected) ** 2 / expected).sum()) < 63 + 5 * math.sqrt(126)


def test_the_largest_seed_of_the_contract_is_accepted() -> None:
    assert uniform(2**64 - 1, 0) != uniform(0, 0)


def test_a_row_draws_the_same_tokens_alone_and_in_any_batch() -> None:
    params = [
        SamplingParams(temperature=0.9),
        SamplingParams(),
        SamplingParams(temperature=1.3, top_p=0.95),
        SamplingParams(temperature=0.8, top_k=30, repetition_penalty=1.2),
        SamplingParams(temperature=1.0, min_p=0.05, logprobs=2),
        SamplingParams(temperature=5.0, top_p=0.99),
    ]
    rows = [row(p, seed=100 + i, prompt=(1, 2, 3), output=tuple(range(i))) for i, p in enumerate(params)]
    logits = logits_like_a_model(len(rows))
    together = sample(logits, rows)
    alone = [sample(logits[i : i + 1], [rows[i]])[0] for i in range(len(rows))]
    backwards = sample(logits.flip(0), rows[::-1])[::-1]
    assert [s.id for s in together] == [s.id for s in alone] == [s.id for s in backwards]


def test_a_growing_output_moves_the_draw() -> None:
    output: list[int] = []
    grown = SamplingRow(SamplingParams(temperature=1.0), 5, (1,), output)
    logits = torch.zeros(1, VOCAB)
    for _ in range(6):
        output.append(sample(logits, [grown])[0].id)
    assert len(set(output)) == 6
    assert output == [int(uniform(5, i) * VOCAB) for i in range(6)]


@pytest.mark.parametrize("vocab", [1, 255, 256, 257, 1000])
def test_the_inverse_of_the_cdf_never_lands_on_a_token_without_mass(vocab: int) -> None:
    mass = torch.zeros(3, vocab)
    mass[:, vocab // 2] = 0.3
    mass[1, 0] = 1e-7
    mass[2, -1] = 1e-7
    for u in (0.0, 0.5, 1 - 2.0**-53):
        ids = _invert_cdf(mass, torch.full((3,), u, dtype=torch.float64))
        assert (mass.gather(-1, ids[:, None]) > 0).all()


def test_a_temperature_too_small_for_float32_is_greedy() -> None:
    logits = logits_like_a_model(1)
    assert sample(logits, [row(SamplingParams(temperature=1e-300))])[0].id == int(logits.argmax())


def test_logprobs_are_those_of_the_model_before_penalties_and_temperature() -> None:
    logits = logits_like_a_model(3)
    exact = logits.double().log_softmax(-1)
    params = SamplingParams(temperature=2.0, top_k=50, repetition_penalty=1.5, logprobs=4)
    got = sample(
        logits, [row(params, prompt=(1, 2), output=(3,)), row(SamplingParams(logprobs=0)), row(SamplingParams())]
    )
    assert got[0].logprob == pytest.approx(float(exact[0, got[0].id]), abs=1e-5)
    assert [id for id, _ in got[0].top_logprobs] == exact[0].topk(4).indices.tolist()
    assert [value for _, value in got[0].top_logprobs] == pytest.approx(exact[0].topk(4).values.tolist(), abs=1e-5)
    assert got[1].logprob == pytest.approx(float(exact[1].max()), abs=1e-5)
    assert got[1].top_logprobs == ()
    assert (got[2].logprob, got[2].top_logprobs) == (None, ())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("params", [SamplingParams(), SamplingParams(temperature=1.0, top_p=0.9, logprobs=1)])
def test_a_row_without_a_distribution_is_marked_and_its_neighbour_is_not_touched(
    bad: float, params: SamplingParams
) -> None:
    logits = logits_like_a_model(2)
    alone = sample(logits[1:], [row(params, seed=1)])
    logits[0, 17] = bad
    got = sample(logits, [row(params), row(params, seed=1)])
    assert got[0].id == NOT_FINITE
    assert got[0].logprob is None
    assert got[1].id == alone[0].id


def test_a_bias_is_added_before_penalties_and_not_to_logprobs() -> None:
    logits = logits_like_a_model(3)
    biased = SamplingParams(logit_bias=((5, 40.0), (9, -100.0)), repetition_penalty=2.0, logprobs=0)
    rows = [row(SamplingParams()), row(biased, output=(5,)), row(SamplingParams(logit_bias=((7, 30.0),)))]
    drawn = sample(logits, rows)
    wanted = logits.double().numpy().copy()
    wanted[1, 5] += 40.0
    wanted[1, 9] -= 100.0
    wanted[2, 7] += 30.0
    wanted[1] = reference_penalties(wanted[1], rows[1])
    assert [choice.id for choice in drawn] == wanted.argmax(-1).tolist()
    assert drawn[1].logprob == pytest.approx(float(torch.log_softmax(logits[1], 0)[drawn[1].id]), abs=1e-5)


def test_end_tokens_are_not_drawn_before_the_least_number_of_tokens() -> None:
    logits = torch.zeros(2, 50)
    logits[:, 7] = 5.0
    params = SamplingParams()
    early, late = SamplingRow(params, 0, (), (1,), (7,), 2), SamplingRow(params, 0, (), (1, 2), (7,), 2)
    assert [choice.id for choice in sample(logits, [early, late])] == [0, 7]

"""Counting, quantiles, references and drift, against numpy; on a CPU and as it runs elsewhere."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from patchclamp_server.errors import InvalidArgument
from patchclamp_server.monitoring.accumulator import Accumulator, Sums
from patchclamp_server.monitoring.arrays import floor32
from patchclamp_server.monitoring.drift import drift_of
from patchclamp_server.monitoring.outliers import Outliers
from patchclamp_server.monitoring.reference import BINS, LEVELS, MAX_KEPT, Recording, Reference
from patchclamp_server.monitoring.ring import Columns
from patchclamp_server.monitoring.scale import Scale, Source
from patchclamp_server.monitoring.statistics import Statistics

ROWS, ITEMS = 300, 7
BUCKETS = (-1.0, -0.1, 0.0, 0.1, 1.0)
KIND_BUCKETS, KIND_OF = (BUCKETS, (0.0, 0.5)), np.array([0, 0, 1, 0, 0, 1, 0])
CPU = torch.device("cpu")


def values(seed: int = 0, rows: int = ROWS) -> NDArray[np.float32]:
    """With values on the edges of buckets, and some that are not finite."""
    drawn = np.random.default_rng(seed).normal(size=(rows, ITEMS)).astype(np.float32)
    drawn[::7, 1] = np.float32(0.1)
    drawn[::5, 2] = 0.0
    drawn[3, 3], drawn[4, 3], drawn[5, 3] = np.nan, np.inf, -np.inf
    drawn[:, 4] = np.nan
    return drawn


def accumulator(kind: str, thresholds: NDArray[np.float64]) -> Accumulator:
    """Items of two kinds, with buckets of their own."""
    scale = Scale(thresholds, KIND_BUCKETS, Source.CHOSEN)
    return Accumulator(scale, Outliers.none(ITEMS), KIND_OF, CPU, compiled=kind == "compiled")


def add(own: Accumulator, seen: NDArray[np.float32], rows: NDArray[np.int64], columns: NDArray[np.int64]) -> None:
    own.add(seen if own.compiled else torch.from_numpy(seen), rows, without_norms(columns))


def without_norms(columns: NDArray[np.int64]) -> Columns:
    return Columns.of(columns, columns[:0], np.full(len(columns), -1))


def assert_counts(found: Sums, seen: NDArray[np.float32], thresholds: NDArray[np.float64], edges: NDArray) -> None:  # type: ignore[type-arg]
    for item, own in enumerate(seen.T.astype(np.float64)):
        good = own[np.isfinite(own)]
        assert found.tokens[item] == len(good)
        assert found.not_finite[item] == len(own) - len(good)
        assert found.fired[item] == (good > thresholds[item]).sum()
        np.testing.assert_allclose(found.positive[item], good[good > 0].sum(), rtol=1e-12)
        np.testing.assert_allclose(found.negative[item], -good[good < 0].sum(), rtol=1e-12)
        np.testing.assert_allclose(found.total_squares[item], (good**2).sum(), rtol=1e-12)
        assert found.min[item] == min(good, default=np.inf)
        assert found.max[item] == max(good, default=-np.inf)
        places = np.searchsorted(edges[item], good, side="left")
        assert found.histogram[item].tolist() == np.bincount(places, minlength=edges.shape[1] + 1).tolist()
    for kind, bounds in enumerate(KIND_BUCKETS):
        own = seen[:, kind == KIND_OF]
        good = own[np.isfinite(own)].astype(np.float64)
        expected = np.bincount(np.searchsorted(bounds, good, side="left"), minlength=len(BUCKETS) + 1)
        assert found.bucket_counts[kind].tolist() == expected.tolist()


@pytest.mark.parametrize("kind", ["compiled", "operators"])
def test_sums_and_histograms_are_those_of_numpy_over_columns_in_any_order(kind: str) -> None:
    seen, thresholds = values(), np.linspace(-0.5, 0.5, ITEMS)
    # Values of the second item lie next to its threshold, and of the third at it.
    thresholds[1], thresholds[2] = 0.1, 0.0
    columns = np.random.default_rng(1).permutation(ITEMS)
    ring = np.full((ROWS, ITEMS), 99.0, dtype=np.float32)
    ring[:, columns] = seen
    own = accumulator(kind, thresholds)
    for rows in np.array_split(np.arange(ROWS), 4):
        add(own, ring, rows, columns)
    assert_counts(own.read(), seen, thresholds, own.edges)


@pytest.mark.parametrize("kind", ["compiled", "operators"])
def test_new_edges_begin_a_new_histogram_and_leave_the_buckets_as_they_are(kind: str) -> None:
    before, after = values(1), values(2)
    own = accumulator(kind, np.zeros(ITEMS))
    rows, columns = np.arange(ROWS), np.arange(ITEMS)
    add(own, before, rows, columns)
    own.set_edges(np.sort(np.random.default_rng(3).normal(size=(ITEMS, BINS - 1)), axis=1))
    add(own, after, rows, columns)
    both = own.read()
    assert both.bucket_counts.sum() == both.tokens.sum()
    alone = accumulator(kind, np.zeros(ITEMS))
    alone.set_edges(own.edges)
    add(alone, after, rows, columns)
    assert_counts(alone.read(), after, np.zeros(ITEMS), own.edges)
    assert (both.histogram == alone.read().histogram).all()


def test_an_edge_between_two_float32_counts_as_the_number_it_is() -> None:
    """0.1 in float32 is above 0.1."""
    scale, kind_of = Scale(np.array([0.1]), ((0.1,),), Source.CHOSEN), np.zeros(1, dtype=np.int64)
    own = Accumulator(scale, Outliers.none(1), kind_of, CPU, compiled=True)
    own.add(np.array([[0.1]], dtype=np.float32), np.arange(1), without_norms(np.arange(1)))
    found = own.read()
    assert found.fired.tolist() == [1]
    assert found.histogram.tolist() == [[0, 1]]
    assert float(floor32(np.array([0.1]))[0]) < 0.1 < float(np.float32(0.1))


def statistics(seen: NDArray[np.float32], edges: NDArray[np.float64]) -> Statistics:
    n = seen.shape[1]
    scale, kind_of = Scale(np.zeros(n), (BUCKETS,), Source.CHOSEN), np.zeros(n, dtype=np.int64)
    own = Accumulator(scale, Outliers.none(n), kind_of, CPU, compiled=True)
    own.set_edges(edges)
    own.add(seen, np.arange(len(seen)), without_norms(np.arange(n)))
    return Statistics(own.read(), edges, scale, ("neuron",), kind_of, rows=len(seen))


def test_quantiles_are_within_the_bin_of_the_true_ones() -> None:
    seen = np.random.default_rng(0).normal(size=(4000, 2)).astype(np.float32)
    edges = np.tile(np.linspace(-3, 3, 61), (2, 1))
    found = statistics(seen, edges).quantiles((0.0, 0.05, 0.5, 0.95, 0.99, 1.0))
    expected = np.quantile(seen.astype(np.float64), (0.0, 0.05, 0.5, 0.95, 0.99, 1.0), axis=0).T
    assert np.abs(found - expected).max() <= 0.1
    assert (found[:, [0, -1]] == expected[:, [0, -1]]).all()


def test_what_has_seen_nothing_has_no_quantiles_and_no_mean() -> None:
    found = statistics(np.full((5, 1), np.nan, dtype=np.float32), np.zeros((1, 1)))
    assert np.isnan(found.quantiles((0.5,))).all()
    assert found.mean.tolist() == found.deviation.tolist() == [0.0]
    assert found.sums.not_finite.tolist() == [5]


def recording_of(items: int, tokens: int) -> Recording:
    return Recording(items, tokens, lambda *told: None, lambda reference: None, Outliers.none(items))


def recorded(seen: NDArray[np.float32], tokens: int | None = None, parts: int = 3) -> Reference:
    recording = recording_of(seen.shape[1], tokens or len(seen))
    for part in np.array_split(seen, parts):
        recording.add(part, part[:, :0])
    assert recording.left == 0
    return recording.result()


def test_a_reference_has_sixteen_bins_of_equal_mass() -> None:
    seen = np.random.default_rng(0).normal(size=(1600, 3)).astype(np.float32)
    reference = recorded(seen)
    assert (reference.counts == 100).all()
    np.testing.assert_allclose(reference.mean, seen.mean(axis=0, dtype=np.float64))
    np.testing.assert_allclose(reference.deviation, seen.std(axis=0, dtype=np.float64))


def test_equal_values_and_values_that_are_not_finite_are_counted_where_they_belong() -> None:
    seen = values()
    reference = recorded(seen)
    for item, own in enumerate(seen.T):
        good = own[np.isfinite(own)].astype(np.float64)
        expected = np.bincount(np.searchsorted(reference.edges[item].numpy(), good), minlength=BINS)
        assert reference.counts[item].tolist() == expected.tolist()
    assert reference.counts[4].sum() == 0


def test_a_recording_of_more_than_is_kept_samples_tokens() -> None:
    items = 16
    recording = recording_of(items, 2 * MAX_KEPT // items)
    rng = np.random.default_rng(0)
    # Fewer are kept, so that the test does not have to draw millions.
    kept = recording._kept = recording._kept[:2000]
    for _ in range(20):
        recording.add(rng.normal(size=(1000, items)).astype(np.float32), np.zeros((1000, 0), dtype=np.float32))
    recording.tokens = recording.seen
    result = recording.result()
    assert result.counts.sum(dim=1).tolist() == [len(kept)] * items
    # The median of 2,000 normal numbers: 0.028 of standard error.
    assert float(result.edges[:, 7].abs().max()) < 0.15
    assert float(result.mean.abs().max()) < 0.05


def test_the_sample_of_a_long_recording_is_of_all_of_it() -> None:
    """Of a ramp every part is kept alike: its quantiles are those of the ramp, and not of how it began or ended."""
    tokens, kept = 40_000, 4000
    recording = recording_of(1, tokens)
    recording._kept = recording._kept[:kept]
    ramp = np.linspace(0.0, 1.0, tokens, dtype=np.float32)[:, None]
    for part in np.array_split(ramp, 37):
        recording.add(part, part[:, :0])
    edges = recording.result().edges[0].numpy()
    # The median of 4,000 of them has 0.008 of standard error, the other quantiles less.
    np.testing.assert_allclose(edges, np.arange(1, BINS) / BINS, atol=0.04)


def test_total_variation_is_0_of_equal_shares_1_of_disjoint_ones_and_of_nothing() -> None:
    own = np.array([[1, 1, 0], [5, 0, 0], [0, 0, 0], [2, 2, 0]])
    reference = np.array([[10, 10, 0], [0, 0, 3], [1, 1, 1], [1, 0, 1]])
    found = drift_of(own, reference, np.ones(4))
    assert found.distance.tolist() == [0.0, 1.0, 1.0, 0.5]
    assert found.noise[2] == found.spread[2] == 0.0
    assert found.excess.tolist()[:3] == [0.0, pytest.approx(1.0 - found.noise[1]), 1.0]


@pytest.mark.parametrize("window", [200, 512, 1024, 4096])
def test_two_samples_of_one_distribution_have_no_drift_beyond_their_noise(window: int) -> None:
    """Of many items: normal, mostly 0, and of few values."""
    rng, n_items = np.random.default_rng(window), 300

    def sample() -> NDArray[np.float32]:
        drawn = rng.normal(size=(window, n_items)).astype(np.float32)
        drawn[:, :50] *= rng.random(size=(window, 50)) < 0.2
        drawn[:, 50:80] = rng.integers(0, 3, size=(window, 30))
        return drawn

    def counts(seen: NDArray[np.float32]) -> NDArray[np.int64]:
        edges = zip(seen.T, reference.edges.numpy(), strict=True)
        return np.stack([np.bincount(np.searchsorted(edge, own), minlength=BINS) for own, edge in edges])

    reference = recorded(sample())
    assert reference.inflation is not None
    varies = reference.inflation.numpy()
    assert varies.mean() < 1.1
    found = drift_of(counts(sample()), reference.counts.numpy(), varies)
    assert found.mean > 0.8 * found.mean_noise
    assert found.mean_excess < 0.02
    assert found.max_excess < 0.05
    shifted = sample()
    shifted[:, 7] += 3.0
    shifted[:, 200] += 2.0
    found = drift_of(counts(shifted), reference.counts.numpy(), varies)
    assert found.mean_excess < 0.03
    # Two normal distributions that are two deviations apart: 2 Φ(1) - 1 = 0.68.
    assert 0.68 - found.noise[200] - 0.1 < found.excess[200] < 0.68
    assert found.max_excess > 0.3
    found = drift_of(counts(sample() + np.float32(0.5)), reference.counts.numpy(), varies)
    assert found.mean_excess > 0.1


def test_tokens_that_come_in_equal_runs_have_more_noise_than_independent_ones() -> None:
    """Runs of four: a sample of n tokens tells as much as n / 4."""
    rng = np.random.default_rng(0)

    def sample() -> NDArray[np.float32]:
        return np.repeat(rng.normal(size=(256, 100)).astype(np.float32), 4, axis=0)

    reference = recorded(sample())
    assert reference.inflation is not None
    assert float(reference.inflation.mean()) == pytest.approx(4.0, rel=0.15)
    edges, other = reference.edges.numpy(), sample()
    counts = np.stack([np.bincount(np.searchsorted(edges[i], own), minlength=BINS) for i, own in enumerate(other.T)])
    found = drift_of(counts, reference.counts.numpy(), reference.inflation.numpy())
    assert found.mean_excess < 0.02
    alone = drift_of(counts, reference.counts.numpy(), np.ones(100))
    assert alone.mean_excess > 0.05


def test_a_reference_keeps_quantiles_that_thresholds_follow_from() -> None:
    seen = values(rows=1001)
    levels = recorded(seen).levels
    assert levels is not None
    assert float(levels[0, LEVELS.index(0.5)]) == np.median(seen[:, 0])
    assert levels[0, [0, -1]].tolist() == [seen[:, 0].min(), seen[:, 0].max()]
    good = seen[np.isfinite(seen[:, 3]), 3]
    assert levels[3, [0, -1]].tolist() == [good.min(), good.max()]
    assert levels[4].tolist() == [0.0] * len(LEVELS)


@pytest.mark.parametrize(
    "broken",
    [
        {"edges": torch.zeros(2, 3)},
        {"edges": torch.tensor([[1.0, 0.0, 2.0]] * 2, dtype=torch.float64)},
        {"counts": torch.zeros(2, 3, dtype=torch.int64)},
        {"counts": torch.full((2, 4), -1)},
        {"mean": torch.tensor([0.0, torch.nan], dtype=torch.float64)},
        {"more": torch.zeros(1)},
        {"levels": torch.zeros(2, 3, dtype=torch.float64)},
        {"levels": -torch.arange(26, dtype=torch.float64).view(2, 13)},
        {"inflation": torch.full((2,), 0.5, dtype=torch.float64)},
        {"norms": torch.tensor([1.0, -1.0], dtype=torch.float64)},
        {"norms": torch.ones(2)},
    ],
)
def test_a_stored_reference_that_is_none_is_refused(broken: dict[str, torch.Tensor]) -> None:
    good = Reference(
        torch.zeros(2, 3, dtype=torch.float64),
        torch.zeros(2, 4, dtype=torch.int64),
        torch.zeros(2, dtype=torch.float64),
        torch.zeros(2, dtype=torch.float64),
    ).tensors()
    assert len(Reference.from_tensors(good)) == 2
    with pytest.raises(InvalidArgument):
        Reference.from_tensors({**good, **broken})

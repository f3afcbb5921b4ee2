"""Thresholds and buckets that nobody chose: from a reference, or from the first tokens, and then they stay."""

import numpy as np
import pytest
import torch
from engine_runs import loaded
from numpy.typing import NDArray
from watch_runs import BOTH, Followed, until

from patchclamp_server.errors import ResourceExhausted
from patchclamp_server.model.sites import Site
from patchclamp_server.monitoring.bind import bind_watch
from patchclamp_server.monitoring.items import Encoder, WatchedFeatures, WatchedNeurons, WatchItem
from patchclamp_server.monitoring.reference import Recording, Reference
from patchclamp_server.monitoring.registry import MAX_EXPORTED_ITEMS, WatchRegistry
from patchclamp_server.monitoring.scale import Source, bounds
from patchclamp_server.monitoring.statistics import Statistics
from patchclamp_server.monitoring.step import ServedSpan
from patchclamp_server.monitoring.watch import MAX_BUCKETS, Watch, WatchOptions

INFO, SPEC = loaded("llama").info, loaded("llama").decoder.spec
NEURONS = (3, 0, 17)
FIRST = 256


def watch(**given: float) -> Watch:
    """Three neurons, and two features whose values are those of the first two numbers of the residual stream."""
    encoder = Encoder("encoder_features_by_width", torch.eye(INFO.d_model)[:2])
    items = [WatchItem("n", WatchedNeurons(1, NEURONS), **given), WatchItem("f", WatchedFeatures(encoder, 1))]
    return bind_watch(items, INFO, None, max_items=100)


def registry(compiled: bool = True) -> WatchRegistry:
    return WatchRegistry(SPEC, torch.device("cpu"), max_watches=16, max_items=8192, compiled=compiled)


def options(name: str = "w", **fields: object) -> WatchOptions:
    return WatchOptions(name, **{"phases": BOTH, "calibration_tokens": FIRST, **fields})  # type: ignore[arg-type]


def values(n: int, seed: int = 0) -> NDArray[np.float32]:
    """[n, 20], of a scale that no default would fit: the 99th percentile of neuron 3 is near 562."""
    drawn = np.random.default_rng(seed).normal(size=(n, 20)).astype(np.float32)
    drawn[:, 3] = 300.0 + 112.0 * drawn[:, 3]
    drawn[:, 0] *= np.float32(0.01)
    return drawn


def run(monitor: WatchRegistry, seen: NDArray[np.float32]) -> None:
    n = len(seen)
    step = monitor.begin([ServedSpan(0, 10, [5] * n, 3, prompt_length=12, fresh=0)])
    assert step is not None
    for (site, layer), number in step.layout.places.items():
        activations = torch.zeros(n, SPEC.sites[site])
        if layer == 1:
            activations[:, :20] = torch.from_numpy(seen)
        step.layout.looks.look(number, activations)
    monitor.end(step)


def recorded(seen: NDArray[np.float32]) -> Reference:
    columns = np.stack([seen[:, 3], seen[:, 0], seen[:, 17], *np.maximum(seen[:, :2], 0).T], axis=1)
    recording = Recording(columns.shape[1], len(columns), lambda seen, total: None, lambda reference: None)
    recording.add(columns)
    return recording.result()


def assert_counted(found: Statistics, seen: NDArray[np.float32]) -> None:
    """All tokens by the thresholds and buckets in use."""
    columns = np.stack([seen[:, 3], seen[:, 0], seen[:, 17], *np.maximum(seen[:, :2], 0).T], axis=1)
    assert found.rows == len(columns)
    assert found.sums.fired.tolist() == (columns > found.scale.thresholds).sum(axis=0).tolist()
    np.testing.assert_allclose(found.total, columns.sum(axis=0, dtype=np.float64), rtol=1e-5)
    for kind, own in zip(found.kinds(), (columns[:, :3], columns[:, 3:]), strict=True):
        places = np.searchsorted(kind.buckets, own.astype(np.float64).reshape(-1), side="left")
        assert kind.bucket_counts.tolist() == np.bincount(places, minlength=len(kind.buckets) + 1).tolist()


@pytest.mark.parametrize("compiled", [True, False])
def test_thresholds_and_buckets_follow_from_the_first_tokens_and_then_stay(compiled: bool) -> None:
    monitor = registry(compiled)
    monitor.start("sha256:w", watch(), options())
    seen = [values(100, 1), values(100, 2)]
    for each in seen:
        run(monitor, each)
    early = monitor.statistics("w")
    assert (early.calibrating, early.calibrated, early.calibration) == (True, 200, FIRST)
    assert_counted(early, np.concatenate(seen))
    seen.append(values(100, 3))
    run(monitor, seen[-1])
    settled = monitor.statistics("w")
    assert (settled.calibrating, settled.calibrated, settled.scale.source) == (False, FIRST, Source.FIRST_TOKENS)
    first = np.concatenate(seen)[:FIRST]
    np.testing.assert_allclose(
        settled.scale.thresholds[:3], np.quantile(first[:, list(NEURONS)], 0.99, axis=0), rtol=1e-6
    )
    assert settled.scale.thresholds[3:].tolist() == [0.0, 0.0]
    assert_counted(settled, np.concatenate(seen))
    seen.append(10.0 * values(300, 4))
    run(monitor, seen[-1])
    later = monitor.statistics("w")
    assert later.scale is settled.scale
    assert_counted(later, np.concatenate(seen))


def test_a_neuron_fires_as_often_as_its_quantile_says() -> None:
    monitor = registry()
    monitor.start("sha256:w", watch(quantile=0.9), options(calibration_tokens=1024))
    for seed in range(20):
        run(monitor, values(500, seed))
    shares = monitor.statistics("w").sums.fired[:3] / 10_000
    assert np.abs(shares - 0.1).max() < 0.03


def test_buckets_reach_beyond_the_values_that_they_come_from() -> None:
    """A histogram shows nothing above its last bound: there the dashboard showed 100 of what was 1137."""
    monitor = registry()
    monitor.start("sha256:w", watch(), options())
    run(monitor, values(FIRST))
    neurons, features = monitor.statistics("w").kinds()
    assert (neurons.name, features.name) == ("neuron", "feature")
    assert 600 < neurons.buckets[-1] < 6000
    assert neurons.buckets[0] < neurons.min
    assert features.buckets[0] == 0.0
    assert features.buckets[-1] < neurons.buckets[-1]


@pytest.mark.parametrize(
    "seen",
    [
        np.zeros((0, 2)),
        np.full((5, 2), np.nan),
        np.zeros((50, 1)),
        np.full((9, 1), 1137.0),
        np.geomspace(1e-6, 1e6, 999),
    ],
)
def test_bounds_are_ascending_finite_and_not_too_many_whatever_they_come_from(seen: NDArray[np.float64]) -> None:
    found = bounds(seen)
    assert 1 <= len(found) <= MAX_BUCKETS
    assert list(found) == sorted(set(found))
    assert np.isfinite(found).all()


def test_with_a_reference_they_follow_from_it_at_once() -> None:
    usual = values(2000, 7)
    monitor = registry()
    monitor.start("sha256:w", watch(), options(), recorded(usual), "sha256:r")
    run(monitor, values(3))
    found = monitor.statistics("w")
    assert (found.calibrating, found.calibration, found.scale.source) == (False, 0, Source.REFERENCE)
    expected = np.quantile(usual[:, list(NEURONS)], 0.99, axis=0)
    np.testing.assert_allclose(found.scale.thresholds[:3], expected, rtol=0.02)
    assert found.kinds()[0].buckets[-1] > usual[:, 3].max()


def test_a_reference_that_comes_while_the_first_tokens_are_seen_settles_them() -> None:
    usual = values(2000, 7)
    monitor = registry()
    monitor.start("sha256:w", watch(), options(window_tokens=10))
    seen = [values(40, 1)]
    run(monitor, seen[-1])
    monitor.set_reference("w", recorded(usual), "sha256:r")
    seen.append(values(30, 2))
    run(monitor, seen[-1])
    found = monitor.statistics("w")
    assert (found.calibrating, found.scale.source) == (False, Source.REFERENCE)
    assert found.rows == 70
    assert found.sums.fired.tolist()[3:] == (np.concatenate(seen)[:, :2] > 0).sum(axis=0).tolist()
    assert found.drift is not None
    # Each token is in the buckets, those before the reference too.
    assert [int(kind.bucket_counts.sum()) for kind in found.kinds()] == [3 * 70, 2 * 70]


def test_a_reference_without_quantiles_leaves_them_to_the_first_tokens() -> None:
    new = recorded(values(2000, 7))
    old = Reference(new.edges, new.counts, new.mean, new.deviation)
    monitor = registry()
    monitor.start("sha256:w", watch(), options(window_tokens=100), old, "sha256:r")
    run(monitor, values(200))
    assert monitor.statistics("w").calibrating
    run(monitor, values(200))
    found = monitor.statistics("w")
    assert (found.calibrating, found.scale.source) == (False, Source.FIRST_TOKENS)
    assert found.drift is not None
    assert monitor.get("w").reference_id == "sha256:r"


def test_what_was_all_chosen_is_derived_from_nothing() -> None:
    monitor = registry()
    monitor.start("sha256:w", watch(threshold=562.0), options(buckets=(0.0, 500.0)))
    run(monitor, values(5))
    found = monitor.statistics("w")
    assert (found.calibrating, found.scale.source) == (False, Source.CHOSEN)
    assert found.scale.thresholds.tolist() == [562.0] * 3 + [0.0] * 2
    assert {kind.buckets for kind in found.kinds()} == {(0.0, 500.0)}


def test_followers_are_told_of_nothing_above_a_threshold_that_is_not_known_yet() -> None:
    monitor = registry()
    monitor.start("sha256:w", watch(), options())
    followed = Followed(watch())
    monitor.subscribe("w", (0, 1, 2), None, followed)
    run(monitor, values(100))
    assert not followed.values
    run(monitor, values(FIRST, 1))
    thresholds = monitor.statistics("w").scale.thresholds[:3]
    expected = (values(FIRST, 1)[:, list(NEURONS)] > thresholds).sum()
    assert sum(int(np.isfinite(row).sum()) for row in followed.values.values()) == expected > 0


def test_sums_of_positive_and_of_negative_values_never_fall() -> None:
    """They are counters, also from the first tokens to the rest."""
    monitor = registry()
    monitor.start("sha256:w", watch(), options(calibration_tokens=64))
    last = np.zeros((2, 5))
    for seed in range(60):
        run(monitor, values(3, seed))
        sums = monitor.statistics("w").sums
        now = np.stack((sums.positive, sums.negative))
        assert (now >= last).all()
        last = now
    assert (last[:, 1:3] > 0).all()


def test_items_with_series_of_their_own_are_capped_for_all_watches_together() -> None:
    monitor = registry()
    many = bind_watch([WatchItem("n", WatchedNeurons(1, tuple(range(40))))], INFO, None, max_items=8192)
    for i in range(MAX_EXPORTED_ITEMS // 40):
        monitor.start("sha256:w", many, options(f"w{i}", export_items=True))
    with pytest.raises(ResourceExhausted, match="export_items: 280 items"):
        monitor.start("sha256:w", many, options("more", export_items=True))
    monitor.start("sha256:w", many, options("more"))


def test_a_recording_of_a_watch_that_calibrates_sees_the_same_tokens() -> None:
    monitor = registry()
    monitor.start("sha256:w", watch(), options())
    done: list[Reference | None] = []
    monitor.record_reference("w", 50, lambda seen, total: None, done.append)
    run(monitor, values(60))
    until(lambda: bool(done))
    assert done[0] is not None
    np.testing.assert_allclose(float(done[0].mean[0]), values(60)[:50, 3].mean(dtype=np.float64), rtol=1e-6)
    assert SPEC.sites[Site.MLP_POST] > 20

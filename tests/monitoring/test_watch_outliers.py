"""Tokens whose norm is an outlier are in no figure of a watch, of a reference and of drift, and are counted."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from engine_runs import loaded
from numpy.typing import NDArray
from watch_runs import BOTH, EVERYTHING, Followed, until

from patchclamp_server.artifacts.head_sets import Head, HeadSelection
from patchclamp_server.interventions.program import Vector
from patchclamp_server.model.sites import Site
from patchclamp_server.monitoring.accumulator import Accumulator
from patchclamp_server.monitoring.bind import bind_watch
from patchclamp_server.monitoring.items import WatchedDirection, WatchedHeads, WatchedNeurons, WatchItem
from patchclamp_server.monitoring.outliers import Outliers
from patchclamp_server.monitoring.reference import Reference
from patchclamp_server.monitoring.registry import WatchRegistry
from patchclamp_server.monitoring.ring import Columns
from patchclamp_server.monitoring.scale import Scale, Source
from patchclamp_server.monitoring.step import ServedSpan
from patchclamp_server.monitoring.watch import Watch, WatchOptions

INFO, SPEC = loaded("llama").info, loaded("llama").decoder.spec
CPU = torch.device("cpu")
FIRST = 100
EXECUTORS = pytest.mark.parametrize("compiled", [True, False])


def watch(**given: float) -> Watch:
    """The first number of the residual stream at layer 1, the first at layer 2, a neuron at layer 1, and a head."""
    axis = Vector(values=torch.eye(INFO.d_model)[0])
    items = [
        WatchItem("d", WatchedDirection(axis, Site.RESID_POST, (1, 2)), **given),
        WatchItem("n", WatchedNeurons(1, (0,)), **given),
        WatchItem("h", WatchedHeads(HeadSelection((Head(1, 0),))), **given),
    ]
    return bind_watch(items, INFO, None, max_items=4)


def registry(compiled: bool = True) -> WatchRegistry:
    return WatchRegistry(SPEC, CPU, max_watches=16, max_items=8192, compiled=compiled)


def options(name: str = "w", **fields: object) -> WatchOptions:
    return WatchOptions(name, **{"phases": BOTH, "calibration_tokens": FIRST, **fields})  # type: ignore[arg-type]


def activations(n: int, sinks: Sequence[int] = (), seed: int = 0) -> NDArray[np.float32]:
    """[n, d_model] of nearly equal norms, but for the tokens `sinks`, whose norm and first number are twenty times as
    large."""
    drawn = np.random.default_rng(seed).normal(size=(n, SPEC.d_model)).astype(np.float32)
    drawn *= (SPEC.d_model**0.5 / np.linalg.norm(drawn, axis=1))[:, None]
    drawn[list(sinks)] *= np.float32(20.0)
    return drawn


def run(monitor: WatchRegistry, seen: NDArray[np.float32], step: int = 8) -> None:
    """Tokens whose residual stream at layer 1 is `seen`; at layer 2 it is the same without its sinks, and so is the
    first number of all neurons and heads."""
    for part in np.array_split(seen, -(-len(seen) // step)):
        begun = monitor.begin([ServedSpan(0, 10, [5] * len(part), 3, prompt_length=12, fresh=0)])
        assert begun is not None
        rows = torch.from_numpy(part)
        without_sinks = rows * (SPEC.d_model**0.5 / rows.norm(dim=1, keepdim=True))
        for (site, layer), number in begun.layout.places.items():
            x = torch.ones(len(rows), SPEC.sites[site])
            x[:, : SPEC.d_model] = rows if (site, layer) == (Site.RESID_POST, 1) else without_sinks
            begun.layout.looks.look(number, x)
        for number in begun.layout.heads_off_sink.values():
            begun.layout.looks.look(number, without_sinks[:, : SPEC.n_heads].contiguous())
        monitor.end(begun)


def recorded(monitor: WatchRegistry, seen: NDArray[np.float32], name: str = "w") -> Reference:
    done: list[Reference | None] = []
    monitor.record_reference(name, len(seen), lambda told, total: None, done.append)
    run(monitor, seen)
    until(lambda: bool(done))
    assert done[0] is not None
    return done[0]


@EXECUTORS
@pytest.mark.parametrize("first", [FIRST, 1000])
def test_figures_are_those_of_the_other_tokens(compiled: bool, first: int) -> None:
    """Also of those before it is known what an outlier is, the very first token among them, and while it is not."""
    sinks = (0, 1, 30, 55, 99, 130, 260, 299)
    seen = activations(300, sinks)
    monitor = registry(compiled)
    monitor.start("sha256:w", watch(quantile=0.9), options(calibration_tokens=first))
    run(monitor, seen[:40])
    assert monitor.statistics("w").calibrating
    run(monitor, seen[40:])
    found = monitor.statistics("w")
    ordinary = np.delete(seen, sinks, axis=0)[:, 0].astype(np.float64)
    assert found.mean[0] == pytest.approx(ordinary.mean(), abs=1e-6)
    assert found.deviation[0] == pytest.approx(ordinary.std(), rel=1e-5)
    assert (found.sums.min[0], found.sums.max[0]) == (ordinary.min(), ordinary.max())
    assert np.abs(found.quantiles((0.05, 0.5, 0.99))[0] - np.quantile(ordinary, (0.05, 0.5, 0.99))).max() < 0.3
    of_first = np.delete(seen[:first], [sink for sink in sinks if sink < first], axis=0)[:, 0]
    assert found.scale.thresholds[0] == pytest.approx(np.quantile(of_first, 0.9), rel=1e-5)
    assert found.sums.fired[0] == (ordinary > found.scale.thresholds[0]).sum()
    # Each place has its own norms, and a head has none.
    assert found.sums.left_out.tolist() == [len(sinks), 0, 0, 0]
    assert found.tokens.tolist() == [300 - len(sinks), 300, 300, 300]
    direction, neuron, head = {kind.name: kind.left_out for kind in found.kinds()}.values()
    assert (direction, neuron, head) == (0, len(sinks), 0)


def test_what_is_left_out_does_not_depend_on_when_somebody_reads() -> None:
    read, unread = registry(), registry()
    seen = activations(150, (0, 3, 4, 77, 120))
    for monitor in (read, unread):
        monitor.start("sha256:w", watch(), options())
    for part in np.array_split(seen, 30):
        run(read, part)
        read.statistics("w")
    run(unread, seen)
    one, other = read.statistics("w"), unread.statistics("w")
    assert one.sums.left_out.tolist() == other.sums.left_out.tolist() == [5, 0, 0, 0]
    assert one.sums.histogram.tolist() == other.sums.histogram.tolist()


def test_an_outlier_is_no_event() -> None:
    """While it is not known yet what one is, the tokens seen so far say it."""
    monitor = registry()
    monitor.start("sha256:w", watch(threshold=0.0), options())
    followed = Followed(watch())
    seen = activations(150, (7, 20, 120))
    monitor.subscribe("w", (), EVERYTHING, followed)
    for i in range(0, 150, 10):
        followed.values.clear()
        run(monitor, seen[i : i + 10], step=10)
        told = [bool(np.isfinite(row[0])) for row in followed.of(3).values()]
        assert told == [i + j not in (7, 20, 120) for j in range(10)]
        assert all(np.isfinite(row[1:]).all() for row in followed.of(3).values())


@EXECUTORS
def test_a_reference_holds_no_outliers_and_a_watch_with_it_knows_them_at_once(compiled: bool) -> None:
    monitor = registry(compiled)
    monitor.start("sha256:w", watch(), options())
    run(monitor, activations(150, seed=1))
    sinks = (0, 50, 51)
    seen = activations(200, sinks, seed=2)
    reference = recorded(monitor, seen)
    ordinary = np.delete(seen, sinks, axis=0)[:, 0]
    assert float(reference.mean[0]) == pytest.approx(float(ordinary.mean(dtype=np.float64)), abs=1e-6)
    assert float(reference.deviation[0]) == pytest.approx(float(ordinary.std(dtype=np.float64)), rel=1e-5)
    assert reference.counts.sum(dim=1).tolist() == [197, 200, 200, 200]
    stored = Reference.from_tensors(reference.tensors())
    assert stored.norms is not None
    assert stored.norms[0] == pytest.approx(SPEC.d_model**0.5, rel=1e-4)
    assert stored.norms[3] == 0.0
    replica = registry(compiled)
    replica.start("sha256:w", watch(), options(), stored, "sha256:r")
    run(replica, activations(1, (0,)))
    found = replica.statistics("w")
    assert not found.calibrating
    assert found.sums.left_out.tolist() == [1, 0, 0, 0]


@EXECUTORS
def test_outliers_on_both_sides_are_no_drift(compiled: bool) -> None:
    """However many there are: of 512 tokens one in a hundred in the reference, and one in five in the window."""
    monitor = registry(compiled)
    monitor.start("sha256:w", watch(), options(window_tokens=512))
    reference = recorded(monitor, activations(512, range(0, 512, 100), seed=1))
    monitor.set_reference("w", reference, "sha256:r")
    run(monitor, activations(512, range(0, 512, 5), seed=2))
    same = monitor.statistics("w").drift
    assert same is not None
    assert same.excess[0] < 0.05
    shifted = activations(512, range(0, 512, 5), seed=3)
    shifted[:, 0] += 3.0
    run(monitor, shifted)
    found = monitor.statistics("w")
    assert found.drift is not None
    assert found.drift.excess[0] > 0.5
    assert found.sums.left_out[0] == 6 + 2 * 103


@pytest.mark.parametrize("tokens", [60, 300])
def test_a_reference_is_recorded_from_the_first_tokens_on(tokens: int) -> None:
    """It may be complete before the watch knows what an outlier is, or after."""
    monitor = registry()
    monitor.start("sha256:w", watch(), options())
    run(monitor, activations(10, (3,)))
    seen = activations(tokens, (0, 40), seed=2)
    reference = recorded(monitor, seen)
    ordinary = np.delete(seen, (0, 40), axis=0)[:, 0]
    assert float(reference.mean[0]) == pytest.approx(float(ordinary.mean(dtype=np.float64)), abs=1e-6)
    assert reference.counts[0].sum() == tokens - 2


@EXECUTORS
def test_beside_a_reference_that_holds_outliers_none_are_left_out(compiled: bool) -> None:
    """It was recorded before any were, and the window is counted in the same way."""
    monitor = registry(compiled)
    monitor.start("sha256:w", watch(), options())
    new = recorded(monitor, activations(200, seed=1))
    old = Reference(new.edges, new.counts, new.mean, new.deviation, new.levels, new.inflation)
    monitor.set_reference("w", old, "sha256:old")
    monitor.start("sha256:w", watch(), options("other"), old, "sha256:old")
    run(monitor, activations(20, (0, 5)))
    for name in ("w", "other"):
        assert monitor.statistics(name).sums.left_out.tolist() == [0, 0, 0, 0]
    monitor.set_reference("w", new, "sha256:new")
    run(monitor, activations(20, (0, 5)))
    assert monitor.statistics("w").sums.left_out.tolist() == [2, 0, 0, 0]


@pytest.mark.parametrize("tokens", [60, 300])
def test_a_reference_that_is_recorded_beside_an_old_one_holds_no_outliers(tokens: int) -> None:
    """So that the old one can be replaced while its watch runs."""
    monitor = registry()
    monitor.start("sha256:w", watch(), options())
    new = recorded(monitor, activations(200, seed=1))
    old = Reference(new.edges, new.counts, new.mean, new.deviation, new.levels, new.inflation)
    monitor.start("sha256:w", watch(), options("beside"), old, "sha256:old")
    seen = activations(tokens, (0, 40), seed=2)
    reference = recorded(monitor, seen, "beside")
    assert reference.counts[0].sum() == tokens - 2
    monitor.set_reference("beside", reference, "sha256:new")
    run(monitor, activations(20, (0, 5)))
    assert monitor.statistics("beside").sums.left_out.tolist() == [2, 0, 0, 0]


def test_norms_that_a_file_gives_to_heads_are_not_looked_at() -> None:
    monitor = registry()
    monitor.start("sha256:w", watch(), options())
    new = recorded(monitor, activations(200, seed=1))
    assert new.norms is not None
    norms = new.norms.clone()
    norms[3] = 1e-3
    given = Reference(new.edges, new.counts, new.mean, new.deviation, new.levels, new.inflation, norms)
    monitor.set_reference("w", given, "sha256:r")
    run(monitor, activations(20))
    assert monitor.statistics("w").tokens[3] == 220


@EXECUTORS
def test_items_in_any_order_are_judged_each_by_its_own_norm(compiled: bool) -> None:
    """Against numpy: two places, and an item without one."""
    rng = np.random.default_rng(0)
    ring = rng.normal(size=(200, 8)).astype(np.float32)
    ring[:, 6:] = rng.choice([0.5, 1.0, 3.0, 3.5, np.inf, np.nan], size=(200, 2))
    items, place_of = np.array([4, 0, 5, 1, 3, 2]), np.array([0, 1, 0, -1, 1, 1])
    outliers = Outliers(np.array([1.0, 1.0, 1.0, 0.0, 1.0, 0.2]), place_of)
    scale, kind_of = Scale(np.zeros(6), ((0.0,),), Source.CHOSEN), np.zeros(6, dtype=np.int64)
    own = Accumulator(scale, outliers, kind_of, CPU, compiled=compiled)
    for rows in np.array_split(np.arange(200), 3):
        columns = Columns.of(items, np.array([6, 7]), place_of)
        own.add(ring if compiled else torch.from_numpy(ring), rows, columns)
    found = own.read()
    for item, (column, place) in enumerate(zip(items.tolist(), place_of.tolist(), strict=True)):
        norms = ring[:, 6 + place] if place >= 0 else np.zeros(200)
        out = (norms > 3.0 * outliers.norms[item]) & np.isfinite(norms) & (outliers.norms[item] > 0)
        kept = ring[~out, column].astype(np.float64)
        assert (found.left_out[item], found.tokens[item]) == (out.sum(), len(kept))
        assert found.fired[item] == (kept > 0).sum()
        assert found.max[item] == kept.max()
        assert found.positive[item] == pytest.approx(np.maximum(kept, 0).sum())
        assert np.isnan(outliers.without(ring[:, items], ring[:, 6:])[:, item]).sum() == out.sum()


def test_a_norm_that_is_not_finite_is_a_fault_and_no_outlier() -> None:
    seen = activations(120)
    seen[[3, 110]] = np.nan
    monitor = registry()
    monitor.start("sha256:w", watch(), options())
    run(monitor, seen)
    found = monitor.statistics("w")
    assert (found.sums.not_finite[0], found.sums.left_out[0]) == (2, 0)


def test_where_most_rows_are_zero_nothing_is_an_outlier() -> None:
    monitor = registry()
    monitor.start("sha256:w", watch(), options())
    seen = activations(120)
    seen[:100] *= np.float32(1e-30)
    run(monitor, np.where(np.arange(120)[:, None] < 100, np.float32(0.0), seen))
    assert monitor.statistics("w").sums.left_out[0] == 0

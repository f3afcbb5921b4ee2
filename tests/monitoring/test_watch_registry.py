"""Running watches: starting, stopping, reading and following them while requests run; drift; caps."""

import threading

import numpy as np
import pytest
import torch
from engine_runs import Bench, Job, loaded
from numpy.typing import NDArray
from patience import PATIENCE_SECONDS
from programs import numbers, prompt
from watch_runs import BOTH, EVERYTHING, Followed, follow, neurons_watch, until, watch_of_everything

from patchclamp_server.engine.config import EngineConfig
from patchclamp_server.errors import FailedPrecondition, InvalidArgument, NotFound, ResourceExhausted, Unavailable
from patchclamp_server.interventions.program import AddVector, Edit, Program, Vector
from patchclamp_server.model.sites import Site
from patchclamp_server.monitoring.activations import MAX_BATCH, Activations
from patchclamp_server.monitoring.reference import Reference
from patchclamp_server.monitoring.registry import WatchRegistry
from patchclamp_server.monitoring.step import ServedSpan, StepWatch
from patchclamp_server.monitoring.watch import WatchOptions

SPEC = loaded("llama").decoder.spec
CPU = torch.device("cpu")


def registry(max_watches: int = 16, max_items: int = 8192) -> WatchRegistry:
    return WatchRegistry(SPEC, CPU, max_watches=max_watches, max_items=max_items)


def options(name: str = "w", **fields: object) -> WatchOptions:
    return WatchOptions(name, **{"phases": BOTH, **fields})  # type: ignore[arg-type]


def begin(monitor: WatchRegistry, values: NDArray[np.float32], layer: int = 1) -> StepWatch | None:
    """A step of one sequence, whose neurons at the layer are `values` [n, at most d_ff], and 0 at others."""
    n = len(values)
    step = monitor.begin([ServedSpan(0, 10, [5] * n, 3, prompt_length=12, fresh=0)])
    if step is not None:
        for (site, at), number in step.layout.places.items():
            activations = torch.zeros(n, SPEC.sites[site])
            if (site, at) == (Site.MLP_POST, layer):
                activations[:, : values.shape[1]] = torch.from_numpy(values)
            step.layout.looks.look(number, activations)
    return step


def run(monitor: WatchRegistry, values: NDArray[np.float32]) -> None:
    step = begin(monitor, values)
    assert step is not None
    monitor.end(step)


def normal(n: int, seed: int = 0, shift: float = 0.0) -> NDArray[np.float32]:
    return (np.random.default_rng(seed).normal(size=(n, 20)) + shift).astype(np.float32)


def test_what_is_read_is_complete_whenever_it_is_read() -> None:
    """More steps than a ring has rows, and one with more rows than it has."""
    monitor = registry()
    monitor.start("sha256:w", neurons_watch(neurons=(3, 0, 17)), options())
    seen = []
    for i, n in enumerate([1] * 70 + [3, 40, 300, 1, 90] + [1] * 70):
        seen.append(normal(n, i))
        run(monitor, seen[-1])
        if i % 17 == 0:
            assert monitor.statistics("w").rows == sum(map(len, seen))
    values = np.concatenate(seen)[:, [3, 0, 17]].astype(np.float64)
    found = monitor.statistics("w")
    assert found.tokens.tolist() == [len(values)] * 3
    np.testing.assert_allclose(found.total, values.sum(axis=0))
    assert found.sums.max.tolist() == values.max(axis=0).tolist()
    assert monitor.get("w").tokens == len(values)


def test_a_step_that_fails_is_not_counted() -> None:
    monitor = registry()
    monitor.start("sha256:w", neurons_watch(), options())
    begin(monitor, normal(4))
    run(monitor, normal(2))
    assert monitor.statistics("w").rows == 2


def test_watches_that_start_and_stop_during_a_step_do_not_lose_it_for_the_others() -> None:
    monitor = registry()
    monitor.start("sha256:w", neurons_watch(), options("stays"))
    monitor.start("sha256:w", neurons_watch(), options("goes"))
    run(monitor, normal(2))
    step = begin(monitor, normal(3))
    monitor.start("sha256:w", neurons_watch(layer=2), options("comes"))
    assert monitor.stop("goes").tokens == 2
    assert step is not None
    monitor.end(step)
    assert {own.name: own.tokens for own in monitor.running()} == {"stays": 5, "comes": 0}


def test_two_watches_of_one_neuron_count_it_by_their_own_thresholds() -> None:
    monitor = registry()
    monitor.start("sha256:a", neurons_watch(neurons=(3,)), options("a"))
    monitor.start("sha256:b", watch_of_everything("llama"), options("b", sampling_rate=0.5))
    monitor.start("sha256:c", neurons_watch(neurons=(5, 3)), options("c"))
    values = normal(50)
    run(monitor, values)
    assert monitor.statistics("a").sums.fired.tolist() == [(values[:, 3] > 0).sum()]
    assert monitor.statistics("c").sums.fired.tolist() == [(values[:, 5] > 0).sum(), (values[:, 3] > 0).sum()]
    assert 0 < monitor.get("b").tokens < 50


@pytest.mark.parametrize("rate", [0.05, 0.5])
def test_a_share_of_the_tokens_is_watched(rate: float) -> None:
    monitor = registry()
    monitor.start("sha256:w", neurons_watch(), options(sampling_rate=rate))
    n = 0
    for i in range(400):
        step = begin(monitor, normal(8, i))
        if step is not None:
            monitor.end(step)
        n += 8
    # Five standard deviations of the binomial distribution.
    assert abs(monitor.statistics("w").rows - rate * n) <= 5 * (n * rate * (1 - rate)) ** 0.5


def record(monitor: WatchRegistry, tokens: int) -> tuple[list[tuple[int, int]], list[Reference | None]]:
    progress: list[tuple[int, int]] = []
    done: list[Reference | None] = []
    monitor.record_reference("w", tokens, lambda seen, total: progress.append((seen, total)), done.append)
    return progress, done


def test_drift_is_none_before_a_window_0_on_what_was_recorded_and_large_on_what_is_shifted() -> None:
    monitor = registry()
    monitor.start("sha256:w", neurons_watch(neurons=(3, 0, 17)), options(window_tokens=512))
    progress, done = record(monitor, 512)
    for i in range(8):
        run(monitor, normal(64, i))
    until(lambda: bool(done))
    # Whenever a ring is full.
    assert progress == [(128 * i, 512) for i in range(1, 5)]
    reference = done[0]
    assert reference is not None
    monitor.set_reference("w", reference, "sha256:r")
    assert monitor.get("w").reference_id == "sha256:r"
    for i in range(7):
        run(monitor, normal(64, i))
    assert monitor.statistics("w").drift is None
    run(monitor, normal(64, 7))
    found = monitor.statistics("w")
    assert found.drift is not None
    assert (found.drift.mean, found.drift.max, found.drift.max_excess) == (0.0, 0.0, 0.0)
    assert found.edges.tolist() == reference.edges.tolist()
    # Of the same distribution, cut at windows that steps run across.
    for i in range(100, 112):
        run(monitor, normal(100, i))
    unchanged = monitor.statistics("w").drift
    assert unchanged is not None
    assert 0.0 < unchanged.max < 0.2
    assert unchanged.max_excess < 0.05
    shifted = np.tile(np.array([0, 0, 0, 2.0] + [0] * 16, dtype=np.float32), (100, 1))
    for i in range(200, 212):
        run(monitor, normal(100, i) + shifted)
    found = monitor.statistics("w")
    assert found.drift is not None
    # Two normal distributions that are two deviations apart: 2 Φ(1) - 1 = 0.68.
    assert 0.55 < found.drift.distance[0] < 0.8
    assert found.drift.max == found.drift.distance[0]
    assert found.drift.excess[0] > 0.45
    assert max(found.drift.excess[1:]) < 0.05
    assert found.rows == 512 + 512 + 1200 + 1200


def test_a_reference_takes_exactly_as_many_tokens_as_asked_for() -> None:
    monitor = registry()
    monitor.start("sha256:w", neurons_watch(neurons=(3,)), options())
    run(monitor, normal(5, 9) + 100)
    progress, done = record(monitor, 100)
    with pytest.raises(FailedPrecondition, match="recorded"):
        record(monitor, 1)
    values = normal(150)
    for part in np.array_split(values, 5):
        run(monitor, part)
    until(lambda: bool(done))
    assert done[0] is not None
    assert int(done[0].counts.sum()) == 100
    np.testing.assert_allclose(float(done[0].mean[0]), values[:100, 3].mean(dtype=np.float64), rtol=1e-6)
    assert progress[-1] == (100, 100)


def test_a_reference_of_other_items_is_refused() -> None:
    monitor = registry()
    monitor.start("sha256:w", neurons_watch(neurons=(3,)), options())
    _, done = record(monitor, 4)
    run(monitor, normal(4))
    until(lambda: bool(done))
    assert done[0] is not None
    with pytest.raises(FailedPrecondition, match="reference"):
        monitor.start("sha256:v", neurons_watch(neurons=(1, 2)), options("other"), done[0])
    monitor.start("sha256:v", neurons_watch(neurons=(1,)), options("other"), done[0], "sha256:r")
    assert monitor.get("other").reference_id == "sha256:r"


def test_followers_are_told_of_every_step_and_of_the_items_they_ask_for() -> None:
    monitor = registry()
    monitor.start("sha256:w", neurons_watch(neurons=(3, 0, 17)), options())
    found: list[Activations | None] = []
    stop = monitor.subscribe("w", (2, 0), 0.5, found.append)
    values = normal(4)
    run(monitor, values)
    assert len(found) == 1
    batch = found[0]
    assert batch is not None
    expected = [(row, item) for row in range(4) for item, neuron in ((2, 17), (0, 3)) if values[row, neuron] > 0.5]
    assert list(zip((batch.positions - 10).tolist(), batch.items.tolist(), strict=True)) == expected
    assert batch.values.tolist() == [float(values[row, {2: 17, 0: 3}[item]]) for row, item in expected]
    assert set(batch.sequences.tolist()) == {3}
    assert set(batch.token_ids.tolist()) == {5}
    assert batch.generated.tolist() == [row >= 2 for row, _ in expected]
    assert (batch.times >= 0).all()
    assert (batch.times < PATIENCE_SECONDS).all()
    stop()
    stop()
    run(monitor, values)
    assert len(found) == 1


def test_more_events_than_a_batch_holds_are_dropped_and_counted() -> None:
    monitor = registry()
    monitor.start("sha256:w", neurons_watch(neurons=tuple(range(20))), options())
    found: list[Activations | None] = []
    monitor.subscribe("w", (), EVERYTHING, found.append)
    run(monitor, normal(100))
    assert found[0] is not None
    assert len(found[0].items) == MAX_BATCH
    assert found[0].dropped == 100 * 20 - MAX_BATCH


def test_values_that_are_not_finite_are_no_events() -> None:
    monitor = registry()
    monitor.start("sha256:w", neurons_watch(neurons=(0, 1, 2)), options())
    followed = Followed(neurons_watch(neurons=(0, 1, 2)))
    monitor.subscribe("w", (), EVERYTHING, followed)
    run(monitor, np.array([[np.nan, np.inf, 1.0]], dtype=np.float32))
    assert followed.of(3)[10].tolist()[2:] == [1.0]
    assert np.isnan(followed.of(3)[10][:2]).all()
    assert monitor.statistics("w").sums.not_finite.tolist() == [1, 1, 0]


def test_followers_and_recordings_are_told_when_a_watch_stops_or_the_engine_ends() -> None:
    for end in (lambda monitor: monitor.stop("w"), WatchRegistry.close):
        monitor = registry()
        monitor.start("sha256:w", neurons_watch(), options())
        followed = Followed(neurons_watch())
        monitor.subscribe("w", (), None, followed)
        _, done = record(monitor, 10)
        end(monitor)
        assert followed.ended
        assert done == [None]
        assert not monitor.active
    assert monitor.ended
    with pytest.raises(Unavailable):
        monitor.start("sha256:w", neurons_watch(), options())


def test_the_caps_hold_for_all_watches_together() -> None:
    monitor = registry(max_watches=2, max_items=5)
    monitor.start("sha256:w", neurons_watch(neurons=(1, 2, 3)), options("a"))
    with pytest.raises(ResourceExhausted, match="watch: 3 items"):
        monitor.start("sha256:w", neurons_watch(neurons=(1, 2, 3)), options("b"))
    monitor.start("sha256:w", neurons_watch(neurons=(1,)), options("b"))
    with pytest.raises(ResourceExhausted, match="name: 2 watches"):
        monitor.start("sha256:w", neurons_watch(neurons=(1,)), options("c"))
    monitor.stop("a")
    monitor.start("sha256:w", neurons_watch(neurons=(1, 2, 3, 4)), options("c"))
    assert [own.name for own in monitor.running()] == ["b", "c"]


def test_names_are_of_running_watches() -> None:
    monitor = registry()
    monitor.start("sha256:w", neurons_watch(), options())
    with pytest.raises(FailedPrecondition, match="name"):
        monitor.start("sha256:w", neurons_watch(), options())
    for ask in (monitor.stop, monitor.get, monitor.statistics):
        with pytest.raises(NotFound, match="name"):
            ask("other")
    with pytest.raises(InvalidArgument, match="items"):
        monitor.subscribe("w", (3,), None, lambda found: None)
    with pytest.raises(InvalidArgument, match="tokens"):
        monitor.record_reference("w", 0, lambda seen, total: None, lambda reference: None)


def test_readers_of_other_threads_lose_and_double_nothing_while_steps_run() -> None:
    monitor = registry()
    monitor.start("sha256:w", neurons_watch(neurons=(3,)), options())
    stop = threading.Event()
    counts: list[int] = []

    def read() -> None:
        while not stop.is_set():
            counts.append(monitor.statistics("w").rows)
            monitor.start("sha256:v", neurons_watch(layer=0), options("other"))
            monitor.stop("other")

    reader = threading.Thread(target=read)
    reader.start()
    total = 0.0
    for i in range(300):
        values = normal(4, i)
        run(monitor, values)
        total += float(values[:, 3].astype(np.float64).sum())
    stop.set()
    reader.join()
    assert counts == sorted(counts)
    found = monitor.statistics("w")
    assert found.rows == 1200
    assert abs(float(found.total[0]) - total) < 1e-6


def test_a_shift_that_an_edit_makes_in_the_engine_is_seen_as_drift() -> None:
    """Recorded without steering, then steered."""
    push = AddVector(Vector(values=10 * numbers("push", SPEC.d_model)))
    steered = Program((Edit(push, Site.RESID_PRE, layers=(1,)),))
    plain = [Job(prompt(f"plain {i}", 20), None, 8) for i in range(6)]
    with Bench("llama", EngineConfig(enable_prefix_cache=False)) as bench:
        monitor = bench.engine.monitor
        monitor.start("sha256:w", neurons_watch(), options(window_tokens=6 * 26))
        _, done = record(monitor, 6 * 26)
        bench.run(plain)
        until(lambda: bool(done))
        assert done[0] is not None
        monitor.set_reference("w", done[0], "sha256:r")
        bench.run(plain)
        same = monitor.statistics("w").drift
        assert same is not None
        assert same.max < 0.02  # batches may differ, and with them the last bits
        bench.run([Job(job.prompt, steered, 8) for job in plain])
        drifted = monitor.statistics("w").drift
        assert drifted is not None
        assert drifted.max_excess > 0.2


def test_the_end_of_the_engine_ends_its_watches() -> None:
    with Bench("llama", EngineConfig()) as bench:
        followed = follow(bench, neurons_watch())
        bench.run([Job(prompt("one", 5), None, 2)])
    until(lambda: followed.ended)
    assert bench.engine.monitor.running() == []

"""Reducers of passes over a corpus against a naive pass in numpy; their states; the operators of a device."""

from collections import Counter
from collections.abc import Callable
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from engine_runs import loaded
from torch import Tensor

from patchclamp_server.artifacts.corpora import UNLABELLED
from patchclamp_server.engine.config import EngineConfig
from patchclamp_server.engine.engine import Engine
from patchclamp_server.engine.reducers.covariance import Covariance
from patchclamp_server.engine.reducers.firing import Firing
from patchclamp_server.engine.reducers.firing_by_position import FiringByPosition
from patchclamp_server.engine.reducers.gathered import AT_ONCE, GatheredRows
from patchclamp_server.engine.reducers.histogram import Histogram
from patchclamp_server.engine.reducers.joint_counts import JointCounts
from patchclamp_server.engine.reducers.moments import Moments
from patchclamp_server.engine.reducers.occurrences import Occurrences
from patchclamp_server.engine.reducers.per_label import PerLabel
from patchclamp_server.engine.reducers.reducer import Place, Reducer, Resumable
from patchclamp_server.engine.reducers.sums import Sums
from patchclamp_server.engine.reducers.top_k import TopK
from patchclamp_server.engine.reducers.top_keys import NO_KEY, TopKeys
from patchclamp_server.engine.request import Event, Failed, Finished, Reduction, Request, StopParams
from patchclamp_server.model.sites import Site

LAYERS = (1, 4)
WIDTH, VOCAB, LONGEST = 6, 5, 11
LABELS = (1, 0, UNLABELLED, 1)


def texts() -> list[tuple[np.ndarray, np.ndarray]]:
    """Rows [n, WIDTH], some of them equal, and token ids [n] of each text."""
    rng = np.random.default_rng(7)
    lengths = (LONGEST, 4, 9, 1)
    return [
        (rng.normal(size=(n, WIDTH)).round(1).astype(np.float32), rng.integers(0, VOCAB, n, dtype=np.int64))
        for n in lengths
    ]


def parts(chunk: int = 3) -> list[tuple[int, int, int]]:
    """(text, start, end), texts by turns."""
    found = []
    for start in range(0, LONGEST, chunk):
        found += [(t, start, min(start + chunk, len(x))) for t, (x, _) in enumerate(texts()) if start < len(x)]
    return found


def give(reducer: Reducer, which: list[tuple[int, int, int]], change: Callable[[Tensor], Tensor] = lambda x: x) -> None:
    """At both layers, at the second with all values negated."""
    given = texts()
    for layer in reducer.layers:
        for text, start, end in which:
            rows, ids = given[text]
            own = torch.from_numpy(rows[start:end].copy()) * (1 if layer == LAYERS[0] else -1)
            reducer.add(layer, change(own), Place(text, start, LABELS[text], ids))


def all_rows(layer: int = LAYERS[0]) -> np.ndarray:
    rows = np.concatenate([rows for rows, _ in texts()])
    return rows if layer == LAYERS[0] else -rows


MAKERS: dict[str, Callable[[], Resumable]] = {
    "firing": partial(Firing, LAYERS, 0.5),
    "firing beyond": partial(Firing, LAYERS, 0.5, magnitude=True),
    "moments": partial(Moments, LAYERS),
    "position": partial(FiringByPosition, LAYERS, 3, 8),
    "largest": partial(TopK, LAYERS, 3),
    "tokens": partial(TopKeys, LAYERS, VOCAB, 2),
    "pairs": partial(TopKeys, LAYERS, VOCAB, 2, pair=True),
    "occurrences": partial(Occurrences, LAYERS[0], VOCAB, 16),
    "joint": partial(JointCounts, LAYERS, 0.5),
    "covariance": partial(Covariance, LAYERS),
    "histogram": partial(Histogram, LAYERS, torch.tensor([-1.0, 0.0, 1.0])),
    "by label": partial(PerLabel, LAYERS, 2, partial(Firing, LAYERS)),
}


@pytest.mark.parametrize("layer", LAYERS)
def test_firing_is_counted_above_a_threshold_and_by_magnitude(layer: int) -> None:
    above, beyond, rows = Firing(LAYERS, 0.5), Firing(LAYERS, 0.5, magnitude=True), all_rows(layer)
    give(above, parts())
    give(beyond, parts())
    assert above.counts(layer).tolist() == (rows > np.float32(0.5)).sum(0).tolist()
    assert beyond.counts(layer).tolist() == (abs(rows) > np.float32(0.5)).sum(0).tolist()
    assert above.count(layer) == len(rows)
    assert above.rates(layer).tolist() == (rows > np.float32(0.5)).mean(0).tolist()


@pytest.mark.parametrize("layer", LAYERS)
def test_moments_are_those_of_all_rows(layer: int) -> None:
    reducer, rows = Moments(LAYERS), all_rows(layer).astype(np.float64)
    give(reducer, parts())
    np.testing.assert_allclose(reducer.mean(layer), rows.mean(0), rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(reducer.variance(layer), rows.var(0), rtol=1e-12)
    assert reducer.largest(layer).tolist() == rows.max(0).tolist()


def test_firing_is_counted_by_the_part_of_the_text() -> None:
    reducer = FiringByPosition(LAYERS, bins=3, tokens=8)
    give(reducer, parts())
    bins = np.concatenate([np.minimum(np.arange(len(rows)) * 3 // 8, 2) for rows, _ in texts()])
    fired = all_rows() > 0
    assert reducer.counts(LAYERS[0]).tolist() == [fired[bins == b].sum(0).tolist() for b in range(3)]
    assert reducer.rows(LAYERS[0]).tolist() == np.bincount(bins, minlength=3).tolist()


def test_firing_is_counted_by_label_without_texts_that_have_none() -> None:
    reducer = PerLabel(LAYERS, 2, partial(Firing, LAYERS))
    give(reducer, parts())
    for label in range(2):
        rows = np.concatenate([rows for (rows, _), own in zip(texts(), LABELS, strict=True) if own == label])
        assert reducer.of[label].counts(LAYERS[0]).tolist() == (rows > 0).sum(0).tolist()


@pytest.mark.parametrize("backwards", [False, True])
def test_the_largest_values_and_their_places_do_not_depend_on_the_order_of_rows(backwards: bool) -> None:
    reducer = TopK(LAYERS, 3)
    give(reducer, parts()[:: -1 if backwards else 1])
    found = reducer.largest(LAYERS[0])
    for unit in range(WIDTH):
        every = [(-float(v), t, p) for t, (rows, _) in enumerate(texts()) for p, v in enumerate(rows[:, unit])]
        expected = [(-v, t, p) for v, t, p in sorted(every)[:3]]
        kept = (found.values[unit].tolist(), found.texts[unit].tolist(), found.positions[unit].tolist())
        assert list(zip(*kept, strict=True)) == expected


def keys_with_which_it_fires(unit: int, *, pair: bool) -> Counter[int]:
    found: Counter[int] = Counter()
    for rows, ids in texts():
        for at in np.flatnonzero(rows[:, unit] > 0):
            if not pair:
                found[int(ids[at])] += 1
            elif at:
                found[int(ids[at - 1]) * VOCAB + int(ids[at])] += 1
    return found


@pytest.mark.parametrize("pair", [False, True])
def test_with_a_slot_for_every_key_the_keys_of_firings_are_exact(pair: bool) -> None:
    reducer = TopKeys(LAYERS, VOCAB, k=VOCAB * VOCAB, pair=pair)
    give(reducer, parts())
    found = reducer.triggers(LAYERS[0])
    assert not found.errors.any()
    for unit in range(WIDTH):
        kept = dict(zip(found.keys[unit].tolist(), found.counts[unit].tolist(), strict=True))
        kept.pop(NO_KEY, None)
        assert kept == dict(keys_with_which_it_fires(unit, pair=pair))
        assert found.firings[unit] == sum(kept.values())
    assert (found.counts.diff(dim=1) <= 0).all()


@pytest.mark.parametrize("pair", [False, True])
def test_with_fewer_slots_counts_are_wrong_by_no_more_than_their_error(pair: bool) -> None:
    k = 2
    reducer = TopKeys(LAYERS, VOCAB, k=k, pair=pair)
    give(reducer, parts())
    found = reducer.triggers(LAYERS[0])
    for unit in range(WIDTH):
        exact, n = keys_with_which_it_fires(unit, pair=pair), int(found.firings[unit])
        for key, count, error in zip(
            *(x[unit].tolist() for x in (found.keys, found.counts, found.errors)), strict=True
        ):
            assert count - error <= exact[key] <= count
            assert error <= n / k
        assert {key for key, times in exact.items() if times > n / k} <= set(found.keys[unit].tolist())


def test_a_unit_that_fires_often_is_let_go_and_one_that_fires_rarely_is_not() -> None:
    reducer, rows = TopKeys((0,), VOCAB, most_rate=0.5, least_rows=4), torch.tensor([[1.0, -1.0]]).repeat(8, 1)
    rows[5, 1] = 1.0
    reducer.add(0, rows, Place(ids=np.array([0, 1, 2, 3, 0, 4, 2, 3])))
    found = reducer.triggers(0)
    assert found.let_go.tolist() == [True, False]
    assert [int(x) for x in (found.keys[1, 0], found.counts[1, 0], found.firings[1])] == [4, 1, 1]


def test_a_unit_without_a_key_that_has_its_share_of_the_firings_is_let_go_when_it_is_looked_at() -> None:
    reducer = TopKeys((0,), VOCAB, least_share=0.5, least_firings=4)
    # The first unit fires at four tokens, the second at two of them twice, the third has not fired four times.
    rows = torch.tensor([[1.0, 1, 1], [1, -1, 1], [1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, 1, -1]])
    reducer.add(0, rows, Place(ids=np.array([5, 1, 7, 3, 5, 7])))
    found = reducer.triggers(0)
    assert found.let_go.tolist() == [True, False, False]
    assert (found.keys[1, :2].tolist(), found.counts[1, :2].tolist()) == ([5, 7], [2, 2])
    assert found.firings.tolist() == [4, 4, 3]


def test_keys_are_those_of_sizes_with_magnitude() -> None:
    rows = torch.tensor([[-1.0], [1.0], [-0.2]])
    for magnitude, firings in ((False, 1), (True, 2)):
        reducer = TopKeys((0,), VOCAB, threshold=0.5, magnitude=magnitude)
        reducer.add(0, rows, Place(ids=np.array([3, 4, 5])))
        assert reducer.triggers(0).firings.tolist() == [firings]


def test_firings_by_position_are_those_of_sizes_with_magnitude() -> None:
    rows = torch.tensor([[-1.0], [1.0], [-0.2]])
    for magnitude, counts in ((False, [0, 1]), (True, [1, 1])):
        reducer = FiringByPosition((0,), bins=2, tokens=2, threshold=0.5, magnitude=magnitude)
        reducer.add(0, rows, Place())
        assert reducer.counts(0)[:, 0].tolist() == counts


def test_tokens_are_counted_exactly_and_pairs_at_least_as_often_as_they_come() -> None:
    reducer = Occurrences(LAYERS[0], VOCAB, buckets=16)
    give(reducer, parts())
    tokens = Counter(int(id) for _, ids in texts() for id in ids)
    pairs = Counter(int(a) * VOCAB + int(b) for _, ids in texts() for a, b in pairwise(ids))
    assert reducer.of_tokens(torch.arange(VOCAB)).tolist() == [tokens[t] for t in range(VOCAB)]
    assert reducer.of_tokens(torch.tensor([[NO_KEY]])).tolist() == [[0]]
    counted = reducer.of_pairs(torch.arange(VOCAB * VOCAB)).tolist()
    assert all(have >= pairs[key] for key, have in enumerate(counted))
    wide = Occurrences(LAYERS[0], VOCAB)
    give(wide, parts())
    assert wide.of_pairs(torch.arange(VOCAB * VOCAB)).tolist() == [pairs[key] for key in range(VOCAB * VOCAB)]
    assert reducer.total == len(all_rows())


def test_two_sets_of_units_are_counted_together() -> None:
    units, others = torch.tensor([4, 0]), torch.tensor([1, 2, 4])
    reducer = JointCounts(LAYERS, units=units, others=others)
    give(reducer, parts())
    active = (all_rows() > 0).astype(int)
    assert reducer.counts(LAYERS[0]).tolist() == (active[:, units].T @ active[:, others]).tolist()


@pytest.mark.parametrize("name", MAKERS)
def test_a_state_is_taken_up_where_it_was_left(name: str) -> None:
    whole, before, after = (MAKERS[name]() for _ in range(3))
    middle = len(parts()) // 2
    give(whole, parts()[:middle])
    give(whole, parts()[middle:])
    give(before, parts()[:middle])
    left = before.state()
    give(before, parts()[middle:])
    after.restore(left)
    give(after, parts()[middle:])
    assert after.parameters() == whole.parameters()
    for name, tensor in whole.state().items():
        assert torch.equal(after.state()[name], tensor), name
        assert torch.equal(before.state()[name], tensor), name


@pytest.mark.parametrize("name", MAKERS)
def test_a_state_of_something_else_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="other"):
        MAKERS[name]().restore({"9.other": torch.zeros(3)})


class Elsewhere(Tensor):
    """Rows that say that they are not on the CPU, so that the operators of a device run."""

    @property
    def is_cpu(self) -> bool:  # type: ignore[override]
        return False


@pytest.mark.parametrize("name", MAKERS)
def test_the_operators_of_a_device_give_what_the_loops_give(name: str) -> None:
    by_loops, by_operators = MAKERS[name](), MAKERS[name]()
    give(by_loops, parts())
    give(by_operators, parts(), lambda x: x.as_subclass(Elsewhere))
    for path, tensor in by_loops.state().items():
        torch.testing.assert_close(by_operators.state()[path].as_subclass(Tensor), tensor, rtol=1e-12, atol=1e-12)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", MAKERS)
def test_a_state_that_was_left_on_a_cpu_is_taken_up_on_a_device(name: str) -> None:
    whole, before, after = (MAKERS[name]() for _ in range(3))
    give(whole, parts())
    give(before, parts()[:5])
    after.restore(before.state())
    give(after, parts()[5:], lambda x: x.cuda())
    for path, tensor in whole.state().items():
        torch.testing.assert_close(after.state()[path], tensor, rtol=1e-12, atol=1e-12)


def run_all(engine: Engine, requests: list[Request], events: list[Event]) -> None:
    for request in requests:
        engine.submit(request)
    while engine.step():
        pass
    assert not [event for event in events if isinstance(event, Failed)]


def test_one_pass_feeds_several_reducers_at_several_sites_with_the_ids_of_the_tokens() -> None:
    config = EngineConfig(max_tokens_per_step=7, kv_block_size=4)
    engine, events = Engine(loaded("llama"), config), list[Event]()
    neurons, stream, occurrences = Sums((0, 2)), Sums((1,)), Occurrences(0, 64)
    prompts = [(5, 6, 7, 5, 6, 8, 9, 5, 6, 7), (6, 7)]
    requests = [
        Request(
            prompt,
            events.append,
            stop=StopParams(max_tokens=0),
            reductions=(
                Reduction(Site.MLP_POST, neurons, text),
                Reduction(Site.RESID_POST, stream, text),
                Reduction(Site.MLP_POST, occurrences, text),
            ),
        )
        for text, prompt in enumerate(prompts)
    ]
    run_all(engine, requests, events)
    assert (neurons.counts, stream.counts) == ({0: 12, 2: 12}, {1: 12})
    assert occurrences.of_tokens(torch.tensor([5, 6, 7, 9, 10])).tolist() == [3, 4, 3, 1, 0]
    assert occurrences.of_pairs(torch.tensor([5 * 64 + 6, 6 * 64 + 7])).tolist() == [3, 3]


@pytest.mark.parametrize("kernels", [False, True])
def test_a_prompt_that_nothing_is_generated_from_computes_no_logits(kernels: bool) -> None:
    model = loaded("llama")
    engine, events, rows = Engine(model, EngineConfig(kernels=kernels)), list[Event](), list[int]()
    # The name by which an executor asks for logits.
    name = "unembed" if kernels else "logits"
    own = getattr(model.decoder, name)
    setattr(engine.executor.decoder, name, lambda h: (rows.append(len(h)), own(h))[1])  # type: ignore[attr-defined]
    try:
        for max_tokens in (0, 1):
            run_all(engine, [Request((5, 6, 7), events.append, stop=StopParams(max_tokens=max_tokens))], events)
    finally:
        delattr(engine.executor.decoder, name)  # type: ignore[attr-defined]
    assert rows == [0, 1]
    assert len([event for event in events if isinstance(event, Finished)]) == 2


class Chunks(Reducer):
    """Keeps all that it is given."""

    def __init__(self, layers: tuple[int, ...]) -> None:
        super().__init__(layers)
        self.given: dict[int, list[tuple[int, Tensor]]] = {layer: [] for layer in layers}

    def add(self, layer: int, rows: Tensor, place: Place) -> None:
        self.given[layer].append((place.start, rows.clone()))


@pytest.mark.parametrize("step", [1, 7, 64, 100, 200])
def test_rows_of_small_steps_are_gathered_and_all_are_given_by_the_last_token(step: int) -> None:
    rows = torch.randn(150, 3, generator=torch.Generator().manual_seed(1))
    few, many = Chunks((1,)), Chunks((0, 1, 2))
    gathered = GatheredRows((few, many), 5, 0, np.arange(150))
    # A preemption makes the first tokens come again.
    for start in [*range(0, 30, step), *range(0, 150, step)]:
        states = rows[start : start + step].clone()
        for layer in gathered.layers:
            gathered.add(layer, states, start)
        # As the step does, with what it gave.
        states.zero_()
    for chunks in (few.given[1], *many.given.values()):
        assert torch.equal(torch.cat([part for _, part in chunks]), rows)
        starts = [start for start, _ in chunks]
        assert starts == [sum(len(part) for _, part in chunks[:i]) for i in range(len(chunks))]
        assert len(chunks) <= 150 // AT_ONCE + 2
    if step < AT_ONCE // 4:
        ends = [{start + len(part) for start, part in many.given[layer][:-1]} for layer in many.layers]
        assert not set.intersection(*ends)

"""Reducers against the same statistics of all rows at once, and what requests give them: each token once."""

from functools import partial

import numpy as np
import pytest
import torch
from engine_runs import loaded
from kept_sites import KeepSite
from torch import Tensor

from patchclamp_server.analysis.documents import inputs_of, pools_for
from patchclamp_server.engine.config import EngineConfig
from patchclamp_server.engine.engine import Engine
from patchclamp_server.engine.reducers.covariance import Covariance
from patchclamp_server.engine.reducers.histogram import Histogram
from patchclamp_server.engine.reducers.joint_counts import JointCounts
from patchclamp_server.engine.reducers.ordinary_sums import OrdinarySums
from patchclamp_server.engine.reducers.per_label import PerLabel
from patchclamp_server.engine.reducers.reducer import Place, Reducer, Rows
from patchclamp_server.engine.reducers.sample import Sample
from patchclamp_server.engine.reducers.sums import Sums
from patchclamp_server.engine.reducers.token_norms import TokenNorms
from patchclamp_server.engine.reducers.top_k import NOWHERE, TopK
from patchclamp_server.engine.reducers.weighted_means import WeightedMeans
from patchclamp_server.engine.request import Event, Failed, Finished, Priority, Reduction, Request, StopParams
from patchclamp_server.interventions.bind import bind
from patchclamp_server.interventions.program import AddVector, Edit, Program, Vector
from patchclamp_server.model.sites import Site

LAYERS = (0, 2)
WIDTH = 5


def texts(*lengths: int, mean: float = 0.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(n, WIDTH, generator=generator) + mean for n in lengths]


def given(reducer: Reducer, rows: list[Tensor], chunk: int = 3) -> Tensor:
    """Gives every text in chunks, by turns, at both layers, the second with all values doubled; returns all rows."""
    longest = max(len(text) for text in rows)
    for start in range(0, longest, chunk):
        for index, text in enumerate(rows):
            if part := text[start : start + chunk].tolist():
                for scale, layer in enumerate(LAYERS, 1):
                    reducer.add(layer, scale * torch.tensor(part), Place(index, start, index % 2))
    return torch.cat(rows)


def test_sums_are_those_of_all_rows() -> None:
    sums, squares = Sums(LAYERS), Sums(LAYERS, of=torch.square)
    rows = given(sums, texts(7, 4)).double()
    given(squares, texts(7, 4))
    torch.testing.assert_close(sums.sum(0), rows.sum(0))
    torch.testing.assert_close(sums.mean(2), 2 * rows.mean(0))
    torch.testing.assert_close(squares.sum(0), rows.square().sum(0))
    assert sums.counts == {0: 11, 2: 11}


def test_the_covariance_is_that_of_all_rows_however_large_their_mean() -> None:
    reducer = Covariance(LAYERS)
    rows = given(reducer, texts(7, 4, 20, mean=1e4)).double()
    torch.testing.assert_close(reducer.covariance(0), rows.T.cov(correction=0), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(reducer.mean(2), 2 * rows.mean(0))
    assert reducer.count(0) == 31


def test_the_largest_values_come_with_the_tokens_where_they_stand() -> None:
    reducer, rows = TopK(LAYERS, k=3), texts(7, 4)
    every = given(reducer, rows)
    found = reducer.largest(0)
    assert torch.equal(found.values, every.T.topk(3).values)
    for unit in range(WIDTH):
        for value, text, position in zip(
            *(x[unit].tolist() for x in (found.values, found.texts, found.positions)), strict=True
        ):
            assert rows[text][position, unit] == value


def test_of_equal_values_the_first_is_the_maximum_and_too_few_rows_stand_nowhere() -> None:
    maximum, three = TopK((0,)), TopK((0,), k=3)
    for start in (0, 1):
        for reducer in (maximum, three):
            reducer.add(0, torch.ones(1, 2), Place(text=4, start=start))
    assert (maximum.largest(0).texts.tolist(), maximum.largest(0).positions.tolist()) == ([[4], [4]], [[0], [0]])
    assert three.largest(0).positions.tolist() == [[0, 1, NOWHERE]] * 2
    assert three.largest(0).values[:, 2].tolist() == [float("-inf")] * 2


@pytest.mark.parametrize("units", [None, torch.tensor([3, 1])])
def test_joint_counts_are_those_of_all_rows(units: Tensor | None) -> None:
    reducer = JointCounts(LAYERS, threshold=0.5, units=units)
    rows = given(reducer, texts(9, 30))
    active = (rows if units is None else rows[:, units]) > 0.5
    assert torch.equal(reducer.counts(0), (active[:, :, None] & active[:, None]).sum(0))
    assert reducer.rows == {0: 39, 2: 39}


def test_a_histogram_counts_every_value_once_and_knows_its_quantiles() -> None:
    edges = torch.linspace(-2, 2, 41)
    each, together = Histogram(LAYERS, edges), Histogram(LAYERS, edges, by_unit=False)
    rows = given(each, texts(200, 300))
    given(together, texts(200, 300))
    assert each.counts(0).sum(1).tolist() == [500] * WIDTH
    assert torch.equal(each.counts(2).sum(0, keepdim=True), together.counts(2))
    assert each.counts(0)[:, 0].tolist() == (rows < -2).sum(0).tolist()
    assert each.counts(0)[:, -1].tolist() == (rows >= 2).sum(0).tolist()
    exact = rows.quantile(0.75, dim=0)
    assert ((each.quantile(0, 0.75) - exact).abs() <= 0.1 + 0.02).all()
    assert each.quantile(0, 1.0).tolist() == [float("inf") if (rows[:, i] >= 2).any() else 2.0 for i in range(WIDTH)]


def test_a_sample_has_every_nth_row_of_each_text_in_order_however_they_came() -> None:
    reducer, rows = Sample(LAYERS, every=4), texts(11, 5)
    for index, start in ((1, 3), (0, 6), (1, 0), (0, 0)):
        end = {6: 11, 3: 5}.get(start, {0: 6, 1: 3}[index])
        reducer.add(0, rows[index][start:end], Place(index, start))
    assert torch.equal(reducer.take(0), torch.cat([text[::4] for text in rows]))


def test_a_sample_of_texts_of_one_length_is_taken_as_if_they_followed_each_other() -> None:
    reducer, rows = Sample((0,), every=4, tokens=6), texts(6, 6, 6)
    for index, text in enumerate(rows):
        reducer.add(0, text, Place(index, 0))
    assert torch.equal(reducer.take(0), torch.cat(rows)[::4])


def test_ordinary_sums_leave_out_the_first_token_and_outliers_of_each_text() -> None:
    rows = texts(9, 9)
    rows[0][5] *= 100
    reducer = OrdinarySums(LAYERS, 9, of=torch.square)
    given(reducer, rows)
    kept = torch.cat((rows[0][1:5], rows[0][6:], rows[1][1:])).double()
    torch.testing.assert_close(reducer.sum(0), kept.square().sum(0), rtol=1e-5, atol=1e-5)
    assert reducer.count(2) == 15


def test_weighted_means_are_of_chosen_tokens_of_each_text() -> None:
    rows = texts(7, 1, 12, mean=2.0)
    chosen = [np.arange(len(text)) % 3 != 1 for text in rows]
    weights = torch.tensor([[1.0, 0.5], [-2.0, 0.0], [0.25, 3.0]], dtype=torch.float64)
    reducer = WeightedMeans(LAYERS, chosen, weights, lambda layer, x: x[:, :2] + layer)
    given(reducer, rows)
    own = [text[torch.from_numpy(mask), :2].double() for text, mask in zip(rows, chosen, strict=True)]
    means = torch.stack([each.mean(0) for each in own])
    for scale, layer in enumerate(LAYERS, 1):
        expected = weights.T @ (scale * means + layer)
        torch.testing.assert_close(reducer.sums(layer), expected, rtol=1e-6, atol=1e-6)


def test_norms_are_those_of_every_token_of_each_text() -> None:
    rows = texts(7, 1, 12)
    reducer = TokenNorms(LAYERS, [len(text) for text in rows])
    given(reducer, rows)
    for i, text in enumerate(rows):
        torch.testing.assert_close(reducer.of(2, i), 2 * text.norm(dim=1))


def test_every_label_has_a_reducer_of_its_own() -> None:
    reducer, rows = PerLabel(LAYERS, 2, partial(Sums, LAYERS)), texts(7, 4, 3)
    given(reducer, rows)
    torch.testing.assert_close(reducer.of[0].sum(0), torch.cat((rows[0], rows[2])).double().sum(0))
    torch.testing.assert_close(reducer.of[1].mean(0), rows[1].double().mean(0))


def test_a_row_that_comes_again_is_not_counted_again() -> None:
    reducer = Sums((0,))
    rows = Rows(reducer)
    for start, end in ((0, 4), (0, 6), (6, 7), (2, 9)):
        rows.add(0, torch.ones(end - start, 1), start)
    assert reducer.counts == {0: 9}


def run_all(engine: Engine, requests: list[Request], events: list[Event]) -> None:
    """By hand, in this thread."""
    for request in requests:
        engine.submit(request)
    while engine.step():
        pass
    assert not [event for event in events if isinstance(event, Failed)]


def states(prompt: tuple[int, ...], site: Site, layer: int) -> Tensor:
    decoder, document, kept = loaded("llama").decoder, torch.tensor([prompt]), KeepSite(site)
    decoder.forward(inputs_of(document, 0, len(prompt), decoder), pools_for(decoder, document), kept)
    return kept.kept[layer]


def test_requests_of_a_job_share_a_reducer_that_sees_every_token_once() -> None:
    """Two of them begin alike, are cut into chunks, and one is preempted: neither a block that is known nor a token
    that is computed again makes a difference."""
    config = EngineConfig(max_tokens_per_step=7, kv_block_size=4, max_sequences=1)
    engine, events, reducer = Engine(loaded("llama"), config), list[Event](), Sums((0, 2))
    start = tuple(range(5, 21))
    prompts = [(*start, 30, 31, 32), (*start, 40), start[:3], (*start, 50, 51)]
    make = partial(Request, on_event=events.append, priority=Priority.ANALYSIS)
    requests = [
        make(prompt, stop=StopParams(max_tokens=0), reductions=(Reduction(Site.MLP_POST, reducer, text=i),))
        for i, prompt in enumerate(prompts)
    ]
    urgent = Request((50, 51), events.append, stop=StopParams(max_tokens=4, ignore_eos=True))
    for request in requests:
        engine.submit(request)
    engine.step()
    engine.step()
    run_all(engine, [urgent], events)
    assert engine.stats().preemptions > 0
    assert len([event for event in events if isinstance(event, Finished)]) == 5
    assert reducer.counts == dict.fromkeys((0, 2), sum(map(len, prompts)))
    for layer in (0, 2):
        expected: Tensor = sum(states(prompt, Site.MLP_POST, layer).double().sum(0) for prompt in prompts)
        torch.testing.assert_close(reducer.sum(layer), expected, rtol=1e-4, atol=1e-4)


def test_a_reducer_sees_a_site_after_its_edits() -> None:
    model = loaded("llama")
    engine, events, reducer = Engine(model), list[Event](), Sums((1,))
    width = model.info.d_model
    push = Edit(AddVector(Vector(values=torch.full((1, width), 9.0))), Site.RESID_POST, layers=(1,))
    program = bind(Program((push,)), model.info)
    asked = Reduction(Site.RESID_POST, reducer)
    run_all(
        engine, [Request((5, 6), events.append, program, stop=StopParams(max_tokens=0), reductions=(asked,))], events
    )
    plain = states((5, 6), Site.RESID_POST, 1).double().sum(0)
    torch.testing.assert_close(reducer.sum(1) - plain, torch.full((width,), 18.0).double(), rtol=0, atol=1e-3)

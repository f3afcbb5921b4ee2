"""Activation patching, against the naive oracle: every cell is one pass of plain transformers with hooks."""

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from engine_runs import loaded, started
from oracle import oracle_logits
from oracle_sites import attach
from programs import prompt, shapes
from tiny_models import tiny_model
from torch import Tensor

from patchclamp_server.analysis.patching.effects import RESAMPLES, drawn_counts, effects, has_both_signs
from patchclamp_server.analysis.patching.grid import Cell, Column, Direction, Metric, Pair, Patching
from patchclamp_server.analysis.patching.job import CellEffect, Patched, patch_activations
from patchclamp_server.analysis.progress import Progress
from patchclamp_server.engine.config import EngineConfig
from patchclamp_server.errors import InvalidArgument
from patchclamp_server.interventions.kinds.patch import Patch, SourceRows
from patchclamp_server.interventions.program import Edit, PositionRange, Program
from patchclamp_server.model.sites import Site

CONFIG = EngineConfig(kv_block_size=4, kv_cache_tokens=1024, max_tokens_per_step=16)
ALL = Column("all", PositionRange(0))


def pairs(family: str, n: int = 2) -> tuple[Pair, ...]:
    """Prompts of 7 tokens that differ from their third token on."""
    made = []
    for i in range(n):
        start = prompt(f"{family} {i} start", 2)
        rest = [prompt(f"{family} {i} {side}", 5) for side in ("clean", "corrupt")]
        answers = [prompt(f"{family} {i} {side}", 2) for side in ("answer", "other")]
        made.append(Pair(start + rest[0], start + rest[1], *answers))
    return tuple(made)


def run(family: str, job: Patching) -> tuple[list[CellEffect], Patched, list[Progress]]:
    async def events() -> list[Any]:
        with started(loaded(family), CONFIG) as engine:
            return [event async for event in patch_activations(engine, job)]

    found = asyncio.run(events())
    cells = [event for event in found if isinstance(event, CellEffect)]
    [result] = [event for event in found if isinstance(event, Patched)]
    return cells, result, [event for event in found if isinstance(event, Progress)]


def rows_of(family: str, tokens: Sequence[int], site: Site) -> dict[int, Tensor]:
    """By plain hooks: [T, width] of every layer."""
    model, kept = tiny_model(family), {}

    def visit(at: Site, layer: int, activation: Tensor) -> Tensor:
        if at is site:
            kept[layer] = activation.reshape(len(tokens), -1).clone()
        return activation

    hooks = attach(model, visit)
    with torch.no_grad():
        model(input_ids=torch.tensor([list(tokens)]), use_cache=False)
    for hook in hooks:
        hook.remove()
    return kept


def naive(family: str, job: Patching, pair: Pair, cell: Cell | None) -> float:
    """The metric of the patched run of a pair; without a cell, of the one without a patch."""
    source, target = job.source_and_target(pair)
    program = None
    if cell is not None:
        layers = job.around(cell.layer, loaded(family).info.n_layers)
        column = job.columns[cell.column]
        kind = Patch(
            source=SourceRows(torch.arange(len(source)), len(source), rows_of(family, source, cell.site)),
            positions=tuple(zip(column.of(len(target)), column.of(len(source)), strict=True)),
            heads=() if cell.head is None else (cell.head,),
        )
        program = Program((Edit(kind, cell.site, layers=layers),))
    return metric_of(family, job, pair, target, program)


def metric_of(family: str, job: Patching, pair: Pair, tokens: tuple[int, ...], program: Program | None) -> float:
    def predictions(continuation: tuple[int, ...]) -> Tensor:
        logits = oracle_logits(tiny_model(family), tokens + continuation, program, prompt_length=len(tokens))
        return torch.log_softmax(logits.double(), dim=-1)[len(tokens) - 1 :]

    if job.metric is Metric.DIVERGENCE:
        source, _ = job.source_and_target(pair)
        p = torch.log_softmax(oracle_logits(tiny_model(family), source, None).double()[-1], dim=-1)
        return float(-(p.exp() * (p - predictions(())[0])).sum())
    value = sum(float(predictions(pair.answer)[i, token]) for i, token in enumerate(pair.answer))
    if job.metric is Metric.LOG_PROBABILITY_DIFFERENCE:
        other = pair.other_answer
        value -= sum(float(predictions(other)[i, token]) for i, token in enumerate(other))
    return value


@pytest.mark.parametrize("metric", Metric)
@pytest.mark.parametrize("direction", Direction)
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "gpt_neox"])
def test_every_cell_is_what_plain_hooks_give(family: str, direction: Direction, metric: Metric) -> None:
    sites = tuple(site for site in (Site.RESID_PRE, Site.ATTN_OUT, Site.MLP_POST) if site in shapes(family).sites)
    columns = (Column("last", PositionRange(-1, 0)), Column("middle", PositionRange(2, 5)))
    job = Patching(pairs(family), sites, (0, 2), columns, direction, metric)
    cells, result, progress = run(family, job)
    assert [each.cell for each in cells] == [Cell(s, lay, c) for s in sites for lay in (0, 2) for c in (0, 1)]
    unpatched = np.array([naive(family, job, pair, None) for pair in job.pairs])
    source = np.array([metric_of(family, job, pair, job.source_and_target(pair)[0], None) for pair in job.pairs])
    assert result.unpatched_metric == pytest.approx(unpatched.mean(), abs=1e-4)
    assert result.source_metric == pytest.approx(source.mean(), abs=1e-4)
    for each in cells:
        patched = np.array([naive(family, job, pair, each.cell) for pair in job.pairs])
        assert each.metric == pytest.approx(patched.mean(), abs=1e-4)
        effect = (patched - unpatched).sum() / (source - unpatched).sum()
        scale = abs((source - unpatched).sum())
        assert each.effect == pytest.approx(effect, abs=1e-3 / scale)
        assert each.low <= each.effect <= each.high
    assert (progress[-1].done, progress[-1].total) == (result.requests, result.requests)


def test_patching_all_of_the_residual_stream_has_effect_1_and_what_both_runs_share_has_0() -> None:
    """Of answers of one token: further ones also look at keys and values of the layers before."""
    shared = Column("shared", PositionRange(0, 2))
    one_token = tuple(replace(p, answer=p.answer[:1], other_answer=p.other_answer[:1]) for p in pairs("llama", 3))
    job = Patching(one_token, (Site.RESID_PRE, Site.RESID_POST), (0, 1, 2), (ALL, shared))
    cells, _, _ = run("llama", job)
    for each in cells:
        assert (each.effect, each.low, each.high) == ((1.0,) * 3 if each.cell.column == 0 else (0.0,) * 3)


def test_patching_all_of_what_enters_the_model_has_effect_1_for_answers_of_several_tokens() -> None:
    [each], _, _ = run("llama", Patching(pairs("llama", 3), (Site.RESID_PRE,), (0,), (ALL,)))
    assert (each.effect, each.low, each.high) == (1.0, 1.0, 1.0)


def test_prompts_go_from_clean_to_corrupt_or_back() -> None:
    pair = Pair((1, 2), (1, 3))
    for direction, source, target in ((Direction.RESTORE, (1, 2), (1, 3)), (Direction.CORRUPT, (1, 3), (1, 2))):
        assert Patching((pair,), (), (), (), direction).source_and_target(pair) == (source, target)


def test_heads_have_cells_of_their_own_and_all_of_them_together_are_the_site() -> None:
    s = shapes("llama")
    job = Patching(pairs("llama", 1), (Site.ATTN_Z,), (1,), (Column("end", PositionRange(-2, 0)),), by_head=True)
    cells, _, _ = run("llama", job)
    assert [each.cell.head for each in cells] == [None, *range(s.n_heads)]
    for each in cells:
        assert each.metric == pytest.approx(naive("llama", job, job.pairs[0], each.cell), abs=1e-4)
        assert each.low == each.high == each.effect


@pytest.mark.parametrize(
    ("window", "layer", "layers"),
    [(1, 1, (1,)), (2, 1, (1, 2)), (3, 1, (0, 1, 2)), (3, 0, (0, 1)), (2, 2, (2,)), (9, 1, (0, 1, 2))],
)
def test_a_window_is_centred_on_the_layer_and_ends_with_the_model(
    window: int, layer: int, layers: tuple[int, ...]
) -> None:
    job = Patching((), (Site.RESID_PRE,), (layer,), (ALL,), window=window)
    assert job.around(layer, 3) == layers


def test_a_window_patches_its_layers_together() -> None:
    job = Patching(pairs("llama", 1), (Site.MLP_OUT,), (1,), (ALL,), window=3)
    [each], _, _ = run("llama", job)
    assert each.metric == pytest.approx(naive("llama", job, job.pairs[0], each.cell), abs=1e-4)


def test_prompts_of_unequal_length_are_aligned_from_their_ends_with_a_warning() -> None:
    pair = Pair(prompt("long", 9), prompt("short", 6), prompt("a", 1), prompt("b", 1))
    job = Patching((pair,), (Site.RESID_POST,), (1,), (Column("-3", PositionRange(-3, -2)),))
    [each], result, _ = run("llama", job)
    assert each.metric == pytest.approx(naive("llama", job, pair, each.cell), abs=1e-4)
    assert "unequal length" in result.warnings[0]


def test_pairs_whose_runs_do_not_differ_are_refused_before_any_cell_runs() -> None:
    tokens = prompt("equal", 6)
    job = Patching((Pair(tokens, tokens, (5,), (6,)),), (Site.RESID_PRE,), (0,), (ALL,))
    with pytest.raises(InvalidArgument, match="tells apart") as refused:
        run("llama", job)
    assert refused.value.field == "pairs"


@pytest.mark.parametrize(
    ("start", "end", "length", "positions"),
    [
        (0, None, 4, [0, 1, 2, 3]),
        (-2, 0, 4, [2, 3]),
        (-1, None, 4, [3]),
        (1, -1, 4, [1, 2]),
        (1, 3, 4, [1, 2]),
        (-3, -2, 4, [1]),
        (2, 2, 4, []),
    ],
)
def test_a_column_counts_as_scopes_do(start: int, end: int | None, length: int, positions: list[int]) -> None:
    assert [*Column("c", PositionRange(start, end)).of(length)] == positions


def test_draws_of_pairs_whose_differences_cancel_are_in_no_interval() -> None:
    source, patched = (
        torch.tensor([1.0, -1.0, 1.0, 1.0]).double(),
        torch.tensor([[0.6, 0], [0.3, 0], [0.8, 0], [0.5, 0]]),
    )
    counts = drawn_counts(4, seed=0)
    drawn = counts @ source
    assert (drawn == 0).any()
    found = effects(patched.double(), source, torch.zeros(4).double(), counts)
    ratios = (counts @ patched.double()[:, 0])[drawn != 0] / drawn[drawn != 0]
    np.testing.assert_allclose(found.low.numpy(), [np.quantile(ratios, 0.025), 0.0])
    np.testing.assert_allclose(found.high.numpy(), [np.quantile(ratios, 0.975), 0.0])


def test_intervals_are_the_quantiles_of_ratios_of_sums_over_drawn_pairs() -> None:
    rng = np.random.default_rng(0)
    source, unpatched = rng.normal(3, 1, 12), rng.normal(0, 1, 12)
    patched = rng.normal(1, 1, (12, 5))
    counts = drawn_counts(12, seed=4)
    assert counts.sum(1).tolist() == [12.0] * RESAMPLES
    found = effects(torch.tensor(patched), torch.tensor(source), torch.tensor(unpatched), counts)
    share = (patched - unpatched[:, None]).sum(0) / (source - unpatched).sum()
    np.testing.assert_allclose(found.effect.numpy(), share)
    draws = np.stack(
        [
            (np.repeat(patched - unpatched[:, None], own, axis=0)).sum(0) / np.repeat(source - unpatched, own).sum()
            for own in counts.numpy().astype(int)
        ]
    )
    np.testing.assert_allclose(found.low.numpy(), np.quantile(draws, 0.025, axis=0))
    np.testing.assert_allclose(found.high.numpy(), np.quantile(draws, 0.975, axis=0))
    assert not has_both_signs(torch.tensor(source), torch.tensor(unpatched), counts)
    assert has_both_signs(torch.tensor([1.0, -2.0]).double(), torch.zeros(2).double(), drawn_counts(2, 0))


def test_pairs_are_drawn_by_the_seed() -> None:
    assert torch.equal(drawn_counts(12, seed=4), drawn_counts(12, seed=4))
    assert not torch.equal(drawn_counts(12, seed=4), drawn_counts(12, seed=5))

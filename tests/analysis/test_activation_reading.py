"""Activations of texts: rows equal plain transformers with hooks, and are those of their text and token."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from corpus_runs import WINDOW, corpus, word_encoder
from engine_runs import loaded, started
from oracle_sites import attach
from patience import PATIENCE_SECONDS
from tiny_models import VOCAB, tiny_model
from torch import Tensor

from patchclamp_server.analysis.activation_reading import job as job_module
from patchclamp_server.analysis.activation_reading.job import (
    ActivationReading,
    LabelMean,
    Moments,
    ReadingResult,
    read_activations,
)
from patchclamp_server.analysis.activation_reading.pieces import every, pieces_of_texts
from patchclamp_server.analysis.activation_reading.reductions import Reduce
from patchclamp_server.analysis.activation_reading.rows import RowsOfPlace
from patchclamp_server.analysis.neurons.texts import TextSource
from patchclamp_server.analysis.requests import Make, completed
from patchclamp_server.artifacts.activation_rows import StoredActivations
from patchclamp_server.artifacts.store import ArtifactStore
from patchclamp_server.engine.config import EngineConfig
from patchclamp_server.engine.engine import Engine
from patchclamp_server.engine.request import Priority, Request, StopParams
from patchclamp_server.errors import InvalidArgument
from patchclamp_server.interventions.bind import bind
from patchclamp_server.interventions.bound import BoundProgram
from patchclamp_server.interventions.program import (
    AddVector,
    Edit,
    PositionRange,
    Program,
    Scope,
    TokenSelector,
    Vector,
)
from patchclamp_server.model.sites import Site
from patchclamp_server.text.prompt import EncodedPrompt

SITES = (Site.RESID_POST, Site.MLP_POST)
LAYERS = (0, 2)
# Chunked prefill, and several texts in a step.
CONFIG = EngineConfig(max_tokens_per_step=24, kv_block_size=4, kv_cache_tokens=1024)
NOTHING = Program()
Place = tuple[Site, int]


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with started(loaded("llama"), CONFIG) as engine:
        yield engine


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(tmp_path)


def bound(program: Program = NOTHING) -> BoundProgram:
    return bind(program, loaded("llama").info)


def prompts(*lengths: int, seed: int = 0) -> tuple[EncodedPrompt, ...]:
    rng = np.random.default_rng(seed)
    return tuple(EncodedPrompt(tuple(int(id) for id in rng.integers(2, VOCAB, n))) for n in lengths)


def reading(source: tuple[EncodedPrompt, ...] | TextSource, **fields: Any) -> ActivationReading:
    return replace(ActivationReading(source, bound(), SITES, LAYERS), **fields)


async def events_of(engine: Engine, store: ArtifactStore, job: ActivationReading) -> list[Any]:
    async with aclosing(read_activations(engine, store, loaded("llama").info, word_encoder(), job)) as events:
        return [event async for event in events]


def rows_in(events: list[Any]) -> dict[tuple[Site, int, int, int], tuple[Tensor, RowsOfPlace, int]]:
    """By site, layer, text and position: the row, and where it stands in which part."""
    found = {}
    for part in (event for event in events if isinstance(event, RowsOfPlace)):
        for i, (text, position) in enumerate(zip(part.texts.tolist(), part.positions.tolist(), strict=True)):
            key = (part.site, part.layer, text, position)
            assert key not in found
            found[key] = (part.values[i], part, i)
    return found


def result_in(events: list[Any]) -> ReadingResult:
    assert isinstance(events[-1], ReadingResult)
    return events[-1]


def hooked(ids: tuple[int, ...], edit: Callable[[Site, int, Tensor], Tensor] | None = None) -> dict[Place, Tensor]:
    """[T, width] at every site and layer, by hooks on plain transformers."""
    seen: dict[Place, Tensor] = {}

    def visit(site: Site, layer: int, activation: Tensor) -> Tensor:
        if edit is not None:
            activation = edit(site, layer, activation)
        seen[site, layer] = activation.reshape(len(ids), -1).clone()
        return activation

    model = tiny_model("llama")
    hooks = attach(model, visit)
    try:
        with torch.no_grad():
            model(input_ids=torch.tensor([list(ids)]), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def close(row: Tensor, expected: Tensor) -> None:
    assert float((row.float() - expected).abs().max()) <= 1e-4 * max(1.0, float(expected.abs().max()))


async def test_every_row_equals_hooks_and_is_labelled_with_its_text_position_and_token(
    engine: Engine, store: ArtifactStore
) -> None:
    source = prompts(3, 40, 1, 17, 9)
    events = await events_of(engine, store, reading(source))
    rows = rows_in(events)
    assert len(rows) == 70 * 4
    for text, prompt in enumerate(source):
        expected = hooked(prompt.ids)
        for site, layer in ((site, layer) for site in SITES for layer in LAYERS):
            for position, token in enumerate(prompt.ids):
                row, part, i = rows[site, layer, text, position]
                assert (part.token_ids[i], part.labels[i], part.tokens[i]) == (token, -1, 1)
                close(row, expected[site, layer][position])
    result = result_in(events)
    assert (result.texts, result.tokens, result.rows) == (5, 70, 70)


async def test_rows_of_sixteen_readings_at_once_beside_served_requests_are_those_of_their_texts(
    engine: Engine, store: ArtifactStore
) -> None:
    sources = [prompts(5, 11, 3, seed=seed) for seed in range(16)]
    served = [
        engine.submit(
            Request(prompt.ids, lambda event: None, stop=StopParams(30, ignore_eos=True), priority=Priority.INTERACTIVE)
        )
        for prompt in prompts(7, 9, 4, seed=99)
    ]
    try:
        found = await asyncio.gather(*(events_of(engine, store, reading(source)) for source in sources))
    finally:
        for request in served:
            engine.cancel(request)
    for source, events in zip(sources, found, strict=True):
        rows = rows_in(events)
        for text, prompt in enumerate(source):
            expected = hooked(prompt.ids)[Site.RESID_POST, 2]
            for position in range(len(prompt.ids)):
                close(rows[Site.RESID_POST, 2, text, position][0], expected[position])


async def test_a_prompt_that_the_prefix_cache_has_still_gives_all_its_rows(
    engine: Engine, store: ArtifactStore
) -> None:
    (prompt,) = source = prompts(21, seed=5)
    done = asyncio.Event()
    loop = asyncio.get_running_loop()
    engine.submit(Request(prompt.ids, lambda event: loop.call_soon_threadsafe(done.set), stop=StopParams(1)))
    async with asyncio.timeout(PATIENCE_SECONDS):
        await done.wait()
    rows = rows_in(await events_of(engine, store, reading(source)))
    expected = hooked(prompt.ids)[Site.MLP_POST, 0]
    for position in range(21):
        close(rows[Site.MLP_POST, 0, 0, position][0], expected[position])


async def test_rows_are_read_after_the_edits_of_the_program(engine: Engine, store: ArtifactStore) -> None:
    direction = torch.linspace(-1, 1, loaded("llama").info.d_model)
    add = Edit(AddVector(Vector(values=direction)), Site.RESID_POST, layers=(0,), strength=2.0)
    (prompt,) = source = prompts(12)
    rows = rows_in(await events_of(engine, store, reading(source, program=bound(Program(edits=(add,))))))

    def edited(site: Site, layer: int, activation: Tensor) -> Tensor:
        return activation + 2.0 * direction if (site, layer) == (Site.RESID_POST, 0) else activation

    expected = hooked(prompt.ids, edited)
    for site, layer in ((Site.RESID_POST, 0), (Site.MLP_POST, 2)):
        for position in range(12):
            close(rows[site, layer, 0, position][0], expected[site, layer][position])


async def test_only_tokens_in_scope_are_read(engine: Engine, store: ArtifactStore) -> None:
    source = prompts(3, 30, 8)
    scope = Scope((TokenSelector(positions=PositionRange(-2, 0)),), (TokenSelector(positions=PositionRange(2, 3)),))
    rows = rows_in(await events_of(engine, store, reading(source, scope=scope)))
    assert sorted({(text, position) for _, _, text, position in rows}) == [(0, 1), (1, 28), (1, 29), (2, 6), (2, 7)]


async def test_positions_of_a_text_do_not_depend_on_where_it_is_cut(engine: Engine, store: ArtifactStore) -> None:
    of = corpus(20, 3, 9)
    events = await events_of(engine, store, reading(TextSource(of, WINDOW)))
    rows = rows_in(events)
    encoder = word_encoder()
    positions = {text: sorted({p for _, _, t, p in rows if t == text}) for text in range(3)}
    # A special token in front of each text, and none inside.
    assert positions == {0: list(range(21)), 1: list(range(4)), 2: list(range(10))}
    for text in range(3):
        ids = encoder.encode_text(str(of.document(text).text)).ids
        for position in positions[text]:
            _, part, i = rows[Site.RESID_POST, 0, text, position]
            assert (part.token_ids[i], part.labels[i]) == (ids[position], of.document(text).label)


async def by_hooks(of: Any, place: Place) -> list[Tensor]:
    """The rows [n, width] of each text, window by window."""
    found: dict[int, list[Tensor]] = {}
    async for piece in pieces_of_texts(TextSource(of, WINDOW), word_encoder(), Scope(), every):
        chosen = torch.from_numpy(piece.chosen)
        found.setdefault(piece.text, []).append(hooked(piece.tokens)[place][chosen])
    return [torch.cat(found[text]) for text in sorted(found)]


@pytest.mark.parametrize(
    ("reduce", "formula", "position", "tokens"),
    [
        (Reduce.FIRST, lambda x: x[0], lambda x: 0, 1),
        (Reduce.LAST, lambda x: x[-1], lambda x: len(x) - 1, 1),
        (Reduce.MEAN, lambda x: x.mean(0), lambda x: len(x) - 1, None),
        (Reduce.SUM, lambda x: x.sum(0), lambda x: len(x) - 1, None),
        (Reduce.MAX, lambda x: x.max(0), lambda x: len(x) - 1, None),
    ],
)
async def test_one_row_a_text_equals_numpy(
    engine: Engine,
    store: ArtifactStore,
    reduce: Reduce,
    formula: Callable[[Any], Any],
    position: Callable[[Any], int],
    tokens: int | None,
) -> None:
    of = corpus(20, 3, 9)
    events = await events_of(engine, store, reading(TextSource(of, WINDOW), reduce=reduce))
    rows = rows_in(events)
    assert len(rows) == 3 * 4
    for text, states in enumerate(await by_hooks(of, (Site.MLP_POST, 2))):
        x = states.numpy()
        row, part, i = rows[Site.MLP_POST, 2, text, position(x)]
        assert part.tokens[i] == (tokens or len(x))
        close(row, torch.from_numpy(np.asarray(formula(x))))
        if reduce is Reduce.MAX:
            assert part.unit_positions is not None
            at = part.unit_positions[i].long()
            close(torch.from_numpy(x)[at, torch.arange(len(at))], row)


async def test_moments_equal_numpy(engine: Engine, store: ArtifactStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_module, "MAX_MESSAGE_BYTES", 1000)
    of = corpus(20, 3, 9)
    events = await events_of(engine, store, reading(TextSource(of, WINDOW), reduce=Reduce.MOMENTS))
    x = torch.cat(await by_hooks(of, (Site.RESID_POST, 2))).double().numpy()
    parts = [e for e in events if isinstance(e, Moments) and (e.site, e.layer) == (Site.RESID_POST, 2)]
    assert len(parts) > 1
    assert [part.first_row for part in parts] == np.cumsum([0, *(len(p.covariance) for p in parts[:-1])]).tolist()
    assert {part.tokens for part in parts} == {len(x)}
    close(parts[0].mean, torch.from_numpy(x.mean(0)))
    covariance = torch.cat([part.covariance for part in parts])
    close(covariance, torch.from_numpy(np.cov(x.T, bias=True)))
    assert not rows_in(events)


async def test_means_of_labels_equal_numpy_and_leave_out_texts_without_one(
    engine: Engine, store: ArtifactStore
) -> None:
    of = corpus(20, 3, 9, 5)
    events = await events_of(engine, store, reading(TextSource(of, WINDOW), reduce=Reduce.MEAN_BY_LABEL))
    each = await by_hooks(of, (Site.RESID_POST, 2))
    found = {e.label: e for e in events if isinstance(e, LabelMean) and (e.site, e.layer) == (Site.RESID_POST, 2)}
    for label, texts in (("even", (0, 3)), ("odd", (1,))):
        x = torch.cat([each[text] for text in texts]).numpy()
        assert found[label].tokens == len(x)
        close(found[label].mean, torch.from_numpy(x.mean(0)))


async def test_parts_of_rows_fit_a_message(
    engine: Engine, store: ArtifactStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job_module, "MAX_MESSAGE_BYTES", 1000)
    monkeypatch.setattr(job_module, "BATCH_BYTES", 20_000)
    source = prompts(30, 2, 9)
    events = await events_of(engine, store, reading(source, reduce=Reduce.NONE))
    parts = [event for event in events if isinstance(event, RowsOfPlace)]
    assert max(part.values.nbytes for part in parts) <= 1000
    for place in {(part.site, part.layer) for part in parts}:
        own = [part for part in parts if (part.site, part.layer) == place]
        indices = ("texts", "positions", "token_ids", "lengths")
        order = [row for part in own for row in zip(*(getattr(part, name).tolist() for name in indices), strict=True)]
        assert order == [
            (text, position, token, len(prompt.ids))
            for text, prompt in enumerate(source)
            for position, token in enumerate(prompt.ids)
        ]


async def test_while_nobody_takes_rows_no_further_text_is_run(
    engine: Engine, store: ArtifactStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job_module, "BATCH_BYTES", 1)
    submitted = 0
    real = engine.submit

    def counted(request: Request) -> int:
        nonlocal submitted
        submitted += 1
        return real(request)

    monkeypatch.setattr(engine, "submit", counted)
    # Room for the rows of four texts.
    row = 4 * len(LAYERS) * sum(loaded("llama").info.sites[site] for site in SITES)
    monkeypatch.setattr(job_module, "MAX_HELD_BYTES", 4 * 20 * row)
    events = read_activations(engine, store, loaded("llama").info, word_encoder(), reading(prompts(*[10] * 40)))
    async with aclosing(events):
        async for event in events:
            if isinstance(event, RowsOfPlace):
                break
        async with asyncio.timeout(PATIENCE_SECONDS):
            while (stats := engine.stats()).running or stats.waiting:
                await asyncio.sleep(0.01)
        assert submitted <= 5


async def test_what_is_held_is_bounded_by_weight(engine: Engine) -> None:
    held = largest = 0
    weights: dict[Make, int] = {}

    def make(weight: int) -> Make:
        def request(on_event: Any) -> Request:
            nonlocal held, largest
            held += weight
            largest = max(largest, held)
            return Request((3, 4), on_event, stop=StopParams(max_tokens=0), priority=Priority.ANALYSIS)

        weights[request] = weight
        return request

    asked = [make(weight) for weight in (3, 3, 5, 1, 20, 1, 1)]
    index = 0
    async with aclosing(completed(engine, asked, weight=weights.__getitem__, most_weight=6)) as finished:
        async for _ in finished:
            # The weight of one that is taken is given back when the next is asked for.
            held -= weights[asked[index]]
            index += 1
    assert index == 7
    # One of 20 runs alone; besides, 6 and the one that has just been taken.
    assert largest <= 21


async def test_stored_rows_come_back_by_text_site_and_layer(engine: Engine, store: ArtifactStore) -> None:
    of = corpus(20, 3, 9)
    job = reading(TextSource(of, WINDOW), store=True, dtype=torch.bfloat16, description="rows", about={"scope": {}})
    events = await events_of(engine, store, job)
    assert not rows_in(events)
    result = result_in(events)
    assert result.artifact is not None
    assert (result.rows, result.artifact.description) == (35, "rows")
    stored = StoredActivations(*store.open(result.artifact.id))
    assert stored.labels == ("even", "odd")
    streamed = rows_in(await events_of(engine, store, replace(job, store=False)))
    for text in stored.texts():
        rows = stored.rows_of(text)
        assert rows.length == len(word_encoder().encode_text(str(of.document(text).text)).ids)
        values = stored.values(Site.RESID_POST, 2, rows)
        assert values.dtype == torch.bfloat16
        for i, position in enumerate(rows.positions.tolist()):
            row, part, at = streamed[Site.RESID_POST, 2, text, position]
            assert int(rows.tokens[i]) == part.token_ids[at]
            torch.testing.assert_close(values[i].float(), row.float(), rtol=0.02, atol=1e-3)


async def test_a_scope_that_selects_nothing_is_refused(engine: Engine, store: ArtifactStore) -> None:
    scope = Scope((TokenSelector(positions=PositionRange(500)),))
    with pytest.raises(InvalidArgument, match="scope: selects no token"):
        await events_of(engine, store, reading(prompts(3), scope=scope, store=True))


async def test_a_value_beyond_float16_is_refused_and_not_made_infinite(engine: Engine, store: ArtifactStore) -> None:
    large = torch.full((loaded("llama").info.d_model,), 1e5)
    add = Edit(AddVector(Vector(values=large)), Site.RESID_POST, layers=(2,))
    job = reading(prompts(3), program=bound(Program(edits=(add,))), dtype=torch.float16)
    with pytest.raises(InvalidArgument, match="dtype: an activation is beyond the largest float16"):
        await events_of(engine, store, job)


async def test_more_than_is_kept_of_one_text_is_refused_before_it_runs(
    engine: Engine, store: ArtifactStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job_module, "MAX_TEXT_BYTES", 1000)
    with pytest.raises(InvalidArgument, match="layers: 30 tokens of text 0 have"):
        await events_of(engine, store, reading(prompts(30)))


async def test_leaving_early_leaves_nothing_in_the_engine(engine: Engine, store: ArtifactStore) -> None:
    events: AsyncIterator[Any] = read_activations(
        engine, store, loaded("llama").info, word_encoder(), reading(prompts(*[30] * 30))
    )
    async with aclosing(events):  # type: ignore[type-var]
        await anext(events)
    async with asyncio.timeout(PATIENCE_SECONDS):
        while (stats := engine.stats()).running or stats.waiting:
            await asyncio.sleep(0.01)

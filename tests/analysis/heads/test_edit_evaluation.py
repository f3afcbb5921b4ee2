"""What an edit of heads changes: numbers of a tiny model as in plain transformers, the effect on the embedded one."""

import asyncio
import math
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing
from pathlib import Path

import pytest
import torch
from circuit_oracle import ordinary
from transformers import AutoModelForCausalLM

from patchclamp_server.analysis.activations import mean_activations
from patchclamp_server.analysis.heads.retrieval.needles import Needle, NeedleTest
from patchclamp_server.analysis.heads.sets.edits import HeadEditMode
from patchclamp_server.analysis.heads.sets.evaluation import EditEvaluation, HeadEditEffect, evaluate_edit, random_sets
from patchclamp_server.analysis.ordinary_text import windows
from patchclamp_server.analysis.progress import Progress
from patchclamp_server.artifacts.head_sets import Head, HeadSelection
from patchclamp_server.artifacts.store import ArtifactStore
from patchclamp_server.engine.engine import Engine
from patchclamp_server.errors import InvalidArgument, RequestError
from patchclamp_server.model.load import LoadedModel
from patchclamp_server.model.sites import Site
from patchclamp_server.text.prompt import PromptEncoder

RED = Needle("Which key?", "The key is of red glass.", "red glass")
SHORT = NeedleTest(haystacks=("It rained. Nobody came. " * 5,), needles=(RED,), lengths=(150, 180), depths=(0.5,))
TEXTS = ("Nobody came that day, and it rained. " * 8, "Then he left.")
HEADS = (Head(0, 1), Head(1, 3))


@pytest.fixture
def engine(tiny_llama: LoadedModel) -> Iterator[Engine]:
    engine = Engine(tiny_llama)
    engine.start()
    yield engine
    engine.shutdown()


def job(heads: tuple[Head, ...] = HEADS, **fields: object) -> EditEvaluation:
    given = {"heads": HeadSelection(heads=heads), "test": SHORT, "texts": TEXTS, "random_sets": 3, **fields}
    return EditEvaluation(**given)  # type: ignore[arg-type]


async def events(engine: Engine, store: Path, job: EditEvaluation) -> AsyncIterator[Progress | HeadEditEffect]:
    encoder = PromptEncoder(engine.model.tokenizer, engine.model.info)
    async with aclosing(evaluate_edit(engine, ArtifactStore(store), engine.model.info, encoder, job)) as stream:
        async for event in stream:
            yield event


async def effect(engine: Engine, store: Path, job: EditEvaluation) -> HeadEditEffect:
    *_, last = [event async for event in events(engine, store, job)]
    assert isinstance(last, HeadEditEffect)
    return last


@torch.no_grad()
def plain_perplexity(directory: Path, tokens: list[tuple[int, ...]], zeroed: tuple[Head, ...]) -> float:
    """Of plain transformers, with the columns of the output projection that read a head set to zero."""
    model = AutoModelForCausalLM.from_pretrained(directory).eval()
    dim = model.config.hidden_size // model.config.num_attention_heads
    for layer, head in zeroed:
        model.model.layers[layer].self_attn.o_proj.weight[:, head * dim : (head + 1) * dim] = 0
    losses = []
    for window in tokens:
        logprobs = model(torch.tensor([window])).logits[0].log_softmax(-1)
        losses += [-float(logprobs[i, window[i + 1]]) for i in range(len(window) - 1)]
    return math.exp(sum(losses) / len(losses))


async def test_perplexity_is_that_of_plain_transformers_without_the_heads(
    engine: Engine, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    found = await effect(engine, tmp_path, job())
    encoder = PromptEncoder(engine.model.tokenizer, engine.model.info)
    tokens = windows(TEXTS, encoder, engine.model.info.context_length)
    for metrics in (found.unedited, found.edited, *found.random):
        assert metrics.perplexity == pytest.approx(plain_perplexity(tiny_llama_dir, tokens, metrics.heads), rel=1e-4)
    assert found.edited.heads == HEADS
    assert found.edited.perplexity != pytest.approx(found.unedited.perplexity, rel=1e-5)


async def test_an_edit_that_changes_nothing_changes_no_metric(engine: Engine, tmp_path: Path) -> None:
    found = await effect(engine, tmp_path, job(mode=HeadEditMode.SCALE, scale=1.0))
    for metrics in (found.edited, *found.random):
        assert metrics.perplexity == pytest.approx(found.unedited.perplexity, rel=1e-5)
        assert metrics.runs == found.unedited.runs == 2
    assert found.random_perplexity_deviation == pytest.approx(0.0, abs=1e-3)


async def test_the_modes_differ(engine: Engine, tmp_path: Path) -> None:
    perplexities = {
        mode: (await effect(engine, tmp_path, job(mode=mode, scale=2.0, random_sets=1))).edited.perplexity
        for mode in HeadEditMode
    }
    assert len({round(p, 4) for p in perplexities.values()}) == len(HeadEditMode)


async def test_means_of_the_random_sets_are_reported_with_their_spread(engine: Engine, tmp_path: Path) -> None:
    found = await effect(engine, tmp_path, job())
    drawn = torch.tensor([m.perplexity for m in found.random], dtype=torch.float64)
    assert found.random_perplexity_mean == pytest.approx(float(drawn.mean()))
    assert found.random_perplexity_deviation == pytest.approx(float(drawn.std(correction=0)))
    assert found.random_perplexity_deviation > 0


async def test_progress_counts_every_request_of_every_set(engine: Engine, tmp_path: Path) -> None:
    seen = [event async for event in events(engine, tmp_path, job())]
    encoder = PromptEncoder(engine.model.tokenizer, engine.model.info)
    total = 5 * (2 + len(windows(TEXTS, encoder, engine.model.info.context_length)))
    assert seen[:-1] == [Progress("metrics", i + 1, total) for i in range(total)]


async def test_mean_outputs_are_those_of_the_output_projections_input(
    engine: Engine, tiny_llama_dir: Path, tiny_llama: LoadedModel
) -> None:
    encoder = PromptEncoder(tiny_llama.tokenizer, tiny_llama.info)
    tokens = windows(TEXTS, encoder, tiny_llama.info.context_length)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_dir).eval()
    seen: list[list[torch.Tensor]] = [[], []]
    for layer, block in enumerate(model.model.layers):
        block.self_attn.o_proj.register_forward_pre_hook(
            lambda _, inputs, layer=layer: seen[layer].append(inputs[0][0])
        )
    with torch.no_grad():
        for window in tokens:
            model(torch.tensor([window]))
    expected = torch.stack([torch.cat([*map(ordinary, rows)]).mean(dim=0) for rows in seen]).view(2, 4, -1)
    means = await mean_activations(engine, Site.ATTN_Z, tokens)
    torch.testing.assert_close(means.view_as(expected), expected, rtol=1e-4, atol=1e-6)


def test_random_sets_are_seeded_and_hold_none_of_the_heads(tiny_llama: LoadedModel) -> None:
    sets = random_sets(HEADS, tiny_llama.info, 40, seed=1)
    assert all(len(set(drawn)) == 2 and not set(drawn) & set(HEADS) for drawn in sets)
    assert set().union(*sets) | set(HEADS) == {Head(layer, head) for layer in range(2) for head in range(4)}
    assert sets == random_sets(HEADS, tiny_llama.info, 40, seed=1)
    assert sets != random_sets(HEADS, tiny_llama.info, 40, seed=2)


@pytest.mark.parametrize(
    ("asked", "field"),
    [
        (job((*HEADS, Head(0, 0), Head(0, 2), Head(0, 3))), "heads"),
        (job(random_sets=0), "random_sets"),
        (job(random_sets=101), "random_sets"),
        (job(texts=("x", "")), "texts[0]"),
        (job((Head(5, 0),)), "heads.heads.heads[0].layer"),
        (job(mode=HeadEditMode.SCALE, scale=math.nan), "scale"),
    ],
)
async def test_what_cannot_be_evaluated_is_refused_by_field(
    engine: Engine, tmp_path: Path, asked: EditEvaluation, field: str
) -> None:
    with pytest.raises(RequestError) as refused:
        await effect(engine, tmp_path, asked)
    assert isinstance(refused.value, InvalidArgument)
    assert refused.value.field == field


async def test_an_early_end_cancels_what_the_engine_still_computes(engine: Engine, tmp_path: Path) -> None:
    async with aclosing(events(engine, tmp_path, job(random_sets=20))) as stream:
        await anext(stream)
    assert await asyncio.to_thread(engine.drain, 60.0)
    stats = engine.stats()
    assert stats.kv_blocks_free == stats.kv_blocks_total


async def test_heads_that_copy_are_needed_and_random_heads_are_not(embedded_engine: Engine, tmp_path: Path) -> None:
    """The three heads that detection puts first. benchmarks/heads.py measures it on many more runs."""
    best = (Head(17, 3), Head(18, 6), Head(20, 6))
    test = NeedleTest(lengths=(160,), depths=(0.2, 0.8), max_runs=6, seed=5)
    found = await effect(embedded_engine, tmp_path, job(best, test=test, random_sets=2))
    assert found.unedited.successes >= 4
    assert found.edited.mean_recall < found.unedited.mean_recall / 2
    assert all(drawn.mean_recall > found.edited.mean_recall for drawn in found.random)

"""A search as a job: what it streams, what it stores, and that it ends when nobody listens."""

import asyncio
from collections.abc import Iterator
from contextlib import aclosing
from pathlib import Path

import pytest
import torch

from patchclamp_server.analysis.heads.circuits.circuit import CircuitSearch
from patchclamp_server.analysis.heads.circuits.job import Circuit, find_circuit
from patchclamp_server.analysis.heads.circuits.runs import CleanCorruptPair, run
from patchclamp_server.analysis.progress import Progress
from patchclamp_server.artifacts.store import ArtifactStore
from patchclamp_server.artifacts.types import ArtifactKind, Tags
from patchclamp_server.engine.engine import Engine
from patchclamp_server.engine.exclusive import at_once
from patchclamp_server.errors import InvalidArgument
from patchclamp_server.model.load import LoadedModel


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(tmp_path)


@pytest.fixture(scope="module")
def pairs(tiny_llama: LoadedModel) -> tuple[CleanCorruptPair, ...]:
    """Prompts that differ in their first half, and the answers that tell them apart best."""
    found = []
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        clean, corrupt = torch.randint(3, 250, (2, 10), generator=generator)
        corrupt[5:] = clean[5:]
        sides = [tuple(tokens.tolist()) for tokens in (clean, corrupt)]
        ends = torch.stack([at_once(run(tiny_llama.decoder, tokens)).end for tokens in sides])
        logits = tiny_llama.decoder.logits(ends)
        told = logits[0] - logits[1]
        found.append(CleanCorruptPair(sides[0], sides[1], int(told.argmax()), int(told.argmin())))
    return tuple(found)


@pytest.fixture(scope="module")
def engine(tiny_llama: LoadedModel) -> Iterator[Engine]:
    engine = Engine(tiny_llama)
    engine.start()
    yield engine
    engine.shutdown()


async def events(engine: Engine, store: ArtifactStore, job: CircuitSearch) -> list[Progress | Circuit]:
    return [event async for event in find_circuit(engine, store, engine.model.info, job)]


async def test_progress_counts_every_stage_to_its_end_and_then_comes_the_circuit(
    engine: Engine, store: ArtifactStore, pairs: tuple[CleanCorruptPair, ...]
) -> None:
    *progress, last = await events(engine, store, CircuitSearch("mean_ablation", pairs, circuit_size=2))
    assert isinstance(last, Circuit)
    assert len(last.effects) == 8
    stages: dict[str, list[Progress]] = {}
    for event in progress:
        assert isinstance(event, Progress)
        stages.setdefault(event.stage, []).append(event)
    assert list(stages) == ["prompts", "effects", "faithfulness"]
    assert {stage: counted[-1].total for stage, counted in stages.items()} == {
        "prompts": 6,
        "effects": 3 * 8,
        "faithfulness": 3,
    }
    for counted in stages.values():
        assert [event.done for event in counted] == sorted({event.done for event in counted})
        assert counted[-1].done == counted[-1].total


async def test_the_best_heads_of_the_stored_set_are_the_circuit(
    engine: Engine, store: ArtifactStore, pairs: tuple[CleanCorruptPair, ...]
) -> None:
    job = CircuitSearch("mean_ablation", pairs, circuit_size=3, description="tiny", tags=Tags(("circuit",)))
    *_, result = await events(engine, store, job)
    assert isinstance(result, Circuit)
    stored = store.get("circuit")
    assert stored.info.id == result.artifact.id
    assert stored.info.kind is ArtifactKind.HEAD_SET
    assert stored.info.model_fingerprint == engine.model.info.fingerprint
    scores, low, high = stored.head_scores()
    assert scores.shape == (2, 4)
    assert low is not None
    assert high is not None
    assert bool((low >= 0).all())
    assert bool((low <= scores).all())
    assert bool((scores <= high).all())
    for effect in result.effects:
        assert scores[effect.layer, effect.head] == pytest.approx(abs(effect.effect))
    above = (scores >= stored.info.evidence["threshold"]).nonzero().tolist()
    assert sorted(above) == sorted([e.layer, e.head] for e in result.effects[:3])


async def test_the_stored_set_tells_how_it_was_found_and_what_was_measured(
    engine: Engine, store: ArtifactStore, pairs: tuple[CleanCorruptPair, ...]
) -> None:
    job = CircuitSearch("activation_patching", pairs, circuit_size=2, random_sets=4, seed=2**63)
    *_, result = await events(engine, store, job)
    assert isinstance(result, Circuit)
    provenance, evidence = result.artifact.provenance, result.artifact.evidence
    assert provenance["method"] == "activation_patching"
    assert provenance["parameters"] == {"circuit_size": 2, "random_sets": 4, "seed": str(2**63)}
    assert provenance["pairs"] == 3
    assert provenance["pairs_digest"].startswith("sha256:")
    assert evidence["clean_metric"] == result.clean_metric > result.corrupt_metric == evidence["corrupt_metric"]
    assert evidence["faithfulness"] == result.faithfulness
    random = torch.tensor(evidence["random_faithfulness"])
    assert len(random) == 4
    assert float(random.mean()) == pytest.approx(result.random_faithfulness_mean, abs=1e-5)
    assert float(random.std()) == pytest.approx(result.random_faithfulness_deviation, abs=1e-5)
    assert [(head["layer"], head["head"], head["effect"]) for head in evidence["circuit"]] == [
        (e.layer, e.head, pytest.approx(e.effect)) for e in result.effects[:2]
    ]
    assert evidence["means"] == "by position"


async def test_equal_searches_give_one_artifact(
    engine: Engine, store: ArtifactStore, pairs: tuple[CleanCorruptPair, ...]
) -> None:
    job = CircuitSearch("path_patching", pairs, circuit_size=2, seed=5)
    *_, first = await events(engine, store, job)
    *_, second = await events(engine, store, job)
    assert first == second


async def test_a_search_that_is_left_early_stores_nothing(
    engine: Engine, store: ArtifactStore, pairs: tuple[CleanCorruptPair, ...]
) -> None:
    async with aclosing(
        find_circuit(engine, store, engine.model.info, CircuitSearch("path_patching", pairs, 2))
    ) as job:
        assert await anext(job) == Progress("prompts", 1, 6)
    assert store.list() == ([], "")


async def test_a_search_that_is_cancelled_while_it_computes_stores_nothing(
    engine: Engine, store: ArtifactStore, pairs: tuple[CleanCorruptPair, ...]
) -> None:
    search = asyncio.create_task(events(engine, store, CircuitSearch("mean_ablation", pairs * 50, circuit_size=2)))
    await asyncio.sleep(0)
    search.cancel()
    with pytest.raises(asyncio.CancelledError):
        await search
    assert store.list() == ([], "")


async def test_a_refusal_reaches_who_asked(
    engine: Engine, store: ArtifactStore, pairs: tuple[CleanCorruptPair, ...]
) -> None:
    shorter = CleanCorruptPair((3, 4), (3,), 5, 6)
    with pytest.raises(InvalidArgument) as refused:
        await events(engine, store, CircuitSearch("path_patching", (*pairs, shorter)))
    assert refused.value.field == "pairs[3].corrupt"

"""A scoring job: what it stores, and that ending it ends the work."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import torch
from engine_runs import started
from planted_heads import INDUCTION, planted

from patchclamp.v1 import head_pb2
from patchclamp_server.analysis.heads.scores.job import Result, score_heads
from patchclamp_server.analysis.heads.scores.registry import SCORING_METHODS
from patchclamp_server.analysis.heads.scores.scoring import Scoring, ends, resampled_means
from patchclamp_server.analysis.progress import Progress
from patchclamp_server.artifacts.head_sets import load_head_set
from patchclamp_server.artifacts.store import ArtifactStore
from patchclamp_server.artifacts.types import ArtifactKind, Tags
from patchclamp_server.text.prompt import PromptEncoder

JOB = Scoring("ngram", sequence_tokens=16, sequences=3, seed=2**63, description="bigrams", tags=Tags(("bigram",)))


async def events(store: ArtifactStore, job: Scoring) -> AsyncIterator[Progress | Result]:
    model = planted()
    with started(model) as engine:
        scored = score_heads(engine, store, model.info, PromptEncoder(model.tokenizer, model.info), job)
        async for event in scored:
            yield event


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(tmp_path)


async def test_progress_comes_before_the_result(store: ArtifactStore) -> None:
    *progress, result = [event async for event in events(store, JOB)]
    assert progress == [Progress("sequences", done, 3) for done in (1, 2, 3)]
    assert isinstance(result, Result)


async def test_scores_and_their_intervals_are_stored_as_a_head_set(store: ArtifactStore) -> None:
    *_, result = [event async for event in events(store, JOB)]
    assert isinstance(result, Result)
    stored = store.get("bigram")
    assert stored.info.id == result.artifact.id
    assert stored.info.kind is ArtifactKind.HEAD_SET
    assert stored.info.model_fingerprint == planted().info.fingerprint
    for mine, kept in zip(
        (result.found.scores, result.found.low, result.found.high), stored.head_scores(), strict=True
    ):
        assert mine is not None
        assert kept is not None
        assert torch.equal(mine, kept)


async def test_the_artifact_says_how_it_was_made_and_what_chance_gives(store: ArtifactStore) -> None:
    *_, result = [event async for event in events(store, JOB)]
    assert isinstance(result, Result)
    assert result.artifact.description == "bigrams"
    assert result.artifact.provenance == {
        "method": "ngram",
        "parameters": {"seed": str(2**63), "sequence_tokens": 16, "sequences": 3, "ngram": 2},
        "model": "planted heads",
    }
    evidence = result.artifact.evidence
    assert evidence["random"]["max"] == evidence["threshold"] == pytest.approx(float(result.found.control.max()))
    assert evidence["heads"]["mean"] == pytest.approx(float(result.found.scores.mean()))
    assert evidence["random_of_best"][0]["layer"] == result.found.best[0][0]


async def test_heads_above_chance_are_those_of_the_stored_threshold(store: ArtifactStore) -> None:
    *_, result = [event async for event in events(store, Scoring("induction", sequence_tokens=16))]
    assert isinstance(result, Result)
    assert load_head_set(result.artifact.id, store, "head_set").best(0) == (INDUCTION,)


async def test_a_set_of_one_measurement_has_no_intervals(store: ArtifactStore) -> None:
    *_, result = [event async for event in events(store, Scoring("ov_nuclear_norm"))]
    assert isinstance(result, Result)
    assert store.get(result.artifact.id).head_scores()[1:] == (None, None)


def test_every_method_of_the_contract_is_registered() -> None:
    names = head_pb2.HeadScoreMethod.keys()[1:]
    assert {f"HEAD_SCORE_METHOD_{name.upper()}" for name in SCORING_METHODS} == set(names)


def test_intervals_are_those_of_resampled_means() -> None:
    samples = torch.randn(400, 2, 3, generator=torch.Generator().manual_seed(0))
    low, high = ends(resampled_means(samples, seed=1))
    # 1.96 standard errors to both sides.
    error = samples.std(0) / 400**0.5
    torch.testing.assert_close(low, samples.mean(0) - 1.96 * error, atol=0.02, rtol=0)
    torch.testing.assert_close(high, samples.mean(0) + 1.96 * error, atol=0.02, rtol=0)

"""On the embedded model: detection end to end, against plain transformers with full attention matrices."""

import asyncio
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path

import pytest
import pytest_asyncio
import torch
from heads_fixtures import writer
from naive_retrieval import naive_mean, naive_run, naive_success
from transformers import AutoModelForCausalLM

from patchclamp_server.analysis.heads.retrieval.detect import Detection, RetrievalHeads, detect
from patchclamp_server.analysis.heads.retrieval.needle_run import NeedleRun
from patchclamp_server.analysis.heads.retrieval.needles import Needle, NeedleTest, plan
from patchclamp_server.analysis.heads.retrieval.stopping import StoppingRule
from patchclamp_server.analysis.heads.sets.overlap import rank_correlation
from patchclamp_server.analysis.progress import Progress
from patchclamp_server.artifacts.head_sets import Head, HeadSelection, select
from patchclamp_server.artifacts.store import ArtifactStore
from patchclamp_server.artifacts.types import Tags
from patchclamp_server.engine.config import EngineConfig, Unobserved
from patchclamp_server.engine.engine import Engine
from patchclamp_server.errors import FailedPrecondition
from patchclamp_server.model.load import LoadedModel
from patchclamp_server.text.prompt import PromptEncoder

pytestmark = pytest.mark.asyncio(loop_scope="module")
# Short needles in short texts: seconds, not minutes.
TEST = NeedleTest(lengths=(120, 180), depths=(0.2, 0.8), max_runs=6, seed=5)


class Outcomes(Unobserved):
    def __init__(self) -> None:
        self.ended: list[str] = []

    def on_finished(self, outcome: str) -> None:
        self.ended.append(outcome)


@dataclass(frozen=True)
class Detected:
    events: list[Progress | NeedleRun | RetrievalHeads]
    store: ArtifactStore

    @property
    def runs(self) -> list[NeedleRun]:
        return [event for event in self.events if isinstance(event, NeedleRun)]

    @property
    def result(self) -> RetrievalHeads:
        last = self.events[-1]
        assert isinstance(last, RetrievalHeads)
        return last


async def run(engine: Engine, store: ArtifactStore, job: Detection) -> Detected:
    model = engine.model
    encoder = PromptEncoder(model.tokenizer, model.info)
    async with aclosing(detect(engine, store, model.info, encoder, job)) as events:
        return Detected([event async for event in events], store)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def detected(embedded_engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Detected:
    store = ArtifactStore(tmp_path_factory.mktemp("head_sets"))
    return await run(embedded_engine, store, Detection(TEST, tags=Tags(("found",))))


async def test_the_scores_are_those_of_full_attention_matrices(
    detected: Detected, embedded: LoadedModel, embedded_dir: Path
) -> None:
    naive = AutoModelForCausalLM.from_pretrained(embedded_dir, attn_implementation="eager").eval()
    write = writer(embedded, TEST)
    successes = []
    for placement, ours in zip(plan(TEST, embedded.info).placements, detected.runs, strict=True):
        prompt = write.write(placement)
        found = naive_run(naive, prompt.ids, prompt.needle, prompt.max_tokens, embedded.eos_token_ids, cache=True)
        text = embedded.tokenizer.decode(found.tokens, skip_special_tokens=True)
        assert text.strip() == ours.answer
        success = naive_success(text, write.plan.needles[placement.needle].answer)
        assert success == ours.success
        if success:
            successes.append(found)
    assert detected.result.successes == len(successes) >= 3
    expected = naive_mean(successes)
    scores, _, _ = detected.store.get("found").head_scores()
    torch.testing.assert_close(scores.double(), expected, rtol=0, atol=0.02)
    assert rank_correlation(scores, expected) >= 0.95
    tenth = expected.flatten().sort(descending=True).values[9]
    assert all(expected[found.head] >= tenth - 0.02 for found in detected.result.scores[:10])


async def test_a_few_heads_of_the_upper_layers_do_the_copying(detected: Detected) -> None:
    result = detected.result
    assert result.scores[0].score > 0.4
    assert 0.01 < result.fraction_above_threshold < 0.15
    assert all(found.head.layer >= 10 for found in result.scores[:5])
    assert sum(found.score == 0.0 for found in result.scores) > 150


async def test_every_run_is_streamed_before_its_progress_and_the_result_is_last(detected: Detected) -> None:
    kinds = [type(event) for event in detected.events]
    assert kinds == [NeedleRun, Progress] * 6 + [RetrievalHeads]
    assert detected.events[-2] == Progress("needles", 6, 6)
    assert len({(run.needle, run.length, run.depth) for run in detected.runs}) == 6


async def test_the_result_is_stored_as_a_head_set_with_its_evidence(detected: Detected, embedded: LoadedModel) -> None:
    result = detected.result
    artifact = detected.store.get("found")
    scores, low, high = artifact.head_scores()
    for found in result.scores:
        assert low is not None
        assert high is not None
        assert found.low <= found.score <= found.high
        assert (found.score, found.low, found.high) == (scores[found.head], low[found.head], high[found.head])
    assert result.scores == tuple(sorted(result.scores, key=lambda s: (-s.score, s.head)))
    evidence = artifact.info.evidence
    assert evidence["threshold"] == result.threshold == 0.1
    assert (evidence["runs"], evidence["successes"]) == (6, result.successes)
    assert evidence["fraction_above_threshold"] == result.fraction_above_threshold
    assert [Head(*pair) for pair in evidence["always_on"]] == [s.head for s in result.scores if s.always_on]
    assert len(evidence["needles"]) == 6
    provenance = artifact.info.provenance
    assert (provenance["method"], provenance["model"]) == ("retrieval", embedded.info.name)
    assert provenance["parameters"]["lengths"] == [120, 180]
    chosen = select(HeadSelection(head_set="found"), detected.store, embedded.info, "heads")
    assert len(chosen) == round(result.fraction_above_threshold * 270)


async def test_always_on_heads_scored_in_every_success(detected: Detected) -> None:
    always = [found for found in detected.result.scores if found.always_on]
    assert always
    assert all(found.score > 0 for found in always)


async def test_it_stops_when_the_ranking_is_stable_and_says_so(embedded_engine: Engine, tmp_path: Path) -> None:
    rule = StoppingRule(top_k=3, agreement=0.3, window=1, min_successes=2)
    found = await run(embedded_engine, ArtifactStore(tmp_path), Detection(TEST, stopping=rule))
    assert found.result.stopped_early
    assert found.result.runs == len(found.runs) < 6
    assert found.result.successes == 2
    assert found.result.artifact.evidence["stopped_early"] is True


async def test_an_early_end_cancels_what_the_engine_still_computes(embedded: LoadedModel, tmp_path: Path) -> None:
    """One sequence at a time, so that most have not begun when the first run is there."""
    engine, outcomes = Engine(embedded, EngineConfig(max_sequences=1)), Outcomes()
    engine.observer = outcomes
    engine.start()
    encoder = PromptEncoder(embedded.tokenizer, embedded.info)
    async with aclosing(detect(engine, ArtifactStore(tmp_path), embedded.info, encoder, Detection(TEST))) as events:
        await anext(events)
    assert await asyncio.to_thread(engine.drain, 60.0)
    stats = engine.stats()
    engine.shutdown()
    assert stats.kv_blocks_free == stats.kv_blocks_total
    assert outcomes.ended.count("cancelled") >= 3
    assert len(outcomes.ended) == 6
    assert ArtifactStore(tmp_path).list() == ([], "")


async def test_a_model_that_answers_nothing_has_no_scores(embedded_engine: Engine, tmp_path: Path) -> None:
    riddle = Needle("What is the capital of France?", "Qx zzv wk jj pqv zzt.", "zzv wk jj pqv")
    job = Detection(NeedleTest(needles=(riddle,), lengths=(120,), depths=(0.5,)))
    with pytest.raises(FailedPrecondition, match="answered none of 1 needles") as refused:
        await run(embedded_engine, ArtifactStore(tmp_path), job)
    assert refused.value.field == "test"

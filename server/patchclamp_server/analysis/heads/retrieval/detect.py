"""Detects retrieval heads once: needles in text → answers, and where heads looked → scores → stored head set."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import asdict, dataclass, field
from functools import partial
from statistics import fmean

from torch import Tensor

from patchclamp_server.analysis.heads.retrieval.needle_prompt import NeedlePrompt, PromptWriter
from patchclamp_server.analysis.heads.retrieval.needle_run import NeedleRun, generated_ids, needle_request, needle_run
from patchclamp_server.analysis.heads.retrieval.needles import NeedleTest, Plan, plan
from patchclamp_server.analysis.heads.retrieval.retrieval_scores import RetrievalScores, run_scores
from patchclamp_server.analysis.heads.retrieval.stopping import StoppingRule
from patchclamp_server.analysis.heads.scores.scoring import RESAMPLES
from patchclamp_server.analysis.progress import Progress
from patchclamp_server.analysis.requests import completed
from patchclamp_server.artifacts.head_sets import DEFAULT_THRESHOLD, Head, ranked
from patchclamp_server.artifacts.store import ArtifactStore
from patchclamp_server.artifacts.types import NO_TAGS, ArtifactInfo, ArtifactKind, Tags
from patchclamp_server.engine.engine import Engine
from patchclamp_server.engine.request import Event, Readouts
from patchclamp_server.errors import FailedPrecondition, InvalidArgument
from patchclamp_server.interventions.bind import bind
from patchclamp_server.interventions.bound import BoundProgram
from patchclamp_server.interventions.program import GENERATING, HeadReadout, Program, Readout
from patchclamp_server.model.info import ModelInfo
from patchclamp_server.model.sites import Site
from patchclamp_server.text.detokenize import token_bytes
from patchclamp_server.text.prompt import PromptEncoder

# The evidence has so many runs one by one, and characters of an answer: metadata of an artifact is bounded.
EVIDENCE_RUNS = 200
EVIDENCE_ANSWER = 100


@dataclass(frozen=True)
class Detection:
    """What to detect. With `stopping` None all runs of the test count."""

    test: NeedleTest = field(default_factory=NeedleTest)
    threshold: float = DEFAULT_THRESHOLD
    stopping: StoppingRule | None = None
    description: str = ""
    tags: Tags = NO_TAGS


@dataclass(frozen=True)
class RetrievalHead:
    """A head and its score. `low` and `high` are a 95 % bootstrap interval over runs; `always_on` says that it scored
    in every successful run."""

    head: Head
    score: float
    low: float
    high: float
    always_on: bool


@dataclass(frozen=True)
class RetrievalHeads:
    """Has the fields of the message of this name; `scores` has all heads, best first."""

    artifact: ArtifactInfo
    scores: tuple[RetrievalHead, ...]
    runs: int
    successes: int
    threshold: float
    fraction_above_threshold: float
    stability: float
    stopped_early: bool


async def detect(
    engine: Engine, store: ArtifactStore, info: ModelInfo, prompts: PromptEncoder, job: Detection
) -> AsyncGenerator[Progress | NeedleRun | RetrievalHeads, None]:
    """Yields every run and the progress, then the result. Ending the iteration early cancels what the engine still
    computes. Runs count in the order of the plan, so the result does not depend on which of them is done first.

    Raises InvalidArgument (field path), and FailedPrecondition when the model answered from no needle.
    """
    if not 0.0 < job.threshold <= 1.0:
        raise InvalidArgument("threshold", f"{job.threshold:g} is not a share above 0 and up to 1")
    if job.stopping is not None:
        job.stopping.check(info.n_layers * info.n_heads, "stopping")
    planned = await prompts.analysis.run(plan, job.test, info)
    writer = PromptWriter(planned, info, prompts, token_bytes(engine.model.tokenizer))
    written = [await prompts.analysis.run(writer.write, placement) for placement in planned.placements]
    program = reading_all_heads(info)
    scores = RetrievalScores()
    done: list[NeedleRun] = []
    stable = False
    async with aclosing(completed(engine, [partial(needle_request, prompt, program) for prompt in written])) as answers:
        async for events in answers:
            run, prompt = needle_run(planned, len(done), events), written[len(done)]
            done.append(run)
            if run.success:
                scores.runs.append(await asyncio.to_thread(_scores, prompt, events, info))
            yield run
            yield Progress("needles", len(done), len(written))
            if run.success and job.stopping is not None and job.stopping.holds(scores):
                stable = True
                break
    if not scores.runs:
        raise FailedPrecondition(
            "test",
            f"the model answered none of {len(done)} needles (best recall {max(run.recall for run in done):.2f}); a "
            "score is a mean over successful runs: ask for shorter lengths, or bring needles that it can answer",
        )
    stopped = stable and len(done) < len(written)
    yield await asyncio.to_thread(_store, store, info, job, planned, scores, done, stopped)


def reading_all_heads(info: ModelInfo) -> BoundProgram:
    """Returns a program that changes nothing and reads where every head looks when a token is generated."""
    readout = Readout(HeadReadout(heads=()), Site.ATTN_Z, name="heads", all_layers=True, scope=GENERATING)
    return bind(Program(readouts=(readout,)), info)


def _scores(prompt: NeedlePrompt, events: Sequence[Event], info: ModelInfo) -> Tensor:
    values = [value for event in events if isinstance(event, Readouts) for value in event.values]
    tokens = (*prompt.ids, *generated_ids(events))
    return run_scores(values, tokens, prompt.needle, (info.n_layers, info.n_heads))


def _store(
    store: ArtifactStore,
    info: ModelInfo,
    job: Detection,
    planned: Plan,
    scores: RetrievalScores,
    done: Sequence[NeedleRun],
    stopped: bool,
) -> RetrievalHeads:
    seed = job.test.seed
    # Scores are taken as they are stored, so that the set has the heads that are counted here.
    mean, always = scores.mean.float(), scores.always_on
    low, high = scores.interval(seed)
    heads = tuple(
        RetrievalHead(head, float(mean[head]), float(low[head]), float(high[head]), bool(always[head]))
        for head in ranked(mean)
    )
    fraction = float((mean >= job.threshold).double().mean())
    stability = scores.stability(seed)
    artifact = store.put(
        ArtifactKind.HEAD_SET,
        {"scores": mean, "low": low, "high": high},
        model_fingerprint=info.fingerprint,
        description=job.description,
        provenance=_provenance(info, job, planned),
        evidence={
            "threshold": job.threshold,
            "runs": len(done),
            "successes": len(scores.runs),
            "mean_recall": fmean(run.recall for run in done),
            "fraction_above_threshold": fraction,
            "stability": stability,
            "stopped_early": stopped,
            "always_on": [list(found.head) for found in heads if found.always_on],
            "resamples": RESAMPLES,
            "needles": [{**asdict(run), "answer": run.answer[:EVIDENCE_ANSWER]} for run in done[:EVIDENCE_RUNS]],
        },
        tags=job.tags,
    )
    return RetrievalHeads(artifact, heads, len(done), len(scores.runs), job.threshold, fraction, stability, stopped)


def _provenance(info: ModelInfo, job: Detection, planned: Plan) -> dict[str, object]:
    return {
        "method": "retrieval",
        "parameters": {
            **planned.card(),
            # The seed is text: JSON and google.protobuf.Struct keep numbers as doubles, and a seed has 64 bits.
            "seed": str(job.test.seed),
            "stopping": None if job.stopping is None else asdict(job.stopping),
        },
        "model": info.name,
    }

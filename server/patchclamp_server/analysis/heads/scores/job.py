"""Runs one scoring of all heads: method → scores → stored head set."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from patchclamp_server.analysis.heads.scores.registry import SCORING_METHODS
from patchclamp_server.analysis.heads.scores.scoring import HeadScores, Scoring
from patchclamp_server.analysis.progress import Progress
from patchclamp_server.artifacts.store import ArtifactStore
from patchclamp_server.artifacts.types import ArtifactInfo, ArtifactKind
from patchclamp_server.engine.engine import Engine
from patchclamp_server.model.info import ModelInfo
from patchclamp_server.text.prompt import PromptEncoder


@dataclass(frozen=True, eq=False)
class Result:
    artifact: ArtifactInfo
    found: HeadScores


async def score_heads(
    engine: Engine, store: ArtifactStore, info: ModelInfo, prompts: PromptEncoder, job: Scoring
) -> AsyncGenerator[Progress | Result, None]:
    """Yields progress, then the result. Ending the iteration early cancels what is still computed.

    Raises InvalidArgument or FailedPrecondition, naming fields of Scoring, for a job that the model cannot do.
    """
    async with aclosing(SCORING_METHODS[job.method](engine, prompts, job)) as events:
        async for event in events:
            if isinstance(event, Progress):
                yield event
                continue
            artifact = await asyncio.to_thread(_store, store, info, job, event)
            yield Result(artifact, event)


def _store(store: ArtifactStore, info: ModelInfo, job: Scoring, found: HeadScores) -> ArtifactInfo:
    tensors = {"scores": found.scores}
    if found.low is not None and found.high is not None:
        tensors |= {"low": found.low, "high": found.high}
    return store.put(
        ArtifactKind.HEAD_SET,
        tensors,
        model_fingerprint=info.fingerprint,
        description=job.description,
        provenance=_provenance(info, job),
        evidence={
            # No head reached more by chance.
            "threshold": float(found.control.max()),
            "heads": {"mean": float(found.scores.mean()), "max": float(found.scores.max())},
            "random": {"mean": float(found.control.mean()), "max": float(found.control.max())},
            "random_of_best": found.by_head(found.control)["best"],
            **found.evidence,
        },
        tags=job.tags,
    )


def _provenance(info: ModelInfo, job: Scoring) -> dict[str, Any]:
    # The seed is text: JSON and google.protobuf.Struct keep numbers as doubles, and a seed has 64 bits.
    parameters: dict[str, Any] = {"seed": str(job.seed)}
    if job.method in ("induction", "previous_token", "ngram"):
        parameters |= {"sequence_tokens": job.sequence_tokens, "sequences": job.sequences}
    if job.method == "ngram":
        parameters["ngram"] = job.ngram
    return {"method": job.method, "parameters": parameters, "model": info.name}

"""Jobs of SparsityService: text in documents → a stored profile with its quality card, or cards of several policies."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass

import torch
from torch import Tensor

from patchclamp_server.analysis.digests import json_digest
from patchclamp_server.analysis.progress import Progress, Steps
from patchclamp_server.analysis.requests import exclusively
from patchclamp_server.analysis.sparsity.calibrate import calibrate_on
from patchclamp_server.analysis.sparsity.control import asked_ratio, control_of
from patchclamp_server.analysis.sparsity.quality_card import QualityCard, measure_quality, prompt_tokens
from patchclamp_server.analysis.sparsity.speed import RUNS, SpeedCard, measure_speed
from patchclamp_server.artifacts.store import ArtifactStore
from patchclamp_server.artifacts.types import NO_TAGS, ArtifactInfo, ArtifactKind, Tags
from patchclamp_server.engine.engine import Engine
from patchclamp_server.engine.exclusive import Telling, Work
from patchclamp_server.model.info import ModelInfo
from patchclamp_server.sparsity.binder import Bound
from patchclamp_server.sparsity.mlp import SparseModel
from patchclamp_server.sparsity.parameters import parameters_of
from patchclamp_server.sparsity.policy import Policy, Selector
from patchclamp_server.sparsity.profile import Profile


@dataclass(frozen=True, eq=False)
class Text:
    """Documents [n, tokens] of one length, and where they are from."""

    documents: Tensor
    description: str = ""

    @property
    def digest(self) -> str:
        """Of the token ids of all documents in order: [[id, ...], ...]."""
        return json_digest(self.documents.tolist())


@dataclass(frozen=True, eq=False)
class Calibration:
    """What to calibrate: a policy that has something to calibrate, on all documents but the last `heldout`."""

    policy: Policy
    text: Text
    heldout: int
    description: str = ""
    tags: Tags = NO_TAGS


@dataclass(frozen=True)
class CalibratedProfile:
    artifact: ArtifactInfo
    quality: QualityCard
    random_control: QualityCard


@dataclass(frozen=True)
class Evaluation:
    """`keep_ratio`: the share asked for (the mean of its layers); what was kept, for a policy that takes no ratio."""

    index: int
    policy: str
    keep_ratio: float
    quality: QualityCard
    random_control: QualityCard
    speed: SpeedCard | None


async def calibrate_profile(
    engine: Engine, store: ArtifactStore, info: ModelInfo, job: Calibration
) -> AsyncGenerator[Progress | CalibratedProfile, None]:
    """Calibrates, measures the policy on the documents that were held out, and stores the profile.

    Yields progress of the stages "calibration" and "quality", then the profile. Ending the iteration early ends what is
    still computed.
    """
    documents, profile = job.text.documents, None
    calibration, heldout = documents[: -job.heldout], documents[-job.heldout :]
    async with aclosing(calibrate_on(engine, job.policy, calibration)) as events:
        async for event in events:
            if isinstance(event, Progress):
                yield event
            else:
                profile = event
    assert profile is not None
    work = _measured(engine.sparse_model, job.policy, profile, heldout)
    told: AsyncGenerator[Progress | _Calibrated, None] = exclusively(engine, work)
    async with aclosing(told) as measured:
        async for step in measured:
            yield step if isinstance(step, Progress) else await asyncio.to_thread(_store, store, info, job, step)


async def evaluate(
    engine: Engine, asked: Sequence[Bound], text: Text, *, speed: bool
) -> AsyncGenerator[Progress | Evaluation, None]:
    """Yields progress of the stages "quality" and "speed", and an evaluation of each policy as soon as it is there."""
    model, documents = engine.sparse_model, text.documents
    quality_steps = Steps("quality", 2 * len(documents) * len(asked))
    speed_steps = Steps("speed", RUNS * len(asked))
    for index, bound in enumerate(asked):
        cards: tuple[QualityCard, QualityCard] | None = None
        work = _cards(model, documents, bound.policy, bound.selector, quality_steps)
        told: AsyncGenerator[Progress | tuple[QualityCard, QualityCard], None] = exclusively(engine, work)
        async with aclosing(told) as events:
            async for event in events:
                if isinstance(event, Progress):
                    yield event
                else:
                    cards = event
        assert cards is not None
        quality, control = cards
        card = None
        if speed:
            prompt = documents[0, : prompt_tokens(documents)].tolist()
            async with aclosing(measure_speed(engine, bound, prompt, speed_steps)) as runs:
                async for run in runs:
                    if isinstance(run, Progress):
                        yield run
                    else:
                        card = run
        keep_ratio = asked_ratio(bound.policy)
        if keep_ratio is None:
            keep_ratio = 1.0 - quality.sparsity
        yield Evaluation(index, bound.policy.name, keep_ratio, quality, control, card)


@dataclass(frozen=True, eq=False)
class _Calibrated:
    """What is stored."""

    profile: Profile
    quality: QualityCard
    control: QualityCard


def _measured(model: SparseModel, policy: Policy, profile: Profile, heldout: Tensor) -> Work[Progress | _Calibrated]:
    steps = Steps("quality", 2 * len(heldout))
    cards = yield from _with_control(model, heldout, policy, policy.bind(model, profile), steps)
    yield _Calibrated(profile, *cards)


def _cards(
    model: SparseModel, documents: Tensor, policy: Policy, selector: Selector, steps: Steps
) -> Work[Progress | tuple[QualityCard, QualityCard]]:
    yield (yield from _with_control(model, documents, policy, selector, steps))


def _with_control(
    model: SparseModel, documents: Tensor, policy: Policy, selector: Selector, steps: Steps
) -> Telling[Progress, tuple[QualityCard, QualityCard]]:
    quality = yield from measure_quality(model, documents, selector, steps)
    control = control_of(policy, selector, model, quality.sparsity)
    return quality, (yield from measure_quality(model, documents, control, steps))


def _store(store: ArtifactStore, info: ModelInfo, job: Calibration, found: _Calibrated) -> CalibratedProfile:
    documents = job.text.documents
    artifact = store.put(
        ArtifactKind.SPARSITY_PROFILE,
        {name: _stored(tensor) for name, tensor in found.profile.tensors.items()},
        model_fingerprint=info.fingerprint,
        description=job.description,
        provenance={
            "method": "calibration",
            "policy": job.policy.name,
            "parameters": parameters_of(job.policy),
            "text": {
                "description": job.text.description,
                "digest": job.text.digest,
                "documents": len(documents) - job.heldout,
                "heldout_documents": job.heldout,
                "document_tokens": documents.shape[1],
            },
            "model": info.name,
        },
        evidence={"quality": found.quality.as_json(), "random_control": found.control.as_json()},
        tags=job.tags,
    )
    return CalibratedProfile(artifact, found.quality, found.control)


def _stored(tensor: Tensor) -> Tensor:
    """As profiles are stored, whatever the model computes in."""
    return tensor.detach().cpu().to(torch.float32 if tensor.is_floating_point() else torch.int64)

"""Runs SparsityService's jobs: text in documents → a stored profile with its quality card, or cards of policies."""

import asyncio
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from patchclamp_server.analysis.digests import json_digest
from patchclamp_server.analysis.progress import Progress, Steps
from patchclamp_server.analysis.sparsity.calibrate import calibrate_on
from patchclamp_server.analysis.sparsity.control import asked_ratio, control_of
from patchclamp_server.analysis.sparsity.quality_card import QualityCard, measure_quality, prompt_tokens
from patchclamp_server.analysis.sparsity.speed import RUNS, SpeedCard, measure_speed
from patchclamp_server.artifacts.store import ArtifactStore
from patchclamp_server.artifacts.types import NO_TAGS, ArtifactInfo, ArtifactKind, Tags
from patchclamp_server.engine.engine import Engine
from patchclamp_server.model.info import ModelInfo
from patchclamp_server.sparsity.binder import Bound
from patchclamp_server.sparsity.parameters import parameters_of
from patchclamp_server.sparsity.policy import Policy, Selector
from patchclamp_server.sparsity.profile import Profile

# The first card is that of a policy, the second that of its control.
Cards: TypeAlias = tuple[QualityCard, QualityCard]


@dataclass(frozen=True, eq=False)
class Text:
    """Documents [n, tokens] of one length, and where they are from."""

    documents: Tensor
    description: str = ""

    @property
    def digest(self) -> str:
        """Returns the digest of the token ids of all documents in order: [[id, ...], ...]."""
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
    """An evaluation. `keep_ratio` is the share asked for (the mean of its layers), or what was kept, for a policy that
    takes no ratio."""

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
    selector = job.policy.bind(engine.sparse_model, profile)
    steps = Steps("quality", 2 * len(heldout))
    async with aclosing(_with_control(engine, job.policy, selector, heldout, steps)) as measured:
        async for step in measured:
            if isinstance(step, Progress):
                yield step
            else:
                yield await asyncio.to_thread(_store, store, info, job, profile, step)


async def evaluate(
    engine: Engine, asked: Sequence[Bound], text: Text, *, speed: bool
) -> AsyncGenerator[Progress | Evaluation, None]:
    """Yields progress of the stages "quality" and "speed", and an evaluation of each policy as soon as it is there."""
    documents = text.documents
    quality_steps = Steps("quality", 2 * len(documents) * len(asked))
    speed_steps = Steps("speed", RUNS * len(asked))
    for index, bound in enumerate(asked):
        cards: Cards | None = None
        async with aclosing(_with_control(engine, bound.policy, bound.selector, documents, quality_steps)) as events:
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


async def _with_control(
    engine: Engine, policy: Policy, selector: Selector, documents: Tensor, steps: Steps
) -> AsyncGenerator[Progress | Cards, None]:
    """Yields progress, then the card of a policy and that of its control."""
    cards: list[QualityCard] = []

    def together() -> Iterator[list[Selector]]:
        if asked_ratio(policy) is not None:
            yield [selector, control_of(policy, selector, engine.sparse_model, 0.0)]
            return
        # The control has the size that the policy is found to have.
        yield [selector]
        yield [control_of(policy, selector, engine.sparse_model, cards[0].sparsity)]

    for selectors in together():
        async with aclosing(measure_quality(engine, documents, selectors, steps)) as events:
            async for event in events:
                if isinstance(event, Progress):
                    yield event
                else:
                    cards.append(event)
    quality, control = cards
    yield quality, control


def _store(
    store: ArtifactStore, info: ModelInfo, job: Calibration, profile: Profile, cards: Cards
) -> CalibratedProfile:
    documents, (quality, control) = job.text.documents, cards
    artifact = store.put(
        ArtifactKind.SPARSITY_PROFILE,
        {name: _stored(tensor) for name, tensor in profile.tensors.items()},
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
        evidence={"quality": quality.as_json(), "random_control": control.as_json()},
        tags=job.tags,
    )
    return CalibratedProfile(artifact, quality, control)


def _stored(tensor: Tensor) -> Tensor:
    """Returns a tensor in the type that profiles are stored in, whatever the model computes in."""
    return tensor.detach().cpu().to(torch.float32 if tensor.is_floating_point() else torch.int64)

"""Jobs of SparsityService: text in documents → a stored profile with its quality card, or cards of several policies."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from patchclamp_server.analysis.progress import Progress, Steps
from patchclamp_server.analysis.sparsity.calibrate import calibrate
from patchclamp_server.analysis.sparsity.control import asked_ratio, control_of
from patchclamp_server.analysis.sparsity.quality_card import QualityCard, measure_quality, prompt_tokens
from patchclamp_server.analysis.sparsity.speed import RUNS, SpeedCard, measure_speed
from patchclamp_server.artifacts.store import ArtifactStore
from patchclamp_server.artifacts.types import NO_TAGS, ArtifactInfo, ArtifactKind, Tags
from patchclamp_server.engine.engine import Engine
from patchclamp_server.model.info import ModelInfo
from patchclamp_server.sparsity.binder import Bound
from patchclamp_server.sparsity.mlp import SparseModel
from patchclamp_server.sparsity.parameters import parameters_of
from patchclamp_server.sparsity.policy import Policy, Selector


@dataclass(frozen=True, eq=False)
class Text:
    """Documents [n, tokens] of one length, and where they are from."""

    documents: Tensor
    description: str = ""

    @property
    def digest(self) -> str:
        """SHA-256 of the token ids of all documents in order, as JSON without spaces: [[id, ...], ...]."""
        ids = json.dumps(self.documents.tolist(), separators=(",", ":"))
        return "sha256:" + hashlib.sha256(ids.encode()).hexdigest()


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


@torch.inference_mode()
def calibrate_profile(
    model: SparseModel, store: ArtifactStore, info: ModelInfo, job: Calibration, progress: Progress
) -> CalibratedProfile:
    """Calibrates, measures the policy on the documents that were held out, and stores the profile.

    The stages of `progress` are "calibration" and "quality".
    """
    documents = job.text.documents
    calibration, heldout = documents[: -job.heldout], documents[-job.heldout :]
    profile = calibrate(job.policy, model, calibration, progress=progress)
    selector = job.policy.bind(model, profile)
    steps = Steps(progress, "quality", 2 * len(heldout))
    quality, control = _with_control(model, heldout, job.policy, selector, steps)
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
                "documents": len(calibration),
                "heldout_documents": len(heldout),
                "document_tokens": documents.shape[1],
            },
            "model": info.name,
        },
        evidence={"quality": quality.as_json(), "random_control": control.as_json()},
        tags=job.tags,
    )
    return CalibratedProfile(artifact, quality, control)


def evaluate(
    engine: Engine, asked: Sequence[Bound], text: Text, progress: Progress, *, speed: bool
) -> Iterator[Evaluation]:
    """An evaluation of each policy, as soon as it is there. The stages of `progress` are "quality" and "speed"."""
    model, documents = engine.sparse_model, text.documents
    quality_steps = Steps(progress, "quality", 2 * len(documents) * len(asked))
    speed_steps = Steps(progress, "speed", RUNS * len(asked))
    for index, bound in enumerate(asked):
        quality, control = _with_control(model, documents, bound.policy, bound.selector, quality_steps)
        card = None
        if speed:
            prompt = documents[0, : prompt_tokens(documents)].tolist()
            card = measure_speed(engine, bound, prompt, speed_steps)
        keep_ratio = asked_ratio(bound.policy)
        if keep_ratio is None:
            keep_ratio = 1.0 - quality.sparsity
        yield Evaluation(index, bound.policy.name, keep_ratio, quality, control, card)


@torch.inference_mode()
def _with_control(
    model: SparseModel, documents: Tensor, policy: Policy, selector: Selector, steps: Steps
) -> tuple[QualityCard, QualityCard]:
    quality = measure_quality(model, documents, selector, steps)
    control = control_of(policy, selector, model, quality.sparsity)
    return quality, measure_quality(model, documents, control, steps)


def _stored(tensor: Tensor) -> Tensor:
    """As profiles are stored, whatever the model computes in."""
    return tensor.detach().cpu().to(torch.float32 if tensor.is_floating_point() else torch.int64)

"""What every extraction ends with: a stored vector with its evidence card."""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from torch import Tensor

from patchclamp_server.analysis.steering.evidence import LayerEvidence
from patchclamp_server.artifacts.store import ArtifactStore
from patchclamp_server.artifacts.types import ArtifactInfo, ArtifactKind, Tags
from patchclamp_server.model.info import ModelInfo
from patchclamp_server.model.sites import Site


class Labelled(Protocol):
    """The settings that all jobs of ExtractVectors share."""

    @property
    def site(self) -> Site: ...
    @property
    def layers(self) -> tuple[int, ...]: ...
    @property
    def holdout_fraction(self) -> float: ...
    @property
    def seed(self) -> int: ...
    @property
    def description(self) -> str: ...
    @property
    def tags(self) -> Tags: ...


@dataclass(frozen=True)
class Card:
    """What was measured of a vector. `measure` says what accuracies are shares of, `baselines` what it is otherwise."""

    layers: tuple[LayerEvidence, ...]
    best_layer: int
    measure: str
    warnings: tuple[str, ...] = ()
    baselines: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Result:
    artifact: ArtifactInfo
    layers: tuple[LayerEvidence, ...]
    best_layer: int
    warnings: tuple[str, ...]
    measure: str = ""
    baselines: Mapping[str, float] = field(default_factory=dict)


async def stored(
    store: ArtifactStore,
    info: ModelInfo,
    job: Labelled,
    directions: Mapping[int, Tensor],
    card: Card,
    *,
    method: str,
    parameters: Mapping[str, Any],
    source: Mapping[str, Any],
    evidence: Mapping[str, Any],
) -> Result:
    """Stores directions [d] by layer. `parameters` are those of the method alone, `source` is what it was given, and
    `evidence` what its card has beside that of all methods."""
    artifact = await asyncio.to_thread(
        store.put,
        ArtifactKind.VECTOR,
        {f"layer.{layer}": direction for layer, direction in directions.items()},
        model_fingerprint=info.fingerprint,
        site=job.site,
        description=job.description,
        provenance={
            "method": method,
            "parameters": {
                "site": job.site.value,
                "layers": list(job.layers),
                **parameters,
                "holdout_fraction": job.holdout_fraction,
                # The seed is text: JSON and google.protobuf.Struct keep numbers as doubles, and a seed has 64 bits.
                "seed": str(job.seed),
            },
            **source,
            "model": info.name,
        },
        evidence={
            "best_layer": card.best_layer,
            **evidence,
            "measure": card.measure,
            "baselines": dict(card.baselines),
            "layers": [_shown(e) for e in card.layers],
            "warnings": list(card.warnings),
        },
        tags=job.tags,
    )
    return Result(artifact, card.layers, card.best_layer, card.warnings, card.measure, card.baselines)


def _shown(evidence: LayerEvidence) -> dict[str, Any]:
    """Returns what the card says of a layer; only of trained methods it says anything of a training."""
    return {name: value for name, value in asdict(evidence).items() if name != "training" or value is not None}


def best_by_accuracy(layers: Sequence[LayerEvidence]) -> LayerEvidence:
    """Returns the layer with the best held-out accuracy; among equals the one furthest above its control, then the
    first."""
    return max(layers, key=lambda e: (e.heldout_accuracy, -e.random_accuracy))

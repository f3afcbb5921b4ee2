"""What every search for neurons ends with: the best of all scores, stored as a neuron_set with its evidence."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from patchclamp_server.artifacts.neuron_sets import Neuron, NeuronSet
from patchclamp_server.artifacts.store import ArtifactStore
from patchclamp_server.artifacts.types import ArtifactInfo, ArtifactKind, Tags
from patchclamp_server.model.info import ModelInfo


@dataclass(frozen=True, eq=False)
class StoredSet:
    """A stored set: its artifact and its neurons, the best first."""

    artifact: ArtifactInfo
    found: NeuronSet


def best_of(scores: Tensor, layers: Sequence[int], k: int, values: Tensor | None = None) -> NeuronSet:
    """Returns the k neurons with the largest of scores [len(layers), d_ff], equal ones by layer and index.

    `values` of the same shape goes with them. A score of -inf is no score: such neurons are left out.
    """
    flat = scores.flatten()
    order = flat.argsort(descending=True, stable=True)[:k]
    order = order[flat[order] != -torch.inf]
    rows, indices = order // scores.shape[1], order % scores.shape[1]
    neurons = tuple(Neuron(layers[row], index) for row, index in zip(rows.tolist(), indices.tolist(), strict=True))
    return NeuronSet(neurons, flat[order].float(), None if values is None else values.flatten()[order].float())


def store_neurons(
    store: ArtifactStore,
    info: ModelInfo,
    found: NeuronSet,
    *,
    provenance: Mapping[str, Any],
    evidence: Mapping[str, Any],
    description: str,
    tags: Tags,
    fingerprint: str = "",
) -> StoredSet:
    """Stores a set that is not empty, for the served model or the one of `fingerprint`. Call it in a thread.

    `provenance` names the method and its parameters; `evidence` says what was measured, beside random sets.
    """
    artifact = store.put(
        ArtifactKind.NEURON_SET,
        found.tensors(),
        model_fingerprint=fingerprint or info.fingerprint,
        description=description,
        provenance={**provenance, "model": info.name},
        evidence=evidence,
        tags=tags,
    )
    return StoredSet(artifact, found)

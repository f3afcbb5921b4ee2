"""Stores the circuit of a concept: a vector, a neuron set and a head set, each with its evidence."""

import asyncio
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from patchclamp_server.analysis.neurons.stored import StoredSet, store_neurons
from patchclamp_server.analysis.steering.concept_circuit.search import ConceptCircuitSearch, Split
from patchclamp_server.analysis.steering.concept_circuit.sets import Circuit
from patchclamp_server.analysis.steering.concept_circuit.writes import Writes
from patchclamp_server.analysis.steering.concept_circuit.zeroing import Measured, ZeroedSets
from patchclamp_server.analysis.steering.evidence import RANDOM_DIRECTIONS, LayerEvidence
from patchclamp_server.analysis.steering.result import Card, Result, stored
from patchclamp_server.artifacts.head_sets import Head
from patchclamp_server.artifacts.store import ArtifactStore
from patchclamp_server.artifacts.types import ArtifactInfo, ArtifactKind, Tags
from patchclamp_server.model.info import ModelInfo
from patchclamp_server.model.sites import Site

METHOD = "concept_circuit"
MEASURE = "texts of held-out scenarios on the right side of the midpoint; beside it random directions"


@dataclass(frozen=True, eq=False)
class Found:
    """What is stored. `zeroed`: by part of the circuit."""

    directions: Mapping[int, Tensor]
    evidence: tuple[LayerEvidence, ...]
    best_layer: int
    writes: Writes
    circuit: Circuit
    unzeroed: Measured
    zeroed: Mapping[str, ZeroedSets]
    warnings: tuple[str, ...]

    def card(self, part: str, written: float, writes: Tensor) -> dict[str, Any]:
        """Returns the evidence of a set: of the contrast |d| of the training scenarios what it writes, and what all of
        its kind do; and what becomes of held-out scenarios without it."""
        return {
            "best_layer": self.best_layer,
            "contrast": float(self.directions[self.best_layer].norm()),
            "written": written,
            "written_by_all": float(writes[writes.isfinite()].sum()),
            "unzeroed": asdict(self.unzeroed),
            "zeroed": {name: asdict(self.zeroed[name]) for name in (part, "both")},
            "warnings": list(self.warnings),
        }


@dataclass(frozen=True, eq=False)
class FoundConceptCircuit:
    """`heads` are scored by what they write, the best first."""

    vector: Result
    neurons: StoredSet
    head_set: ArtifactInfo
    heads: tuple[tuple[Head, float], ...]
    unzeroed: Measured
    zeroed: Mapping[str, ZeroedSets]


@dataclass(frozen=True)
class _VectorSettings:
    site: Site
    layers: tuple[int, ...]
    holdout_fraction: float
    seed: int
    description: str
    tags: Tags


async def store_circuit(
    store: ArtifactStore, info: ModelInfo, job: ConceptCircuitSearch, split: Split, found: Found
) -> FoundConceptCircuit:
    source = {
        "target": job.scenarios.values[job.scenarios.target],
        "values": list(job.scenarios.values),
        "scenarios": len(job.scenarios),
        "texts": len(job.scenarios.texts),
        "texts_digest": job.scenarios.digest(),
    }
    settings = job.site, job.layers, job.holdout_fraction, job.seed, job.description, job.tags_of("vector")
    vector = await stored(
        store,
        info,
        _VectorSettings(*settings),
        found.directions,
        Card(found.evidence, found.best_layer, MEASURE, found.warnings),
        method=METHOD,
        parameters={"pooling": job.pooling.value},
        source=source,
        evidence={
            "training_scenarios": len(split.training),
            "heldout_scenarios": len(split.heldout),
            "random_directions": RANDOM_DIRECTIONS,
        },
    )
    provenance = {"method": METHOD, "parameters": _parameters(job, found, vector.artifact.id), **source}
    return await asyncio.to_thread(_store_sets, store, info, job, found, vector, provenance)


def _store_sets(
    store: ArtifactStore,
    info: ModelInfo,
    job: ConceptCircuitSearch,
    found: Found,
    vector: Result,
    provenance: Mapping[str, Any],
) -> FoundConceptCircuit:
    circuit, writes = found.circuit, found.writes
    assert circuit.neurons.scores is not None
    neurons = store_neurons(
        store,
        info,
        circuit.neurons,
        provenance=provenance,
        evidence=found.card("neurons", float(circuit.neurons.scores.sum()), writes.neurons),
        description=job.description,
        tags=job.tags_of("neurons"),
    )
    scores = writes.heads.masked_fill(~writes.heads.isfinite(), 0.0).float()
    heads = tuple((head, float(scores[head])) for head in circuit.heads)
    head_set = store.put(
        ArtifactKind.HEAD_SET,
        {"scores": scores},
        model_fingerprint=info.fingerprint,
        description=job.description,
        provenance={**provenance, "model": info.name},
        evidence={
            # A head of the set is one of the circuit when its score is at least that of the circuit's last head.
            "threshold": heads[-1][1],
            **found.card("heads", sum(score for _, score in heads), writes.heads),
        },
        tags=job.tags_of("heads"),
    )
    return FoundConceptCircuit(vector, neurons, head_set, heads, found.unzeroed, found.zeroed)


def _parameters(job: ConceptCircuitSearch, found: Found, vector: str) -> dict[str, Any]:
    return {
        "vector": vector,
        "site": job.site.value,
        "layer": found.best_layer,
        "pooling": job.pooling.value,
        "neurons": job.neurons,
        "heads": job.heads,
        "random_sets": job.random_sets,
        "holdout_fraction": job.holdout_fraction,
        # The seed is text: JSON and google.protobuf.Struct keep numbers as doubles, and a seed has 64 bits.
        "seed": str(job.seed),
    }

"""Runs one search for a circuit: clean/corrupt pairs → effects of all heads → faithfulness → stored head set."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import asdict, dataclass
from typing import Any

import torch

from patchclamp_server.analysis.digests import json_digest
from patchclamp_server.analysis.heads.circuits.circuit import CircuitSearch, FoundCircuit, HeadEffect, search
from patchclamp_server.analysis.progress import Progress
from patchclamp_server.analysis.requests import exclusively
from patchclamp_server.artifacts.store import ArtifactStore
from patchclamp_server.artifacts.types import ArtifactInfo, ArtifactKind
from patchclamp_server.engine.engine import Engine
from patchclamp_server.model.info import ModelInfo


@dataclass(frozen=True)
class Circuit:
    """`effects` has all heads, the largest |effect| first."""

    artifact: ArtifactInfo
    effects: tuple[HeadEffect, ...]
    clean_metric: float
    corrupt_metric: float
    faithfulness: float
    random_faithfulness_mean: float
    random_faithfulness_deviation: float


async def find_circuit(
    engine: Engine, store: ArtifactStore, info: ModelInfo, job: CircuitSearch
) -> AsyncGenerator[Progress | Circuit, None]:
    """Yields progress, then the result. Ending the iteration early, or cancelling it, ends the computation after the
    slice that runs.

    Raises InvalidArgument for pairs that cannot be compared, by field path.
    """
    told: AsyncGenerator[Progress | FoundCircuit, None] = exclusively(engine, search(engine.model.decoder, job))
    async with aclosing(told) as steps:
        async for step in steps:
            yield step if isinstance(step, Progress) else await asyncio.to_thread(_store, store, info, job, step)


def _store(store: ArtifactStore, info: ModelInfo, job: CircuitSearch, found: FoundCircuit) -> Circuit:
    artifact = store.put(
        ArtifactKind.HEAD_SET,
        head_set(found.effects, info),
        model_fingerprint=info.fingerprint,
        description=job.description,
        provenance=_provenance(info, job),
        evidence=_evidence(found, job),
        tags=job.tags,
    )
    return Circuit(
        artifact,
        found.effects,
        found.clean_metric,
        found.corrupt_metric,
        found.faithfulness.circuit,
        found.faithfulness.random_mean,
        found.faithfulness.random_deviation,
    )


def head_set(effects: tuple[HeadEffect, ...], info: ModelInfo) -> dict[str, torch.Tensor]:
    """Returns the sizes of the effects, so that the best heads of the set are the circuit: the score is |effect|, and
    its interval starts at 0 where that of the effect has both signs."""
    tensors = {name: torch.zeros(info.n_layers, info.n_heads) for name in ("scores", "low", "high")}
    for e in effects:
        ends = sorted((abs(e.low), abs(e.high)))
        tensors["scores"][e.layer, e.head] = abs(e.effect)
        tensors["low"][e.layer, e.head] = 0.0 if e.low <= 0 <= e.high else ends[0]
        tensors["high"][e.layer, e.head] = ends[1]
    return tensors


def _provenance(info: ModelInfo, job: CircuitSearch) -> dict[str, Any]:
    pairs = [[pair.clean, pair.corrupt, pair.clean_answer, pair.corrupt_answer] for pair in job.pairs]
    return {
        "method": job.method,
        "parameters": {
            "circuit_size": job.circuit_size,
            "random_sets": job.random_sets,
            # The seed is text: JSON and google.protobuf.Struct keep numbers as doubles, and a seed has 64 bits.
            "seed": str(job.seed),
        },
        "pairs": len(pairs),
        "pairs_digest": json_digest(pairs),
        "model": info.name,
    }


def _evidence(found: FoundCircuit, job: CircuitSearch) -> dict[str, Any]:
    circuit = found.effects[: job.circuit_size]
    return {
        # A head of the set is one of the circuit when its score is at least that of the circuit's last head.
        "threshold": float(torch.tensor(abs(circuit[-1].effect), dtype=torch.float32)),
        "clean_metric": found.clean_metric,
        "corrupt_metric": found.corrupt_metric,
        "ablated_metric": found.faithfulness.ablated_metric,
        "means": "by position" if found.means_by_position else "over all positions",
        "faithfulness": found.faithfulness.circuit,
        "random_faithfulness": list(found.faithfulness.random),
        "circuit": [asdict(e) for e in circuit],
    }

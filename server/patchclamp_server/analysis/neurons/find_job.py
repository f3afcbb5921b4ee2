"""One search by weights: words or a vector → neurons → stored neuron set."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from patchclamp_server.analysis.neurons.decode import DecodedToken
from patchclamp_server.analysis.neurons.find import Finding, Found, find
from patchclamp_server.analysis.neurons.stored import StoredSet, store_neurons
from patchclamp_server.analysis.progress import Progress
from patchclamp_server.analysis.requests import exclusively
from patchclamp_server.artifacts.store import ArtifactStore
from patchclamp_server.engine.engine import Engine
from patchclamp_server.model.info import ModelInfo


@dataclass(frozen=True, eq=False)
class FoundSet:
    """The stored set, and the tokens that stand for the words, with p of the down column of its best neuron."""

    stored: StoredSet
    tokens: tuple[DecodedToken, ...]


async def find_neurons(
    engine: Engine, store: ArtifactStore, info: ModelInfo, job: Finding
) -> AsyncGenerator[Progress | FoundSet, None]:
    """Yields progress, then the stored set. Ending the iteration early ends the work."""
    found: AsyncGenerator[Progress | Found, None] = exclusively(engine, find(engine.model.decoder, job))
    async with aclosing(found) as events:
        async for event in events:
            if isinstance(event, Progress):
                yield event
                continue
            yield FoundSet(await asyncio.to_thread(_store, store, info, job, event), event.tokens)


def _store(store: ArtifactStore, info: ModelInfo, job: Finding, found: Found) -> StoredSet:
    sought: dict[str, Any] = {"words": list(job.words)} if job.vector is None else {"vector": "residual direction"}
    parameters = {**sought, "layers": list(job.layers), "value": job.value}
    return store_neurons(
        store,
        info,
        found.neurons,
        provenance={"method": "find_neurons", "parameters": parameters},
        evidence=found.evidence(),
        description=job.description,
        tags=job.tags,
    )

"""Finds a subspace at each of some layers, and stores them with their evidence: a plane of a cycle, or an alignment."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor

from patchclamp_server.analysis.digests import json_digest
from patchclamp_server.analysis.neurons.products import DifferentiableModel
from patchclamp_server.analysis.progress import Progress, Steps
from patchclamp_server.analysis.requests import OnEvent, completed, exclusively
from patchclamp_server.analysis.subspaces.alignment import Alignment, Examples, align
from patchclamp_server.analysis.subspaces.circular_plane import SHUFFLES, CircularPlane, circular_plane
from patchclamp_server.analysis.subspaces.interchange import Pair, check_pairs, likeliest_tokens, prepared
from patchclamp_server.analysis.training import Training
from patchclamp_server.artifacts.store import ArtifactStore
from patchclamp_server.artifacts.types import NO_TAGS, ArtifactInfo, ArtifactKind, Tags
from patchclamp_server.engine.engine import Engine
from patchclamp_server.engine.exclusive import Work
from patchclamp_server.engine.reducers.scoped_means import ScopedMeans
from patchclamp_server.engine.request import Priority, Reduction, Request, StopParams
from patchclamp_server.errors import InvalidArgument
from patchclamp_server.model.arrays import BoolArray
from patchclamp_server.model.decoder import Decoder
from patchclamp_server.model.info import ModelInfo
from patchclamp_server.model.sites import Site

MAX_MEAN_BYTES = 1 << 30


@dataclass(frozen=True, eq=False)
class ScopedPrompt:
    """Token ids, and a mask of those in scope, of which there is one at least."""

    ids: tuple[int, ...]
    chosen: BoolArray


@dataclass(frozen=True, eq=False)
class PlaneSearch:
    """Values of a cycle in their order, and the prompts of each."""

    values: tuple[str, ...]
    prompts: tuple[tuple[ScopedPrompt, ...], ...]
    components: int = 5


@dataclass(frozen=True, eq=False)
class AlignmentSearch:
    pairs: tuple[Pair, ...]
    kept: tuple[Pair, ...] = ()
    rank: int = 1
    training: Training = field(default_factory=Training)
    holdout_fraction: float = 0.25


@dataclass(frozen=True, eq=False)
class SubspaceSearch:
    """`layers` are 0-based, ascending, and at least one."""

    method: PlaneSearch | AlignmentSearch
    site: Site
    layers: tuple[int, ...]
    seed: int = 0
    description: str = ""
    tags: Tags = NO_TAGS


@dataclass(frozen=True)
class SubspaceEvidence:
    """Fields as in the message SubspaceEvidence; what a method does not measure is 0 or empty."""

    layer: int
    accuracy: float = 0.0
    random_accuracy: float = 0.0
    full_accuracy: float = 0.0
    kept_accuracy: float = 0.0
    loss: float = 0.0
    steps: int = 0
    circularity: float = 0.0
    shuffled_circularity: float = 0.0
    explained_variance: float = 0.0
    angles: tuple[float, ...] = ()


@dataclass(frozen=True)
class FoundSubspace:
    artifact: ArtifactInfo
    layers: tuple[SubspaceEvidence, ...]
    best_layer: int
    warnings: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class _Layer:
    """What is stored of a layer, under "layer.<l>.", and its evidence."""

    tensors: dict[str, Tensor]
    evidence: SubspaceEvidence


_Events: TypeAlias = AsyncGenerator[Progress | _Layer, None]


async def find_subspace(
    engine: Engine, store: ArtifactStore, info: ModelInfo, job: SubspaceSearch
) -> AsyncGenerator[Progress | FoundSubspace, None]:
    """Yields progress, then the result. Ending the iteration early cancels what the engine still computes.

    Raises InvalidArgument, by field path, for what does not fit into memory, and for values that span no plane.
    """
    method = job.method
    events = _planes(engine, info, job, method) if isinstance(method, PlaneSearch) else _aligned(engine, job, method)
    found: list[_Layer] = []
    async with aclosing(events) as told:
        async for event in told:
            if isinstance(event, Progress):
                yield event
            else:
                found.append(event)
    evidence = tuple(each.evidence for each in found)
    if isinstance(method, PlaneSearch):
        best = max(evidence, key=lambda e: e.circularity)
    else:
        best = max(evidence, key=lambda e: (e.accuracy, -e.loss))
    warned = _warnings(job, evidence)
    artifact = await asyncio.to_thread(
        store.put,
        ArtifactKind.SUBSPACE,
        {f"layer.{e.evidence.layer}.{name}": tensor for e in found for name, tensor in e.tensors.items()},
        model_fingerprint=info.fingerprint,
        site=job.site,
        description=job.description,
        provenance=_provenance(info, job),
        evidence={
            "best_layer": best.layer,
            "layers": [_measured(each) for each in evidence],
            "warnings": list(warned),
        },
        tags=job.tags,
    )
    yield FoundSubspace(artifact, evidence, best.layer, warned)


async def _planes(engine: Engine, info: ModelInfo, job: SubspaceSearch, search: PlaneSearch) -> _Events:
    labelled = [(prompt, value) for value, prompts in enumerate(search.prompts) for prompt in prompts]
    needed = 8 * len(search.values) * info.sites[job.site] * len(job.layers)
    if needed > MAX_MEAN_BYTES:
        raise InvalidArgument("layers", f"the means need {needed} bytes, the bound is {MAX_MEAN_BYTES}; name fewer")
    reducer = ScopedMeans(job.layers, [prompt.chosen for prompt, _ in labelled], [value for _, value in labelled])
    requests = (
        partial(_request, prompt.ids, Reduction(job.site, reducer, text, value))
        for text, (prompt, value) in enumerate(labelled)
    )
    steps = Steps("activations", len(labelled))
    async with aclosing(completed(engine, requests)) as finished:
        async for _ in finished:
            yield steps.advance()
    steps, some = Steps("planes", len(job.layers)), False
    for layer in job.layers:
        means = reducer.means(layer)
        plane: CircularPlane | None = await asyncio.to_thread(circular_plane, means, search.components, job.seed)
        if plane is not None:
            some = True
            yield _Layer(
                {"rotation": plane.axes, "centre": plane.centre},
                SubspaceEvidence(
                    layer,
                    circularity=plane.circularity,
                    shuffled_circularity=plane.shuffled_circularity,
                    explained_variance=plane.explained_variance,
                    angles=plane.angles,
                ),
            )
        yield steps.advance()
    if not some:
        raise InvalidArgument("circular_plane.values", "the mean states of the values span no plane at any layer")


async def _aligned(engine: Engine, job: SubspaceSearch, search: AlignmentSearch) -> _Events:
    every = [*search.pairs, *search.kept]
    check_pairs(every, engine.model.decoder.spec, job.site)
    work = _alignment_work(engine.model.decoder, job, search)
    events: AsyncGenerator[Progress | tuple[int, Alignment], None] = exclusively(engine, work)
    async with aclosing(events) as told:
        async for event in told:
            if isinstance(event, Progress):
                yield event
                continue
            layer, found = event
            yield _Layer(
                {"rotation": found.rotation},
                SubspaceEvidence(
                    layer,
                    accuracy=found.accuracy,
                    random_accuracy=found.random_accuracy,
                    full_accuracy=found.full_accuracy,
                    kept_accuracy=found.kept_accuracy or 0.0,
                    loss=found.loss,
                    steps=found.steps,
                ),
            )


def _alignment_work(
    decoder: Decoder, job: SubspaceSearch, search: AlignmentSearch
) -> Work[Progress | tuple[int, Alignment]]:
    model = DifferentiableModel.of(decoder)
    training, heldout = split(len(search.pairs), search.holdout_fraction, job.seed)
    kept, kept_heldout = split(len(search.kept), search.holdout_fraction, job.seed) if search.kept else ([], [])
    against = yield from likeliest_tokens(model, [search.pairs[i].base for i in heldout])
    kept_against = yield from likeliest_tokens(model, [search.kept[i].source for i in kept_heldout])
    for layer in job.layers:
        pairs = yield from prepared(model, search.pairs, layer, job.site)
        kept_pairs = yield from prepared(model, search.kept, layer, job.site)
        examples = Examples(
            [pairs[i] for i in training],
            [pairs[i] for i in heldout],
            [kept_pairs[i] for i in kept],
            [kept_pairs[i] for i in kept_heldout],
            against,
            kept_against,
        )
        found: Alignment = yield from align(model, examples, layer, job.site, search.rank, search.training, job.seed)
        yield layer, found


def split(n: int, holdout_fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Returns a seeded split into pairs that are trained on and pairs that are held out, one at least of each."""
    generator = torch.Generator().manual_seed(seed & (2**63 - 1))
    order: list[int] = torch.randperm(n, generator=generator).tolist()
    heldout = min(n - 1, max(1, round(n * holdout_fraction)))
    return order[heldout:], order[:heldout]


def _request(ids: tuple[int, ...], reduction: Reduction, on_event: OnEvent) -> Request:
    stop = StopParams(max_tokens=0)
    return Request(ids, on_event, stop=stop, priority=Priority.ANALYSIS, reductions=(reduction,))


def _measured(evidence: SubspaceEvidence) -> dict[str, Any]:
    """Returns what the method has measured."""
    nothing = SubspaceEvidence(-1)
    return {name: value for name, value in asdict(evidence).items() if value != getattr(nothing, name)}


def _warnings(job: SubspaceSearch, evidence: Sequence[SubspaceEvidence]) -> tuple[str, ...]:
    if isinstance(job.method, PlaneSearch):
        missing = sorted(set(job.layers) - {e.layer for e in evidence})
        weak = [e.layer for e in evidence if e.circularity <= e.shuffled_circularity]
        said = [f"the means span no plane at layers {missing}: nothing is stored of them"] if missing else []
        if weak:
            said.append(f"the angles follow the cycle no better than those of shuffled values at layers {weak}")
        return tuple(said)
    weak = [e.layer for e in evidence if e.accuracy <= e.random_accuracy]
    return (f"the subspace does no better than a random one of its rank at layers {weak}",) if weak else ()


def _provenance(info: ModelInfo, job: SubspaceSearch) -> dict[str, object]:
    shared = {"site": job.site.value, "layers": list(job.layers), "seed": str(job.seed)}
    method = job.method
    if isinstance(method, PlaneSearch):
        prompts = [[prompt.ids for prompt in prompts] for prompts in method.prompts]
        return {
            "method": "circular_plane",
            "parameters": {**shared, "components": method.components, "shuffles": SHUFFLES},
            "values": list(method.values),
            "prompts_digest": json_digest(prompts),
            "model": info.name,
        }
    pairs = [[[p.base, p.source, p.answer] for p in pairs] for pairs in (method.pairs, method.kept)]
    return {
        "method": "distributed_alignment",
        "parameters": {
            **shared,
            "rank": method.rank,
            "holdout_fraction": method.holdout_fraction,
            **asdict(method.training),
        },
        "pairs": len(method.pairs),
        "kept": len(method.kept),
        "pairs_digest": json_digest(pairs),
        "model": info.name,
    }

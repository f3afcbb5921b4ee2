"""Finds the direction of a concept that is the same in every context, and the neurons and heads that write it.

    scenarios → states → direction and evidence by layer → writes at the best layer → zeroing → three artifacts

Evidence and zeroing are of scenarios that nothing was learned from. Source: Do LLMs "Feel"? Emotion circuits discovery
and control, 2025.
"""

from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from patchclamp_server.analysis.activations import collect
from patchclamp_server.analysis.progress import Progress, Steps
from patchclamp_server.analysis.requests import completed, result_of
from patchclamp_server.analysis.steering.concept_circuit.scenarios import sides
from patchclamp_server.analysis.steering.concept_circuit.search import PARTS, ConceptCircuitSearch, Split, check_sizes
from patchclamp_server.analysis.steering.concept_circuit.sets import (
    Circuit,
    best_circuit,
    random_heads,
    random_neurons,
    unmatched_heads,
    zeroing,
)
from patchclamp_server.analysis.steering.concept_circuit.storing import Found, FoundConceptCircuit, store_circuit
from patchclamp_server.analysis.steering.concept_circuit.writes import Contrasts, Writers
from patchclamp_server.analysis.steering.concept_circuit.zeroing import Measured, ZeroedSets, measured, text_request
from patchclamp_server.analysis.steering.evidence import LayerEvidence, best_layer, warnings
from patchclamp_server.analysis.steering.examples import Examples
from patchclamp_server.analysis.steering.job import checked_direction, evidence_of
from patchclamp_server.artifacts.store import ArtifactStore
from patchclamp_server.engine.engine import Engine
from patchclamp_server.engine.reducers.token_norms import TokenNorms
from patchclamp_server.engine.request import Capture, Reduction
from patchclamp_server.interventions.bound import BoundProgram
from patchclamp_server.interventions.pooling import pooled_tokens
from patchclamp_server.model.arrays import BoolArray
from patchclamp_server.model.info import ModelInfo


async def find_concept_circuit(
    engine: Engine, store: ArtifactStore, info: ModelInfo, job: ConceptCircuitSearch
) -> AsyncGenerator[Progress | FoundConceptCircuit, None]:
    """Yields progress, then the result. Ending the iteration early cancels what the engine still computes.

    Stages: "activations", "norms", "writes" and "zeroing" are counted in texts, "tokens" in examples, "evidence" in
    layers. Raises InvalidArgument, by field path, for too few scenarios, too many activations or random sets, and where
    there is no direction, or nothing that writes it.
    """
    split = Split.of(job)
    check_sizes(job, split, info)
    vector: _Vector | None = None
    async with aclosing(_vector(engine, info, job, split)) as vectors:
        async for event in vectors:
            if isinstance(event, Progress):
                yield event
            else:
                vector = event
    assert vector is not None
    best = best_layer(vector.evidence)
    direction, writers = vector.directions[best], Writers.before(job.site, best)

    norms = TokenNorms((best,), [len(text.ids) for text in job.scenarios.texts])
    steps = Steps("norms", len(job.scenarios.texts))
    of_all = (
        partial(text_request, text, (Reduction(job.site, norms, i),), None)
        for i, text in enumerate(job.scenarios.texts)
    )
    async with aclosing(completed(engine, of_all)) as finished:
        async for _ in finished:
            yield steps.advance()
    chosen: list[BoolArray] = [pooled_tokens(norms.of(best, i), job.pooling).numpy() for i in range(steps.total)]

    contrasts = Contrasts(engine.model.decoder, writers, chosen, job.scenarios.contrast(split.training))
    texts = job.scenarios.of(split.training)
    steps = Steps("writes", len(texts))
    of_training = (partial(text_request, job.scenarios.texts[i], contrasts.reductions(i), None) for i in texts)
    async with aclosing(completed(engine, of_training)) as finished:
        async for _ in finished:
            yield steps.advance()
    writes = await result_of(engine, contrasts.writes(direction))
    circuit = best_circuit(writes, job.neurons, job.heads)

    programs = _programs(circuit, writers, info, job)
    under: tuple[Measured, ...] = ()
    at = job.site, best, direction
    async with aclosing(measured(engine, job.scenarios, split.heldout, chosen, at, programs)) as runs:
        async for run in runs:
            if isinstance(run, Progress):
                yield run
            else:
                under = run
    unzeroed, zeroed = under[0], _by_part(under[1:])
    warned = (*warnings(vector.evidence), *_warnings(job, circuit, info, unzeroed, zeroed))
    found = Found(vector.directions, vector.evidence, best, writes, circuit, unzeroed, zeroed, warned)
    yield await store_circuit(store, info, job, split, found)


@dataclass(frozen=True, eq=False)
class _Vector:
    """Directions [d] by layer, and their evidence."""

    directions: dict[int, Tensor]
    evidence: tuple[LayerEvidence, ...]


async def _vector(
    engine: Engine, info: ModelInfo, job: ConceptCircuitSearch, split: Split
) -> AsyncGenerator[Progress | _Vector, None]:
    texts, layers = job.scenarios.texts, job.layers
    states = torch.empty(len(texts), len(layers), info.sites[job.site])
    pooled_tokens, left_out = torch.zeros(2, len(layers), dtype=torch.int64)
    steps = Steps("activations", len(texts))
    capture = Capture(job.site, layers, job.pooling)
    roles = [text.roles for text in texts]
    async with aclosing(collect(engine, [text.ids for text in texts], capture, roles=roles)) as collected:
        async for index, pooled in collected:
            states[index] = pooled.values
            pooled_tokens += pooled.tokens
            left_out += pooled.left_out
            yield steps.advance()
    weights = job.scenarios.contrast(split.training)
    directions: dict[int, Tensor] = {}
    for row, layer in enumerate(layers):
        own = states[:, row]
        directions[layer] = checked_direction((weights @ own.double()).float(), own, layer, "scenarios")
    heldout = job.scenarios.pairs(split.heldout)
    positive, negative = ([texts[i].ids for i in dict.fromkeys(side)] for side in heldout)
    examples = Examples(
        sides(states, job.scenarios.pairs(split.training)),
        sides(states, heldout),
        (positive, negative),
        pooled_tokens,
        left_out,
        "scenarios",
        {},
    )
    async with aclosing(evidence_of(engine, info, job.site, directions, examples, job.seed)) as events:
        async for event in events:
            yield event if isinstance(event, Progress) else _Vector(directions, event)


def _programs(
    circuit: Circuit, writers: Writers, info: ModelInfo, job: ConceptCircuitSearch
) -> list[BoundProgram | None]:
    """Returns no program, then of each part its own and those of its random sets."""
    neurons = [circuit.neurons.neurons, *random_neurons(circuit.neurons, info, job.random_sets, job.seed)]
    heads = [circuit.heads, *random_heads(circuit.heads, writers, info, job.random_sets, job.seed)]
    found: list[BoundProgram | None] = [None]
    for of_neurons, of_heads in PARTS.values():
        for own, own_heads in zip(neurons, heads, strict=True):
            found.append(zeroing(own if of_neurons else (), own_heads if of_heads else (), info))
    return found


def _by_part(under: tuple[Measured, ...]) -> dict[str, ZeroedSets]:
    each = len(under) // len(PARTS)
    parts = (under[i * each : (i + 1) * each] for i in range(len(PARTS)))
    return {name: ZeroedSets.of(own, random) for name, (own, *random) in zip(PARTS, parts, strict=True)}


def _warnings(
    job: ConceptCircuitSearch,
    circuit: Circuit,
    info: ModelInfo,
    unzeroed: Measured,
    zeroed: Mapping[str, ZeroedSets],
) -> tuple[str, ...]:
    said = []
    if unzeroed.separation <= 0:
        said.append("the direction does not tell the target from the other values in held-out scenarios")
    for part, sets in zeroed.items():
        if sets.separation >= min(sets.random_separations):
            said.append(f"zeroing {part} takes no more of the separation than some random set of equal size does")
    if (n := unmatched_heads(circuit.heads, info)) > 0:
        has = "some layers have fewer heads beside the circuit than in it"
        said.append(f"{n} of the {len(circuit.heads)} heads of each random set are of other layers: {has}")
    sizes = ("neurons", job.neurons, len(circuit.neurons.neurons)), ("heads", job.heads, len(circuit.heads))
    for kind, asked, found in sizes:
        if found < asked:
            said.append(f"of {asked} {kind} there are {found}: others write against it, or are needed for random sets")
    return tuple(said)

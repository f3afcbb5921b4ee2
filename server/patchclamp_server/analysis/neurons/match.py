"""The neurons of another checkpoint that do the same: mutual best correlations over the same tokens.

    best(i) = argmax_j r_ij     over the neurons j of the other model, in the layer of i or in all
    i and j match               if j = best(i), and i is the best of j among the neurons of the served model, in the
                                layer of j or in all

r is Pearson's correlation of activations at mlp_post (correlation_sums.py) over all tokens but the first of each
window, where attention has its sinks, and special ones before it. The control is the mean of the largest r_ij of each i
where the tokens of the other model are shuffled within their window: what a maximum over so many neurons is by chance.

The other model is run in slices at the engine's exclusive door, window by window after the served one, whose rows come
from requests. Where not all neurons of the layers are matched, the texts are run a second time: the best of j is sought
among all of the served model for those j alone that are the best of some i.

Source: Dravid et al. 2023, Rosetta Neurons: Mining the Common Units in a Model Zoo (mutual nearest neighbours by
correlation); there of vision models, here of two versions of one language model.
"""

import asyncio
from collections import defaultdict
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from patchclamp_server.analysis.neurons.correlation_sums import Best, CorrelationSums, needed_bytes
from patchclamp_server.analysis.neurons.match_passes import MAX_ROW_BYTES, TextPass, row_bytes
from patchclamp_server.analysis.neurons.other_model import load_other, release
from patchclamp_server.analysis.neurons.stored import StoredSet, store_neurons
from patchclamp_server.analysis.neurons.texts import TextSource
from patchclamp_server.analysis.progress import Progress
from patchclamp_server.artifacts.neuron_sets import Neuron, NeuronSelection, NeuronSet, select
from patchclamp_server.artifacts.store import ArtifactStore
from patchclamp_server.artifacts.types import NO_TAGS, Tags
from patchclamp_server.engine.engine import Engine
from patchclamp_server.errors import InvalidArgument
from patchclamp_server.model.info import ModelInfo
from patchclamp_server.text.prompt import PromptEncoder

# Of all sums that are kept at a time.
MAX_BYTES = 2 << 30

# Of each layer its units, ascending.
Units = dict[int, Tensor]


@dataclass(frozen=True, eq=False)
class Matching:
    """`path` of the checkpoint that clients know by the name `other`. `neurons` None: all of `layers`."""

    other: str
    path: str
    texts: TextSource
    neurons: NeuronSelection | None
    layers: tuple[int, ...]
    any_layer: bool = False
    seed: int = 0
    description: str = ""
    tags: Tags = NO_TAGS


@dataclass(frozen=True)
class Match:
    neuron: Neuron
    other: Neuron
    correlation: float
    mutual: bool


@dataclass(frozen=True, eq=False)
class Matched:
    """`matches`: the best first, of those of all `neurons` that change at all; means are over them. `fingerprint`: of
    the other model. `ported`: None where none is mutual."""

    fingerprint: str
    matches: tuple[Match, ...]
    neurons: int
    tokens: int
    mean_correlation: float
    shuffled_mean_correlation: float
    ported: StoredSet | None = None

    @property
    def mutual(self) -> tuple[Match, ...]:
        return tuple(match for match in self.matches if match.mutual)


async def match_neurons(
    engine: Engine, store: ArtifactStore, info: ModelInfo, prompts: PromptEncoder, job: Matching
) -> AsyncGenerator[Progress | Matched, None]:
    """Yields progress in texts of all passes, then the matches; mutual ones are stored as a neuron set of the other
    model. Ending the iteration early leaves nothing in the engine, and lets go of the other model.

    Raises InvalidArgument (field path); FailedPrecondition on "other" where it cannot be loaded or has another
    tokenizer; NotFound or FailedPrecondition for the neuron set.
    """
    chosen = await asyncio.to_thread(_chosen, store, info, job)
    try:
        async with aclosing(_matched(engine, info, prompts, chosen, job)) as events:
            async for event in events:
                if isinstance(event, Progress):
                    yield event
                else:
                    yield await asyncio.to_thread(_stored, store, info, event, job)
    finally:
        await asyncio.to_thread(release)


async def _matched(
    engine: Engine, info: ModelInfo, prompts: PromptEncoder, chosen: Units, job: Matching
) -> AsyncGenerator[Progress | Matched, None]:
    """Yields progress, then what is to be stored. Nothing else holds the other model."""
    other = await asyncio.to_thread(load_other, job.path, engine.model, "other")
    forwards = Forwards(chosen, info, other.info, job)
    passes = 1 if forwards.is_complete else 2
    text_pass = TextPass(engine, prompts, other, job.texts, job.seed, passes)
    async with aclosing(text_pass.run(forwards.sums, chosen, forwards.every)) as events:
        async for event in events:
            yield event
    best, chance, tokens = forwards.best(), forwards.chance(), forwards.sums.rows
    sought, backwards = _sought(best), forwards.sums
    if forwards.is_complete:
        sought = forwards.every
    elif sought:
        # The other sums are not needed any more, and may be large.
        del forwards, backwards
        every = {layer: torch.arange(info.d_ff) for layer in (range(info.n_layers) if job.any_layer else sought)}
        backwards = _sums(every, sought, job.any_layer, other.decoder.device)
        async with aclosing(text_pass.run(backwards, every, sought)) as events:
            async for event in events:
                yield event
    else:
        yield Progress("texts", text_pass.total, text_pass.total)
    matches = await asyncio.to_thread(_matches, chosen, best, sought, backwards)
    mean = sum(match.correlation for match in matches) / max(1, len(matches))
    neurons = sum(map(len, chosen.values()))
    yield Matched(other.info.fingerprint, matches, neurons, tokens, mean, chance)


class Forwards:
    """The sums of the chosen neurons with all of the other model."""

    def __init__(self, chosen: Units, info: ModelInfo, other: ModelInfo, job: Matching) -> None:
        """Raises InvalidArgument for what does not fit."""
        named = "layers" if job.neurons is None else "neurons"
        missing = [layer for layer in chosen if layer >= other.n_layers]
        if missing and not job.any_layer:
            message = (
                f"layer {missing[0]} is none of the other model, which has {other.n_layers}; any_layer looks in all"
            )
            raise InvalidArgument(named, message)
        if job.texts.window_tokens > other.context_length:
            message = f"the other model has a context of {other.context_length} tokens; expected no more"
            raise InvalidArgument("texts.window_tokens", message)
        layers = range(other.n_layers) if job.any_layer else chosen
        self.every = {layer: torch.arange(other.d_ff) for layer in layers}
        whole = all(len(units) == info.d_ff for units in chosen.values())
        self.is_complete = whole and (len(chosen) == info.n_layers or not job.any_layer)
        _check_bytes(chosen, self.every, self.is_complete, info, job, named)
        self.chosen = chosen
        self.sums = _sums(chosen, self.every, job.any_layer, torch.device(info.device), controls=True)

    def best(self) -> dict[int, Best]:
        if self.sums.rows < 2:
            raise InvalidArgument("texts", "have fewer than two tokens beyond the first of each window")
        return {layer: self.sums.best(layer) for layer in self.chosen}

    def chance(self) -> float:
        """The mean of the largest correlations with shuffled tokens, of the neurons that change."""
        own = torch.cat([self.sums.best(layer, control=True).correlation for layer in self.chosen])
        own = own[own > -torch.inf]
        return float(own.mean()) if len(own) else 0.0


def _chosen(store: ArtifactStore, info: ModelInfo, job: Matching) -> Units:
    if job.neurons is None:
        return {layer: torch.arange(info.d_ff) for layer in job.layers}
    found = select(job.neurons, store, info, "neurons")
    indices = torch.tensor([neuron.neuron for neuron in found.neurons])
    return {layer: indices[places].sort().values for layer, places in found.by_layer().items()}


def _sums(
    first: Mapping[int, Tensor],
    second: Mapping[int, Tensor],
    any_layer: bool,
    device: torch.device,
    *,
    controls: bool = False,
) -> CorrelationSums:
    pairs = _pairs(first, second, any_layer)
    return CorrelationSums(pairs, _sizes(first), _sizes(second), device, controls=controls)


def _pairs(first: Mapping[int, Tensor], second: Mapping[int, Tensor], any_layer: bool) -> list[tuple[int, int]]:
    return [(a, b) for a in first for b in second if any_layer or a == b]


def _sizes(units: Mapping[int, Tensor]) -> dict[int, int]:
    return {layer: len(own) for layer, own in units.items()}


def _check_bytes(chosen: Units, every: Units, is_complete: bool, info: ModelInfo, job: Matching, named: str) -> None:
    n = sum(map(len, chosen.values()))
    needed = needed_bytes(_pairs(chosen, every, job.any_layer), _sizes(chosen), _sizes(every), controls=True)
    # On the way back, each chosen neuron brings at most one of the other model with it.
    back = 0 if is_complete else 8 * 3 * info.d_ff * n * (info.n_layers if job.any_layer else 1)
    if max(needed, back) > MAX_BYTES:
        message = (
            f"{n} neurons need sums of {max(needed, back)} bytes; the bound is {MAX_BYTES}: fewer of them are accepted"
        )
        raise InvalidArgument(named, message)
    served = info.d_ff * (info.n_layers if job.any_layer else len(chosen))
    needed = row_bytes(job.texts.window_tokens, served, sum(map(len, every.values())))
    if needed > MAX_ROW_BYTES:
        message = f"the activations of a window are {needed} bytes; expected fewer tokens, within {MAX_ROW_BYTES}"
        raise InvalidArgument("texts.window_tokens", message)


def _sought(best: Mapping[int, Best]) -> Units:
    """The neurons of the other model that are the best of any."""
    found: defaultdict[int, set[int]] = defaultdict(set)
    for own in best.values():
        has_one = own.correlation > -torch.inf
        for layer, column in zip(own.layer[has_one].tolist(), own.column[has_one].tolist(), strict=True):
            found[layer].add(column)
    return {layer: torch.tensor(sorted(columns)) for layer, columns in sorted(found.items())}


def _matches(chosen: Units, best: Mapping[int, Best], sought: Units, backwards: CorrelationSums) -> tuple[Match, ...]:
    back: dict[Neuron, Neuron] = {}
    for layer, units in sought.items():
        own = backwards.best_of_second(layer)
        places = zip(units.tolist(), own.layer.tolist(), own.column.tolist(), strict=True)
        back.update({Neuron(layer, unit): Neuron(at, column) for unit, at, column in places})
    found = []
    for layer, units in chosen.items():
        own = best[layer]
        columns = (units, own.correlation, own.layer, own.column)
        for unit, correlation, at, column in zip(*(values.tolist() for values in columns), strict=True):
            if correlation > -torch.inf:
                neuron, other = Neuron(layer, unit), Neuron(at, column)
                found.append(Match(neuron, other, correlation, back[other] == neuron))
    return tuple(sorted(found, key=lambda match: (-match.correlation, match.neuron)))


def _stored(store: ArtifactStore, info: ModelInfo, found: Matched, job: Matching) -> Matched:
    if not found.mutual:
        return found
    neurons = tuple(match.other for match in found.mutual)
    scores = torch.tensor([match.correlation for match in found.mutual], dtype=torch.float32)
    parameters: dict[str, Any] = {
        "other": job.other,
        "any_layer": job.any_layer,
        "seed": job.seed,
        "window_tokens": job.texts.window_tokens,
        "corpus": job.texts.corpus.digest,
    }
    evidence = {
        "tokens": found.tokens,
        "neurons": found.neurons,
        "mutual": len(neurons),
        "mean_correlation": found.mean_correlation,
        "shuffled_mean_correlation": found.shuffled_mean_correlation,
    }
    ported = store_neurons(
        store,
        info,
        NeuronSet(neurons, scores),
        provenance={"method": "match_neurons", "parameters": parameters},
        evidence=evidence,
        description=job.description,
        tags=job.tags,
        fingerprint=found.fingerprint,
    )
    return replace(found, ported=ported)

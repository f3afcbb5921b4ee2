"""Circuits: the heads that change an answer most, and how much of the answer they carry without the others.

    effect_h = mean over pairs of change_h / (metric(clean) - metric(corrupt))
    circuit  = the k heads with the largest |effect_h|

The change is that of a method (circuits/methods.py), so ablating a head that the answer needs has an effect below 0,
and patching in one that carries it an effect above 0. Effects are means of ratios: every pair counts alike, however
sure the model is of it. Interval: bootstrap over pairs. Faithfulness (faithfulness.py) is measured on the same pairs.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from patchclamp_server.analysis.heads.circuits.faithfulness import (
    MIN_DIFFERENCE,
    Faithfulness,
    ablated_metric,
    check_denominator,
    circuit_metrics,
    circuits,
    faithfulness,
)
from patchclamp_server.analysis.heads.circuits.mean_ablation import CorruptMeans
from patchclamp_server.analysis.heads.circuits.methods import CIRCUIT_METHODS
from patchclamp_server.analysis.heads.circuits.runs import CleanCorruptPair, PairRuns, run_pair
from patchclamp_server.analysis.heads.scores.scoring import ends, resampled_means
from patchclamp_server.analysis.progress import Progress
from patchclamp_server.artifacts.types import NO_TAGS, Tags
from patchclamp_server.engine.exclusive import Work
from patchclamp_server.errors import InvalidArgument
from patchclamp_server.model.decoder import Decoder
from patchclamp_server.model.spec import DecoderSpec


@dataclass(frozen=True)
class CircuitSearch:
    """What to search for. `method` is a name of CIRCUIT_METHODS."""

    method: str
    pairs: tuple[CleanCorruptPair, ...]
    circuit_size: int = 10
    random_sets: int = 10
    seed: int = 0
    description: str = ""
    tags: Tags = NO_TAGS


@dataclass(frozen=True)
class HeadEffect:
    layer: int
    head: int
    effect: float
    low: float
    high: float


@dataclass(frozen=True)
class FoundCircuit:
    """`effects` has all heads, the largest |effect| first. Metrics are means over pairs."""

    effects: tuple[HeadEffect, ...]
    clean_metric: float
    corrupt_metric: float
    faithfulness: Faithfulness
    # This says whether heads are ablated to means of each position, and not to one over all positions.
    means_by_position: bool


def search(decoder: Decoder, job: CircuitSearch) -> Work[Progress | FoundCircuit]:
    """Yields progress after every batch, then the circuit. The stages are "prompts" (both of every pair, and all heads
    ablated), "effects" (counted in heads of all pairs) and "faithfulness" (in pairs).

    Raises InvalidArgument for pairs that cannot be compared, by field path.
    """
    _check_pairs(job.pairs, decoder.spec)
    _check_sizes(job, decoder.spec)
    n_pairs, n_heads = len(job.pairs), decoder.spec.n_layers * decoder.spec.n_heads

    means = CorruptMeans(job.pairs)
    clean = corrupt = ablated = 0.0
    for i, pair in enumerate(job.pairs):
        runs = yield from run_pair(decoder, pair)
        _check_difference(runs, i)
        clean += runs.clean_metric / n_pairs
        corrupt += runs.corrupt_metric / n_pairs
        means.add(runs.corrupt)
        yield Progress("prompts", i + 1, 2 * n_pairs)
    values = means.values(decoder.dtype)
    for i, pair in enumerate(job.pairs):
        ablated += (yield from ablated_metric(decoder, pair, values)) / n_pairs
        yield Progress("prompts", n_pairs + i + 1, 2 * n_pairs)
    check_denominator(clean, ablated)

    effects = torch.empty(n_pairs, n_heads)
    for i, pair in enumerate(job.pairs):
        # Pairs are run once more, since the runs of all pairs may not fit into memory.
        runs = yield from run_pair(decoder, pair)
        done = 0
        for batch in CIRCUIT_METHODS[job.method](decoder, runs, values):
            changes = yield from batch
            effects[i, done : done + len(changes)] = changes / (runs.clean_metric - runs.corrupt_metric)
            done += len(changes)
            yield Progress("effects", i * n_heads + done, n_pairs * n_heads)
        assert done == n_heads

    ranked = _ranked(effects, decoder.spec, job.seed)
    kept = circuits([(e.layer, e.head) for e in ranked[: job.circuit_size]], job.random_sets, decoder.spec, job.seed)
    kept_metrics = torch.zeros(len(kept), dtype=torch.float64)
    for i, pair in enumerate(job.pairs):
        kept_metrics += (yield from circuit_metrics(decoder, pair, kept, values)) / n_pairs
        yield Progress("faithfulness", i + 1, n_pairs)
    yield FoundCircuit(ranked, clean, corrupt, faithfulness(kept_metrics, clean, ablated), means.by_position)


def _check_pairs(pairs: tuple[CleanCorruptPair, ...], spec: DecoderSpec) -> None:
    if not pairs:
        raise InvalidArgument("pairs", "is empty; a circuit is found on at least one pair")
    for i, pair in enumerate(pairs):
        if not 1 <= len(pair.clean) <= spec.context_length:
            raise InvalidArgument(
                f"pairs[{i}].clean", f"has {len(pair.clean)} tokens; accepted: 1 to {spec.context_length}"
            )
        if len(pair.corrupt) != len(pair.clean):
            raise InvalidArgument(
                f"pairs[{i}].corrupt",
                f"has {len(pair.corrupt)} tokens and the clean prompt {len(pair.clean)}; outputs are exchanged "
                "position by position, so both need equally many",
            )
        if pair.clean_answer == pair.corrupt_answer:
            raise InvalidArgument(
                f"pairs[{i}].corrupt_answer", "starts with the same token as clean_answer; they must differ there"
            )


def _check_sizes(job: CircuitSearch, spec: DecoderSpec) -> None:
    n_heads = spec.n_layers * spec.n_heads
    if not 1 <= job.circuit_size <= n_heads:
        raise InvalidArgument("circuit_size", f"{job.circuit_size} of {n_heads} heads; accepted: 1 to {n_heads}")
    if job.random_sets < 1:
        raise InvalidArgument("random_sets", "a circuit is reported beside at least one random one")


def _check_difference(runs: PairRuns, index: int) -> None:
    clean, corrupt = runs.clean_metric, runs.corrupt_metric
    if not clean - corrupt >= MIN_DIFFERENCE:
        raise InvalidArgument(
            f"pairs[{index}]",
            f"logit(clean_answer) - logit(corrupt_answer) is {clean:.3f} after the clean prompt and {corrupt:.3f} "
            f"after the corrupt one; effects are shares of the difference, which must be at least {MIN_DIFFERENCE}: "
            "the model has to tell the prompts apart",
        )


def _ranked(effects: Tensor, spec: DecoderSpec, seed: int) -> tuple[HeadEffect, ...]:
    """Ranks effects [n_pairs, heads]; among equals the earlier layer and head is first."""
    mean = effects.mean(dim=0)
    low, high = ends(resampled_means(effects, seed))
    order = mean.abs().sort(descending=True, stable=True).indices.tolist()
    return tuple(
        HeadEffect(i // spec.n_heads, i % spec.n_heads, float(mean[i]), float(low[i]), float(high[i])) for i in order
    )

"""Faithfulness of a circuit: what is left of the answer when all heads outside of it are mean-ablated.

    faithfulness(C) = (m(heads outside C ablated) - m(all heads ablated)) / (m(clean) - m(all heads ablated))

m is the mean of the metric over the clean prompts; ablated heads have their mean output over the corrupt prompts
(mean_ablation.py), and MLPs are left alone. All heads have 1 and none has 0; a circuit that leaves out heads that work
against the answer can have more than 1. The means are taken before dividing, so that no pair with a small denominator
decides (Wang et al. 2023, Interpretability in the Wild, section 4; normalised as in Hanna et al. 2024, Have Faith in
Faithfulness). Random circuits of the same size are drawn from all heads.
"""

from dataclasses import dataclass
from statistics import fmean, stdev

import torch
from torch import Tensor

from patchclamp_server.analysis.heads.circuits.runs import CleanCorruptPair, run, variant_ends, variants_at_once
from patchclamp_server.errors import InvalidArgument
from patchclamp_server.model.decoder import Decoder
from patchclamp_server.model.spec import DecoderSpec

# In logits. What is divided by less is not told from rounding.
MIN_DIFFERENCE = 0.1


@dataclass(frozen=True)
class Faithfulness:
    """Of a circuit and of random ones; `ablated_metric` is that of all heads ablated."""

    circuit: float
    random: tuple[float, ...]
    ablated_metric: float

    @property
    def random_mean(self) -> float:
        return fmean(self.random)

    @property
    def random_deviation(self) -> float:
        """Sample standard deviation; 0 for one."""
        return stdev(self.random) if len(self.random) > 1 else 0.0


def circuits(heads: list[tuple[int, int]], random_sets: int, spec: DecoderSpec, seed: int) -> Tensor:
    """Heads that are kept [1 + random_sets, n_layers, n_heads] bool: those given, then as many at random."""
    kept = torch.zeros(1 + random_sets, spec.n_layers * spec.n_heads, dtype=torch.bool)
    kept[0, [layer * spec.n_heads + head for layer, head in heads]] = True
    generator = torch.Generator().manual_seed(seed)
    for row in kept[1:]:
        row[torch.randperm(len(row), generator=generator)[: len(heads)]] = True
    return kept.view(-1, spec.n_layers, spec.n_heads)


def circuit_metrics(decoder: Decoder, pair: CleanCorruptPair, kept: Tensor, means: Tensor) -> Tensor:
    """Metric of the clean prompt with only the heads of each circuit kept [n, n_layers, n_heads] -> [n] float64."""
    clean = run(decoder, pair.clean)
    parts = torch.split(~kept, variants_at_once(len(pair.clean)))
    return torch.cat([pair.metric(decoder, variant_ends(decoder, clean, part, means)) for part in parts])


def ablated_metric(decoder: Decoder, pair: CleanCorruptPair, means: Tensor) -> float:
    """Metric of the clean prompt with all heads ablated."""
    none = torch.zeros(1, decoder.spec.n_layers, decoder.spec.n_heads, dtype=torch.bool)
    return float(circuit_metrics(decoder, pair, none, means))


def check_denominator(clean_metric: float, ablated_metric: float) -> None:
    """InvalidArgument where faithfulness is not defined."""
    if not abs(clean_metric - ablated_metric) >= MIN_DIFFERENCE:
        raise InvalidArgument(
            "pairs",
            f"the mean metric is {clean_metric:.3f}, and {ablated_metric:.3f} with all heads ablated; faithfulness is "
            f"a share of the difference, which must be at least {MIN_DIFFERENCE}: send pairs that heads decide",
        )


def faithfulness(metrics: Tensor, clean_metric: float, ablated_metric: float) -> Faithfulness:
    """metrics [1 + n]: means over pairs, in the order of `circuits`."""
    circuit, *random = ((metrics - ablated_metric) / (clean_metric - ablated_metric)).tolist()
    return Faithfulness(circuit, tuple(random), ablated_metric)

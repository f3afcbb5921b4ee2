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
from patchclamp_server.engine.exclusive import Sliced
from patchclamp_server.errors import InvalidArgument
from patchclamp_server.model.decoder import Decoder
from patchclamp_server.model.spec import DecoderSpec

# This is in logits. A smaller denominator could not be told from rounding.
MIN_DIFFERENCE = 0.1


@dataclass(frozen=True)
class Faithfulness:
    """The faithfulness of a circuit and of random ones; `ablated_metric` is the metric with all heads ablated."""

    circuit: float
    random: tuple[float, ...]
    ablated_metric: float

    @property
    def random_mean(self) -> float:
        return fmean(self.random)

    @property
    def random_deviation(self) -> float:
        """Returns the sample standard deviation, or 0 for one circuit."""
        return stdev(self.random) if len(self.random) > 1 else 0.0


def circuits(heads: list[tuple[int, int]], random_sets: int, spec: DecoderSpec, seed: int) -> Tensor:
    """Returns which heads are kept, bool [1 + random_sets, n_layers, n_heads]: those given, then as many at random."""
    kept = torch.zeros(1 + random_sets, spec.n_layers * spec.n_heads, dtype=torch.bool)
    kept[0, [layer * spec.n_heads + head for layer, head in heads]] = True
    generator = torch.Generator().manual_seed(seed)
    for row in kept[1:]:
        row[torch.randperm(len(row), generator=generator)[: len(heads)]] = True
    return kept.view(-1, spec.n_layers, spec.n_heads)


def circuit_metrics(decoder: Decoder, pair: CleanCorruptPair, kept: Tensor, means: Tensor) -> Sliced[Tensor]:
    """Returns the metrics [n] float64 of the clean prompt when only the heads of each circuit, kept [n, n_layers,
    n_heads], remain."""
    clean = yield from run(decoder, pair.clean)
    metrics = []
    for part in torch.split(~kept, variants_at_once(len(pair.clean))):
        metrics.append(pair.metric(decoder, (yield from variant_ends(decoder, clean, part, means))))
    return torch.cat(metrics)


def ablated_metric(decoder: Decoder, pair: CleanCorruptPair, means: Tensor) -> Sliced[float]:
    """Returns the metric of the clean prompt with all heads ablated."""
    none = torch.zeros(1, decoder.spec.n_layers, decoder.spec.n_heads, dtype=torch.bool)
    return float((yield from circuit_metrics(decoder, pair, none, means)))


def check_denominator(clean_metric: float, ablated_metric: float) -> None:
    """Raises InvalidArgument where faithfulness is not defined."""
    if not abs(clean_metric - ablated_metric) >= MIN_DIFFERENCE:
        raise InvalidArgument(
            "pairs",
            f"the mean metric is {clean_metric:.3f}, and {ablated_metric:.3f} with all heads ablated; faithfulness is "
            f"a share of the difference, which must be at least {MIN_DIFFERENCE}: send pairs that heads decide",
        )


def faithfulness(metrics: Tensor, clean_metric: float, ablated_metric: float) -> Faithfulness:
    """Returns the faithfulness of metrics [1 + n], which are means over pairs in the order of `circuits`."""
    circuit, *random = ((metrics - ablated_metric) / (clean_metric - ablated_metric)).tolist()
    return Faithfulness(circuit, tuple(random), ablated_metric)

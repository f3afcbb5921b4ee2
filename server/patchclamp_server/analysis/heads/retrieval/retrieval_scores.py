"""Retrieval score: how much of a needle a head copies while the model answers from it.

    hit at step t:  j = argmax_j a_h(t, j) lies in the needle, and token j is the token generated at t
    score_h = |{j hit in any step}| / |needle|          averaged over the runs in which the model succeeded

(Wu et al. 2024, Retrieval Head Mechanistically Explains Long-Context Factuality, section 2.) Positions are counted
once, as in the paper; the published code counts repeats, so that its scores can exceed 1, and takes the answer alone
for the needle. It needs no attention matrix: the key with the largest probability is enough.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from patchclamp_server.analysis.heads.scores.scoring import ends, resampled_means
from patchclamp_server.interventions.program import ReadoutValue

# A run succeeds with more than this ROUGE-1 recall of the answer.
SUCCESS_RECALL = 0.5
STABLE_HEADS = 10
HALVES = 100


def run_scores(
    readouts: Iterable[ReadoutValue], tokens: Sequence[int], needle: range, shape: tuple[int, int]
) -> Tensor:
    """Returns the share of the needle that each head copied in one run, [n_layers, n_heads] float64.

    `readouts` are those of all heads, at every position whose row generated a token; `tokens` are prompt and answer.
    The row at a position generates the token after it.
    """
    copied = torch.zeros(*shape, len(needle), dtype=torch.bool)
    for value in readouts:
        generated = tokens[value.position + 1]
        for head, key in enumerate(value.ids):
            if key in needle and tokens[key] == generated:
                copied[value.layer, head, key - needle.start] = True
    return copied.double().mean(dim=2)


@dataclass(eq=False)
class RetrievalScores:
    """The scores of the successful runs so far, each [n_layers, n_heads]."""

    runs: list[Tensor] = field(default_factory=list)

    @property
    def samples(self) -> Tensor:
        """Returns the scores [n, n_layers, n_heads] float64."""
        return torch.stack(self.runs)

    @property
    def mean(self) -> Tensor:
        return self.samples.mean(dim=0)

    @property
    def always_on(self) -> Tensor:
        """Returns the heads that scored in every run, bool [n_layers, n_heads]."""
        return (self.samples > 0).all(dim=0)

    def interval(self, seed: int) -> tuple[Tensor, Tensor]:
        """Returns the ends of the 95 % bootstrap interval of the mean, over runs."""
        return ends(resampled_means(self.samples.float(), seed))

    def stability(self, seed: int) -> float:
        """Returns the mean overlap of the best heads of random halves of the runs, HALVES times; 0 for one run."""
        samples, half = self.samples, len(self.runs) // 2
        if not half:
            return 0.0
        generator = torch.Generator().manual_seed(seed)
        orders = [torch.randperm(len(samples), generator=generator) for _ in range(HALVES)]
        halves = [(samples[order[:half]].mean(dim=0), samples[order[half : 2 * half]].mean(dim=0)) for order in orders]
        return sum(overlap(best(a, STABLE_HEADS), best(b, STABLE_HEADS)) for a, b in halves) / HALVES


def best(scores: Tensor, k: int) -> set[int]:
    """Returns the k heads with the largest scores above 0, as indices of the flattened [n_layers, n_heads]. Among
    equals the first are taken."""
    flat = scores.flatten()
    order = flat.argsort(descending=True, stable=True)[:k]
    return set(order[flat[order] > 0].tolist())


def overlap(a: set[int], b: set[int]) -> float:
    """Returns |A and B| / max(|A|, |B|), or 0 for empty sets."""
    return len(a & b) / max(1, len(a), len(b))

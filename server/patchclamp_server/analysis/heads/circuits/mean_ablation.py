"""Mean ablation: the output of a head is replaced by its mean over the corrupt prompts, in the clean run.

    change_h = metric(clean run | z_h ← mean z_h(corrupt)) - metric(clean run)

Negative for a head that the answer needs. The mean keeps what a head does on any prompt of the kind and takes what it
knows of this one, where an output of zero would be one that the following layers have never seen (Wang et al. 2023,
Interpretability in the Wild, section 2.1). Heads downstream see the change, so this is the total effect.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from patchclamp_server.analysis.heads.circuits.runs import (
    CleanCorruptPair,
    PairRuns,
    Run,
    single_heads,
    variant_ends,
    variants_at_once,
)
from patchclamp_server.engine.exclusive import Sliced
from patchclamp_server.interventions.pooling import ordinary_tokens
from patchclamp_server.model.decoder import Decoder


def changes(decoder: Decoder, runs: PairRuns, means: Tensor) -> Iterator[Sliced[Tensor]]:
    """Is a CircuitMethod."""
    for heads in single_heads(decoder.spec, variants_at_once(len(runs.pair.clean))):
        yield _changes(decoder, runs, heads, means)


def _changes(decoder: Decoder, runs: PairRuns, heads: Tensor, means: Tensor) -> Sliced[Tensor]:
    ends = yield from variant_ends(decoder, runs.clean, heads, means)
    return runs.pair.metric(decoder, ends) - runs.clean_metric


class CorruptMeans:
    """The mean output of every head over the corrupt prompts of all pairs.

    When all prompts have equally many tokens, each position has a mean: it then plays the same part in prompts of one
    template, and the first, which attention often rests on, is not mixed with the others. Otherwise there is one mean
    over all tokens of all prompts, but for those that interventions/pooling.py leaves out, since positions of prompts
    of different lengths do not correspond.
    """

    def __init__(self, pairs: tuple[CleanCorruptPair, ...]) -> None:
        self.by_position = len({len(pair.corrupt) for pair in pairs}) == 1
        self._sum: Tensor | None = None  # float64
        self._count = torch.zeros(())  # or by layer

    def add(self, corrupt: Run) -> None:
        total, count = corrupt.z.double(), torch.ones(())
        if not self.by_position:
            kept = ordinary_tokens(corrupt.z.flatten(2))[:, :, None, None]
            total, count = (total * kept).sum(dim=1, keepdim=True), kept.sum(dim=1, keepdim=True)
        self._sum = total if self._sum is None else self._sum + total
        self._count = self._count + count

    def values(self, dtype: torch.dtype) -> Tensor:
        """Returns the means [n_layers, T or 1, n_heads, head_dim]."""
        assert self._sum is not None
        return (self._sum / self._count).to(dtype)

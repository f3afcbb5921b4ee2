"""The sets that a policy fixes for a prompt, and how much those of two prompts overlap.

J(A, B) = |A and B| / |A or B|,   1 for two empty sets
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from patchclamp_server.analysis.documents import inputs_of, pools_for
from patchclamp_server.model.sites import Site
from patchclamp_server.sparsity.mlp import SparseModel
from patchclamp_server.sparsity.policy import Selector, SequenceState

CHUNK_TOKENS = 512


@torch.inference_mode()
def core_neurons(model: SparseModel, selector: Selector, prompt: Sequence[int]) -> list[Tensor]:
    """The neurons int64 [n], ascending, that are computed after this prompt, by layer; all of a layer that is dense."""
    state, decoder = selector.begin(), model.decoder
    ids = torch.tensor([list(prompt)])
    pools = pools_for(decoder, ids)
    observer = _Observer(selector, state)
    for start in range(0, ids.shape[1], CHUNK_TOKENS):
        end = min(start + CHUNK_TOKENS, ids.shape[1])
        decoder.forward(inputs_of(ids, start, end, decoder), pools, observer)
    selector.end_prompt(state)
    sets = []
    for layer in range(model.n_layers):
        fixed = None if selector.is_dense(layer) else selector.fixed_set(state, layer)
        everything = torch.arange(model.spec.d_ff)
        sets.append(everything if fixed is None else fixed.nonzero()[:, 0].cpu())
    return sets


def jaccard(first: Tensor, second: Tensor) -> float:
    """Of two sets of distinct neurons."""
    shared = int(torch.isin(first, second).sum())
    union = len(first) + len(second) - shared
    return shared / union if union else 1.0


class _Observer:
    def __init__(self, selector: Selector, state: SequenceState) -> None:
        self._selector = selector
        self._state = state

    def visit(self, site: Site, layer: int, x: Tensor) -> None:
        if site is Site.MLP_POST:
            self._selector.observe_prompt(self._state, layer, x)

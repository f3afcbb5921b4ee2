"""Stability-guided CoreInfer keeps the neurons that are most often in the core of a prompt token.

    m    = mean over tokens of #{j: h_tj > 0}                   k = token_keep · m, rounded up
    core of token t: its k largest positive h_tj                f_j = #{t: j in the core of t}
    set  = the keep · d_ff neurons with the largest f_j, of those with f_j > 0
    fill = where these are fewer, as after a prompt of one token, others by the largest mean of h_tj over the prompt

CoreInfer: Accelerating Large Language Model Inference with Semantics-Inspired Adaptive Sparse Activation (Wang et al.
2024); published for layers 6-26 of 32, without the last line; METHODS S1 asks for exactly the requested share.
`rank_by="magnitude"` counts and ranks |h| instead, and fills by its mean, for models without ReLU. Ties go by the
index. SparsityReport.filled_ratio says how much was filled. k needs the whole prompt, so until `end_prompt` a state
keeps the order of token_keep · d_ff neurons a token (int32).
"""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from patchclamp_server.sparsity.mlp import SparseModel
from patchclamp_server.sparsity.policies.shares import count
from patchclamp_server.sparsity.policy import (
    ONLY_ACTIVE,
    Cost,
    Policy,
    Selector,
    SequenceState,
    check_choice,
    check_ratio,
)
from patchclamp_server.sparsity.profile import Profile

RANKINGS = ("value", "magnitude")


@dataclass(frozen=True, kw_only=True)
class CoreInferStability(Policy):
    rank_by: str = "magnitude"
    token_keep: float = 0.2
    name: ClassVar[str] = "coreinfer_stability"
    fixes_sets: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("rank_by", self.rank_by, RANKINGS)
        check_ratio("token_keep", self.token_keep)

    def bind(self, model: SparseModel, profile: Profile | None = None) -> Selector:
        return _Selector(self, model, profile)


class _Selector(Selector):
    def __init__(self, policy: CoreInferStability, model: SparseModel, profile: Profile | None) -> None:
        super().__init__(policy, model, profile)
        self._policy = policy

    def observe_prompt(self, state: SequenceState, layer: int, neurons: Tensor) -> None:
        prompt = state.statistics.setdefault(layer, PromptStatistics())
        prompt.orders.append(token_order(neurons, self._policy))
        prompt.add(neurons, self._policy)

    def end_prompt(self, state: SequenceState) -> None:
        for layer, prompt in state.statistics.items():
            counts = core_counts(prompt.orders, self._policy.token_keep, self.model.spec.d_ff)
            choose(state, layer, counts, self.keep[layer], prompt.total)
        state.statistics.clear()

    def cost(self, layer: int, weight_bits: int = 16) -> Cost:
        return ONLY_ACTIVE


@dataclass(eq=False)
class PromptStatistics:
    """Statistics of one layer: `orders` as token_order gives them, and the sum of the ranked values over the tokens."""

    orders: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    total: Tensor | None = None  # [d_ff] float64, so that chunks of a prompt add up to the same

    def add(self, neurons: Tensor, policy: CoreInferStability) -> None:
        total = ranked_values(neurons, policy).double().sum(0)
        self.total = total if self.total is None else self.total + total


def ranked_values(neurons: Tensor, policy: CoreInferStability) -> Tensor:
    return neurons.abs() if policy.rank_by == "magnitude" else neurons


def token_order(neurons: Tensor, policy: CoreInferStability) -> tuple[Tensor, Tensor]:
    """Returns each row's strongest neurons in order [n, most], -1 beyond its positive ones, and their number [n]."""
    h = ranked_values(neurons, policy)
    most = -int(-policy.token_keep * h.shape[1] // 1)
    top = h.topk(most, dim=1)
    return torch.where(top.values > 0, top.indices, -1).int(), (h > 0).sum(1)


def core_counts(chunks: list[tuple[Tensor, Tensor]], token_keep: float, d_ff: int) -> Tensor:
    """Returns f [d_ff] of a whole prompt."""
    order, positives = (torch.cat(parts) for parts in zip(*chunks, strict=True))
    k = -int(-token_keep * positives.double().mean().item() // 1)
    core = order[:, :k].flatten().long()
    return torch.bincount(core[core >= 0], minlength=d_ff)


def choose(state: SequenceState, layer: int, counts: Tensor, keep: float, mean: Tensor | None) -> None:
    """Fixes the set of a layer: by `counts` [d_ff], then by `mean` [d_ff] (any multiple of it) where there is one."""
    wanted = count(keep, len(counts))
    by_mean = torch.arange(len(counts), device=counts.device) if mean is None else _descending(mean)
    found = _descending(counts)[: min(wanted, int((counts > 0).sum()))]
    mask = torch.zeros(len(counts), dtype=torch.bool, device=counts.device)
    mask[found] = True
    rest = by_mean[~mask[by_mean]][: wanted - len(found)]
    mask[rest] = True
    state.sets[layer] = mask
    # A layer that keeps all is dense, and has no set.
    if keep < 1.0:
        state.chosen += wanted
        state.filled += len(rest)


def _descending(values: Tensor) -> Tensor:
    """Returns indices in descending order; of equal values, the first comes first."""
    return values.sort(descending=True, stable=True).indices

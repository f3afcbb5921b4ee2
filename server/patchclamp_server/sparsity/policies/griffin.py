"""GRIFFIN keeps the neurons that were relatively strong over the prompt.

    s_j = sqrt(Σ_t (h_tj / ‖h_t‖)²) over the prompt tokens t; the keep · d_ff largest are the set of the sequence

Prompt-prompted Adaptive Structured Pruning for Efficient LLM Generation (Dong, Chen, Chi 2024). Rows that are all zero
count nothing. The statistic is a sum over tokens, so chunks of a prompt add up; without a prompt the layer is dense.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from patchclamp_server.sparsity.mlp import SparseModel
from patchclamp_server.sparsity.policies.shares import top_mask
from patchclamp_server.sparsity.policy import ONLY_ACTIVE, Cost, Policy, Selector, SequenceState
from patchclamp_server.sparsity.profile import Profile


@dataclass(frozen=True, kw_only=True)
class Griffin(Policy):
    name: ClassVar[str] = "griffin"
    fixes_sets: ClassVar[bool] = True

    def bind(self, model: SparseModel, profile: Profile | None = None) -> Selector:
        return _Selector(self, model, profile)


class _Selector(Selector):
    def observe_prompt(self, state: SequenceState, layer: int, neurons: Tensor) -> None:
        squares = neurons.float().square()
        shares = squares / squares.sum(1, keepdim=True).clamp_min(1e-30)
        state.statistics[layer] = shares.sum(0) + state.statistics.get(layer, 0)

    def end_prompt(self, state: SequenceState) -> None:
        state.sets = {layer: top_mask(sums, self.keep[layer]) for layer, sums in state.statistics.items()}
        state.statistics.clear()

    def cost(self, layer: int, weight_bits: int = 16) -> Cost:
        return ONLY_ACTIVE

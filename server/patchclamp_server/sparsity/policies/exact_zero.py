"""In ReLU models a neuron is active where h_j ≠ 0, so the output is that of the dense model.

Neurons in Large Language Models: Dead, N-gram, Positional (Voita, Ferrando, Nalmpantis 2023). The input products are
computed densely; only down is read sparsely. `keep_ratio` has no meaning here: what is zero decides.
"""

from dataclasses import dataclass
from typing import ClassVar

from patchclamp_server.sparsity.mlp import MlpInput, SparseModel
from patchclamp_server.sparsity.policy import Cost, Policy, Selection, Selector, SequenceState
from patchclamp_server.sparsity.profile import Profile


@dataclass(frozen=True, kw_only=True)
class ExactZero(Policy):
    name: ClassVar[str] = "exact_zero"

    def bind(self, model: SparseModel, profile: Profile | None = None) -> Selector:
        return _Selector(self, model, profile)


class _Selector(Selector):
    def select(self, state: SequenceState, layer: int, mlp: MlpInput) -> Selection:
        return Selection(mlp.activated != 0)

    def cost(self, layer: int, weight_bits: int = 16) -> Cost:
        # The gate (or the only input matrix) tells what is zero.
        share = 1 / self.weights(layer).matrices
        return Cost(share, 1.0 - share)

"""The oracle keeps the neurons whose contribution |h_j| ‖down_j‖ turns out largest; no policy can serve it: a bound."""

from dataclasses import dataclass
from typing import ClassVar

from patchclamp_server.sparsity.mlp import MlpInput, SparseModel
from patchclamp_server.sparsity.policies.shares import top_mask
from patchclamp_server.sparsity.policy import Cost, Policy, Selection, Selector, SequenceState
from patchclamp_server.sparsity.profile import Profile


@dataclass(frozen=True, kw_only=True)
class Oracle(Policy):
    name: ClassVar[str] = "oracle"

    def bind(self, model: SparseModel, profile: Profile | None = None) -> Selector:
        return _Selector(self, model, profile)


class _Selector(Selector):
    def select(self, state: SequenceState, layer: int, mlp: MlpInput) -> Selection:
        return Selection(top_mask(mlp.neurons.abs() * mlp.weights.down_norm, self.keep[layer]))

    def cost(self, layer: int, weight_bits: int = 16) -> Cost:
        share = 1 / self.weights(layer).matrices
        return Cost(1.0 - share, share)

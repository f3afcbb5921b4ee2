"""CATS keeps neurons with a large |act(gate_j · x)|; up and down are read for those alone.

    active_j = |act(gate_j · x)| ≥ t_l          t_l: quantile 1 - keep of the calibration activations
    without a profile: the keep · d_ff largest of each row

CATS: Contextually-Aware Thresholding for Sparsity in Large Language Models (Lee et al. 2024).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from patchclamp_server.sparsity.mlp import MlpInput, SparseModel
from patchclamp_server.sparsity.policies.shares import STEPS, threshold, top_mask
from patchclamp_server.sparsity.policy import Cost, Policy, Selection, Selector, SequenceState
from patchclamp_server.sparsity.profile import Profile, ProfileTensor


@dataclass(frozen=True, kw_only=True)
class Cats(Policy):
    name: ClassVar[str] = "cats"
    profile_tensors: ClassVar[Mapping[str, ProfileTensor]] = {"quantiles": ProfileTensor(("layers", STEPS + 1))}

    def bind(self, model: SparseModel, profile: Profile | None = None) -> Selector:
        return _Selector(self, model, profile)


class _Selector(Selector):
    def select(self, state: SequenceState, layer: int, mlp: MlpInput) -> Selection:
        scores = mlp.activated.abs()
        if self.profile is None:
            return Selection(top_mask(scores, self.keep[layer]))
        return Selection(scores >= threshold(self.profile.tensors["quantiles"][layer], self.keep[layer]))

    def cost(self, layer: int, weight_bits: int = 16) -> Cost:
        share = 1 / self.weights(layer).matrices
        return Cost(share, 1.0 - share)

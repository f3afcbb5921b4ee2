"""In similarity-guided CoreInfer prompts of one topic share their core, so a prompt takes the core of its cluster.

In calibration each sentence has core counts f_l (see coreinfer_stability); the multi-hot of the top neurons at
`cluster_layer`, scaled to length one, is clustered by k-means (k ≥ 4, the elbow of the inertia), and a cluster's
neurons are ranked, layer by layer, by the summed counts of its sentences. A request is given the cluster whose centre
is nearest to the multi-hot of its own prompt, and the keep · d_ff first neurons of that ranking, filled up as in
coreinfer_stability where no sentence of the cluster had so many in its core. Without a prompt it is the first cluster,
filled up by the index. The paper is that of coreinfer_stability.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from patchclamp_server.errors import FailedPrecondition
from patchclamp_server.sparsity.mlp import SparseModel
from patchclamp_server.sparsity.policies.coreinfer_stability import (
    CoreInferStability,
    PromptStatistics,
    choose,
    core_counts,
    token_order,
)
from patchclamp_server.sparsity.policies.shares import top_mask
from patchclamp_server.sparsity.policy import ONLY_ACTIVE, Cost, Selector, SequenceState
from patchclamp_server.sparsity.profile import Profile, ProfileTensor

MULTI_HOT_KEEP = 0.2


@dataclass(frozen=True, kw_only=True)
class CoreInferSimilarity(CoreInferStability):
    name: ClassVar[str] = "coreinfer_similarity"
    needs_profile: ClassVar[bool] = True
    profile_tensors: ClassVar[Mapping[str, ProfileTensor]] = {
        "centres": ProfileTensor(("clusters", "neurons")),
        "counts": ProfileTensor(("clusters", "layers", "neurons")),
        "cluster_layer": ProfileTensor(()),
    }

    def bind(self, model: SparseModel, profile: Profile | None = None) -> Selector:
        return _Selector(self, model, profile)


class _Selector(Selector):
    def __init__(self, policy: CoreInferStability, model: SparseModel, profile: Profile | None) -> None:
        super().__init__(policy, model, profile)
        assert profile is not None
        self._policy = policy
        self._centres = profile.tensors["centres"]  # [k, d_ff]
        self._counts = profile.tensors["counts"]  # [k, n_layers, d_ff]
        self._layer = int(profile.tensors["cluster_layer"])
        if not 0 <= self._layer < model.n_layers:
            raise FailedPrecondition("sparsity.profile", f"finds clusters at layer {self._layer}, which is not there")

    def observe_prompt(self, state: SequenceState, layer: int, neurons: Tensor) -> None:
        prompt = state.statistics.setdefault(layer, PromptStatistics())
        prompt.add(neurons, self._policy)
        if layer == self._layer:
            prompt.orders.append(token_order(neurons, self._policy))

    def end_prompt(self, state: SequenceState) -> None:
        cluster, prompts = 0, state.statistics
        if self._layer in prompts:
            counts = core_counts(prompts[self._layer].orders, self._policy.token_keep, self.model.spec.d_ff)
            cluster = int((self._centres - multi_hot(counts)).square().sum(1).argmin())
        for layer, keep in enumerate(self.keep):
            mean = prompts[layer].total if layer in prompts else None
            choose(state, layer, self._counts[cluster, layer], keep, mean)
        prompts.clear()

    def cost(self, layer: int, weight_bits: int = 16) -> Cost:
        return ONLY_ACTIVE


def multi_hot(counts: Tensor) -> Tensor:
    """Turns counts [..., d_ff] into 1/√n at the n most frequent neurons."""
    hot = (top_mask(counts, MULTI_HOT_KEEP) & (counts > 0)).float()
    return torch.nn.functional.normalize(hot, dim=-1)

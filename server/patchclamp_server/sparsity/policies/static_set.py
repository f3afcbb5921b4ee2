"""A static set is the same for every request: a `neuron_set` artifact, or the neurons that calibration found largest.

    calibrated score_j = Σ_t h_tj² ‖down_j‖²     t: calibration tokens but attention sinks (interventions/pooling.py)

The keep · d_ff largest are active. With `neurons` (layer → indices) the set is given, and `keep_ratio` is not used;
layers that it does not name stay dense.
Such sets are those of Neuron Specialization (Tan, Wu, Monz 2024) and the dead neurons of a census.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from patchclamp_server.errors import FailedPrecondition, InvalidArgument
from patchclamp_server.sparsity.mlp import SparseModel
from patchclamp_server.sparsity.policies.shares import top_mask
from patchclamp_server.sparsity.policy import ONLY_ACTIVE, Cost, Policy, Selector, SequenceState
from patchclamp_server.sparsity.profile import Profile, ProfileTensor


@dataclass(frozen=True, kw_only=True)
class StaticSet(Policy):
    neurons: Mapping[int, tuple[int, ...]] | None = None
    name: ClassVar[str] = "static_set"
    profile_tensors: ClassVar[Mapping[str, ProfileTensor]] = {"scores": ProfileTensor(("layers", "neurons"))}
    fixes_sets: ClassVar[bool] = True

    def bind(self, model: SparseModel, profile: Profile | None = None) -> Selector:
        return _Selector(self, model, profile)


class _Selector(Selector):
    def __init__(self, policy: StaticSet, model: SparseModel, profile: Profile | None) -> None:
        super().__init__(policy, model, profile)
        self._sets: dict[int, Tensor] = {}
        if policy.neurons is not None:
            self._sets = {layer: self._given(layer, chosen) for layer, chosen in policy.neurons.items()}
            self.keep = tuple(0.0 if layer in self._sets else 1.0 for layer in range(model.n_layers))
        elif profile is not None:
            scores = profile.tensors["scores"]
            self._sets = {layer: top_mask(scores[layer], keep) for layer, keep in enumerate(self.keep)}
        else:
            raise FailedPrecondition("sparsity.profile", "static_set needs a neuron set or a calibrated profile")

    def _given(self, layer: int, chosen: tuple[int, ...]) -> Tensor:
        d_ff = self.model.spec.d_ff
        if not 0 <= layer < self.model.n_layers:
            raise InvalidArgument("sparsity.neurons", f"the model has no layer {layer}")
        if any(not 0 <= neuron < d_ff for neuron in chosen):
            raise InvalidArgument(f"sparsity.neurons[{layer}]", f"a neuron is not in [0, {d_ff})")
        mask = torch.zeros(d_ff, dtype=torch.bool, device=self.model.decoder.device)
        mask[list(chosen)] = True
        return mask

    def fixed_set(self, state: SequenceState, layer: int) -> Tensor | None:
        return self._sets.get(layer)

    def cost(self, layer: int, weight_bits: int = 16) -> Cost:
        return ONLY_ACTIVE

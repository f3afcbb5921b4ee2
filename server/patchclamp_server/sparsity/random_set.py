"""The control of every other policy: a set of equal size, drawn once for each layer."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from patchclamp_server.sparsity.mlp import SparseModel
from patchclamp_server.sparsity.policy import ONLY_ACTIVE, Cost, Policy, Selector, SequenceState
from patchclamp_server.sparsity.profile import Profile
from patchclamp_server.sparsity.top import top_mask


@dataclass(frozen=True, kw_only=True)
class RandomSet(Policy):
    seed: int = 0
    name: ClassVar[str] = "random"

    def bind(self, model: SparseModel, profile: Profile | None = None) -> Selector:
        return _Selector(self, model, profile, self.seed)


class _Selector(Selector):
    def __init__(self, policy: Policy, model: SparseModel, profile: Profile | None, seed: int) -> None:
        super().__init__(policy, model, profile)
        generator = torch.Generator().manual_seed(seed)
        scores = torch.rand(model.n_layers, model.spec.d_ff, generator=generator).to(model.decoder.device)
        self._sets = [top_mask(row, keep) for row, keep in zip(scores, self.keep, strict=True)]

    def fixed_set(self, state: SequenceState, layer: int) -> Tensor:
        return self._sets[layer]

    def cost(self, layer: int, weight_bits: int = 16) -> Cost:
        return ONLY_ACTIVE

"""A random set is the control of every other policy: it has equal size and is drawn once for each layer.

With `channels` it is not neurons, but input channels of each of the four products of a block, as TEAL and WINA choose
them.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from patchclamp_server.sparsity.mlp import SparseModel
from patchclamp_server.sparsity.policies.shares import top_mask
from patchclamp_server.sparsity.policy import (
    ONLY_ACTIVE,
    PROJECTIONS,
    Cost,
    Policy,
    Selector,
    SequenceState,
    input_widths,
)
from patchclamp_server.sparsity.profile import Profile


@dataclass(frozen=True, kw_only=True)
class RandomSet(Policy):
    seed: int = 0
    channels: bool = False
    name: ClassVar[str] = "random"
    fixes_sets: ClassVar[bool] = True

    def bind(self, model: SparseModel, profile: Profile | None = None) -> Selector:
        return _Channels(self, model, profile) if self.channels else _Neurons(self, model, profile)


class _Neurons(Selector):
    def __init__(self, policy: RandomSet, model: SparseModel, profile: Profile | None) -> None:
        super().__init__(policy, model, profile)
        scores = _scores(policy, model, model.spec.d_ff)
        self._sets = [top_mask(row, keep) for row, keep in zip(scores, self.keep, strict=True)]

    def fixed_set(self, state: SequenceState, layer: int) -> Tensor:
        return self._sets[layer]

    def cost(self, layer: int, weight_bits: int = 16) -> Cost:
        return ONLY_ACTIVE


class _Channels(Selector):
    def __init__(self, policy: RandomSet, model: SparseModel, profile: Profile | None) -> None:
        super().__init__(policy, model, profile)
        widths = input_widths(model.spec)
        self._masks = [
            dict(zip(PROJECTIONS, (top_mask(part, keep) for part in row.split(widths)), strict=True))
            for row, keep in zip(_scores(policy, model, sum(widths)), self.keep, strict=True)
        ]

    def channels(self, layer: int, projection: str, x: Tensor) -> Tensor:
        return self._masks[layer][projection].expand(len(x), -1)

    def cost(self, layer: int, weight_bits: int = 16) -> Cost:
        return ONLY_ACTIVE


def _scores(policy: RandomSet, model: SparseModel, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(policy.seed)
    return torch.rand(model.n_layers, width, generator=generator).to(model.decoder.device)

"""TEAL keeps input channels with |x_j| ≥ t, a threshold for each of the four products of a block.

    t = quantile 1 - keep of the calibration inputs of that product

With `allocation="uniform"` every product keeps the same share. With "greedy" each step within a block takes 0.05 / (its
share of the block's weights) off the one product with which the block's output changes least (L2 on calibration text),
until the block keeps `keep_ratio` of its weights. Training-Free Activation Sparsity in Large Language Models (Liu et
al. 2024).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from patchclamp_server.errors import FailedPrecondition
from patchclamp_server.sparsity.mlp import SparseModel
from patchclamp_server.sparsity.policies.shares import STEPS, threshold
from patchclamp_server.sparsity.policy import ONLY_ACTIVE, PROJECTIONS, Cost, Policy, Selector, check_choice
from patchclamp_server.sparsity.profile import Profile, ProfileTensor

ALLOCATIONS = ("uniform", "greedy")
STEP = 0.05


@dataclass(frozen=True, kw_only=True)
class Teal(Policy):
    allocation: str = "uniform"
    name: ClassVar[str] = "teal"
    needs_profile: ClassVar[bool] = True
    profile_tensors: ClassVar[Mapping[str, ProfileTensor]] = {
        **{f"quantiles.{name}": ProfileTensor(("layers", STEPS + 1)) for name in PROJECTIONS},
        "greedy": ProfileTensor(("layers", "steps", len(PROJECTIONS)), required=False),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("allocation", self.allocation, ALLOCATIONS)

    def bind(self, model: SparseModel, profile: Profile | None = None) -> Selector:
        return _Selector(self, model, profile)


class _Selector(Selector):
    def __init__(self, policy: Teal, model: SparseModel, profile: Profile | None) -> None:
        super().__init__(policy, model, profile)
        assert profile is not None
        self._thresholds = [
            {
                name: threshold(profile.tensors[f"quantiles.{name}"][layer], kept)
                for name, kept in zip(PROJECTIONS, self._kept(policy, profile, layer), strict=True)
            }
            for layer in range(model.n_layers)
        ]

    def _kept(self, policy: Teal, profile: Profile, layer: int) -> list[float]:
        """Returns the share that each product keeps."""
        keep = self.keep[layer]
        if policy.allocation == "uniform":
            return [keep] * len(PROJECTIONS)
        if "greedy" not in profile.tensors:
            raise FailedPrecondition("sparsity.profile", "was calibrated for uniform thresholds only")
        path: Tensor = profile.tensors["greedy"][layer]  # [steps, 4]: kept shares after each step
        return [float(share) for share in path[min(round((1.0 - keep) / STEP), len(path) - 1)]]

    def channels(self, layer: int, projection: str, x: Tensor) -> Tensor:
        return x.abs() >= self._thresholds[layer][projection]

    def cost(self, layer: int, weight_bits: int = 16) -> Cost:
        return ONLY_ACTIVE

"""Dense is the policy of a request that asks for none, and what a quality guard falls back to."""

from dataclasses import dataclass
from typing import ClassVar

from patchclamp_server.sparsity.mlp import SparseModel
from patchclamp_server.sparsity.policy import Cost, Policy, Selector
from patchclamp_server.sparsity.profile import Profile


@dataclass(frozen=True, kw_only=True)
class Dense(Policy):
    keep_ratio: float | tuple[float, ...] = 1.0
    name: ClassVar[str] = "dense"

    def bind(self, model: SparseModel, profile: Profile | None = None) -> Selector:
        return _Selector(self, model, profile)


class _Selector(Selector):
    def is_dense(self, layer: int) -> bool:
        return True

    def cost(self, layer: int, weight_bits: int = 16) -> Cost:
        return Cost(1.0, 0.0)

"""WINA keeps keep · width input channels with a large |x_j| ‖W_:,j‖ for each row, at each of a block's four products.

WINA: Weight Informed Neuron Activation for Accelerating Large Language Model Inference (Chen et al. 2025).
The norms are of the columns of the fused matrices (q, k, v together; gate and up together).
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from patchclamp_server.sparsity.mlp import SparseModel, matrix
from patchclamp_server.sparsity.policies.shares import top_mask
from patchclamp_server.sparsity.policy import ONLY_ACTIVE, PROJECTIONS, Cost, Policy, Selector
from patchclamp_server.sparsity.profile import Profile


@dataclass(frozen=True, kw_only=True)
class Wina(Policy):
    name: ClassVar[str] = "wina"

    def bind(self, model: SparseModel, profile: Profile | None = None) -> Selector:
        return _Selector(self, model, profile)


class _Selector(Selector):
    def prepare(self) -> None:
        _ = self._norms

    @property
    def _norms(self) -> list[dict[str, Tensor]]:
        derived, blocks = self.model.derived, self.model.decoder.blocks
        if "column_norms" not in derived:
            derived["column_norms"] = [
                {
                    name: torch.linalg.vector_norm(matrix(getattr(block, name)), dim=0, dtype=torch.float32)
                    for name in PROJECTIONS
                }
                for block in blocks
            ]
        norms: list[dict[str, Tensor]] = derived["column_norms"]
        return norms

    def channels(self, layer: int, projection: str, x: Tensor) -> Tensor:
        return top_mask(x.abs() * self._norms[layer][projection], self.keep[layer])

    def cost(self, layer: int, weight_bits: int = 16) -> Cost:
        return ONLY_ACTIVE

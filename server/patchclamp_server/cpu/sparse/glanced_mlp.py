"""An MLP in 8-bit activations, whose output projection reads only the neurons that are not 0.

Its input projection is multiplied from a copy that is laid out for that (glanced.py), its output projection from a
neuron-major one (kept.py), where the weights have codes of 4 bits; other codes are read as they are stored. The norms
say by how much a neuron adds.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from patchclamp_server.cpu.linear import Linear
from patchclamp_server.cpu.products import StoredProduct, can_round
from patchclamp_server.cpu.sparse.codes import codes_of
from patchclamp_server.cpu.sparse.glanced import GlancedCodes
from patchclamp_server.cpu.sparse.kept import KeptInputs
from patchclamp_server.cpu.stored import StoredMatrix

_GROUP = 32


@dataclass(frozen=True, eq=False)
class GlancedMlp:
    inputs: StoredProduct
    outputs: StoredProduct
    input_bias: Tensor | None
    output_bias: Tensor | None
    tiles: GlancedCodes | None
    kept: KeptInputs | None
    norms: NDArray[np.float32]  # [d_ff]: ‖W_out[:, j]‖

    @classmethod
    def of(cls, mlp_input: Linear, mlp_output: Linear) -> "GlancedMlp | None":
        """Returns the MLP of two projections, or None where their weights have no codes to be multiplied by 8 bits."""
        matrices = mlp_input.matrix, mlp_output.matrix
        if not all(matrix is not None and can_round(matrix) and not matrix.shape[1] % _GROUP for matrix in matrices):
            return None
        first, second = matrices
        assert first is not None
        assert second is not None
        norms = torch.linalg.vector_norm(mlp_output.dense(), dim=0, dtype=torch.float32).numpy()
        return cls(
            StoredProduct(first, rounds=True),
            StoredProduct(second, rounds=True),
            mlp_input.bias,
            mlp_output.bias,
            GlancedCodes.of([codes_of(part) for part in first.parts]),
            _kept(second),
            np.ascontiguousarray(norms),
        )

    def input(self, x: Tensor) -> Tensor:
        """Returns the pre-activations [T, d_ff or 2 d_ff] of x [T, d_model] float32."""
        y = self.inputs.multiply(x) if self.tiles is None else self.tiles.multiply(self.inputs.rounded(x))
        return _biased(y, self.input_bias)

    def output(self, neurons: Tensor) -> Tensor:
        """Returns y [T, d_model] of neurons [T, d_ff] float32."""
        y = self.outputs.multiply(neurons) if self.kept is None else torch.from_numpy(self.kept.sum(neurons.numpy()))
        return _biased(y, self.output_bias)


def _kept(matrix: StoredMatrix) -> KeptInputs | None:
    codes = codes_of(matrix.parts[0]) if len(matrix.parts) == 1 else None
    return None if codes is None else KeptInputs.of(codes)


def _biased(y: Tensor, bias: Tensor | None) -> Tensor:
    return y if bias is None else y.add_(bias)

"""Glance computes every neuron in 8-bit activations, and lets those count that then add most.

    h = act(gate · round(x)) (up · round(x))                 round: 8 bits by groups of 32 inputs (cpu/integers)
    A = the keep · d_ff neurons with the largest |h_j| ‖down_j‖
    y = Σ_{j ∈ A} round(h)_j down_j

The set is that of the oracle to within the rounding, so that it needs no calibration; what it saves is the reading of
down, and the time that products in float32 take for gates and ups. On a CPU, with weights in codes, both projections
are multiplied from copies that are laid out for this, decoding stays in compiled blocks (model/compiled), and the
vocabulary is seen through a preview (cpu/sparse/preview.py). Where weights have no codes, and on other devices, nothing
is rounded, and the set is the oracle's.

This is our own method. Predicting a set costs more than this arithmetic there: a sketch of 2 bits that is as fast keeps
less (perplexity ratio 1.09 against 1.04 at keep .5), and sets of the token before do not hold for the next (32).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from patchclamp_server.cpu.sparse.glanced_mlp import GlancedMlp
from patchclamp_server.sparsity.mlp import MlpInput, SparseModel
from patchclamp_server.sparsity.policies.shares import top_mask
from patchclamp_server.sparsity.policy import Cost, Policy, Selection, Selector, SequenceState
from patchclamp_server.sparsity.profile import Profile


@dataclass(frozen=True, kw_only=True)
class Glance(Policy):
    name: ClassVar[str] = "glance"

    def bind(self, model: SparseModel, profile: Profile | None = None) -> Selector:
        return _Selector(self, model, profile)


class _Selector(Selector):
    def prepare(self) -> None:
        _ = self.glanced

    @property
    def glanced(self) -> Sequence[GlancedMlp] | None:
        derived = self.model.derived
        if "glanced" not in derived:
            derived["glanced"] = _glanced(self.model)
        found: Sequence[GlancedMlp] | None = derived["glanced"]
        return found

    @cached_property
    def _norms(self) -> list[Tensor] | None:
        return None if self.glanced is None else [torch.from_numpy(mlp.norms) for mlp in self.glanced]

    def select(self, state: SequenceState, layer: int, mlp: MlpInput) -> Selection:
        norms = mlp.weights.down_norm if self._norms is None else self._norms[layer]
        return Selection(top_mask(mlp.neurons.abs() * norms, self.keep[layer]))

    def cost(self, layer: int, weight_bits: int = 16) -> Cost:
        share = 1 / self.weights(layer).matrices
        return Cost(1.0 - share, share)


def _glanced(model: SparseModel) -> Sequence[GlancedMlp] | None:
    """Returns the MLPs of all layers, or None where one has no codes."""
    if model.decoder.device.type != "cpu" or model.decoder.dtype != torch.float32:
        return None
    found = []
    for block in model.decoder.blocks:
        mlp = GlancedMlp.of(block.mlp_input, block.mlp_output)
        if mlp is None:
            return None
        found.append(mlp)
    return found

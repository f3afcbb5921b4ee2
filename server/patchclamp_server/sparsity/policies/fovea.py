"""Fovea sees every neuron blurred, through a low-bit copy of the weights, and then those that matter sharply.

    ĝ = x · gatê_j, û = x · up̂_j                                 hats: the sketch of the weights (sketch.py)
    s_j² = E[act(g)²] (û² + ε_j²) ‖down_j‖²,     E[act(g)²] ≈ (act(ĝ + δ_j)² + act(ĝ - δ_j)²) / 2
    A = the keep_l · d_ff neurons with the largest s_j
    y = Σ_{j ∈ A} act(g_j) u_j down_j + Σ_{j ∉ A} act(ĝ_j) û_j down̂_j

δ_j and ε_j are the root mean squares of ĝ - g and û - u on calibration text. Without them a neuron whose sketch happens
to be near zero is dropped with a certainty that the sketch does not give: with the gate exact and û of rank 32, that
alone takes the perplexity ratio at keep .5 from 1.60 to 1.17. The second sum (`compensate`) reuses the blurred values,
and reads the sketch of down. `gate="exact"` reads the gate densely.

A sketch of 3 bits is a quarter of weights of 16 bits, and two thirds of 4-bit codes with their scales: where a model is
served from those, fovea reads no fewer bytes than the dense product, and takes longer (benchmarks/sparse).

This is our own method: the norms are WINA's, a gate as predictor is CATS', and the sketch replaces trained predictors
(Deja Vu, Liu et al. 2023). `budget="measured"` spreads the neurons over the layers by the damage measured there
(budgets.py). In ungated MLPs s_j² = E[act(u)²] ‖down_j‖².
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from patchclamp_server.errors import FailedPrecondition
from patchclamp_server.sparsity.mlp import MlpInput, MlpWeights, SparseModel
from patchclamp_server.sparsity.policies.budgets import GRID, allocate
from patchclamp_server.sparsity.policies.shares import top_mask
from patchclamp_server.sparsity.policies.sketch import SketchedProduct, sketch_bits
from patchclamp_server.sparsity.policy import Cost, Policy, Selection, Selector, SequenceState, check_choice
from patchclamp_server.sparsity.profile import Profile, ProfileTensor

BITS = (2, 3, 4, 8)
GATES = ("sketch", "exact")
BUDGETS = ("measured", "uniform")


@dataclass(frozen=True, kw_only=True)
class Fovea(Policy):
    bits: int = 3
    gate: str = "sketch"
    compensate: bool = True
    budget: str = "measured"
    name: ClassVar[str] = "fovea"
    needs_profile: ClassVar[bool] = True
    # There are errors for the sketches that were calibrated, and up errors only where there is a gate.
    profile_tensors: ClassVar[Mapping[str, ProfileTensor]] = {
        **{f"gate_error.{bits}": ProfileTensor(("layers", "neurons"), required=False) for bits in BITS},
        **{f"up_error.{bits}": ProfileTensor(("layers", "neurons"), required=False) for bits in BITS},
        "damage": ProfileTensor(("layers", len(GRID)), required=False),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("bits", self.bits, BITS)
        check_choice("gate", self.gate, GATES)
        check_choice("budget", self.budget, BUDGETS)

    def bind(self, model: SparseModel, profile: Profile | None = None) -> "FoveaSelector":
        return FoveaSelector(self, model, profile)


class SketchedMlp:
    """The low-bit copy of one MLP."""

    def __init__(self, weights: MlpWeights, bits: int) -> None:
        self.weights = weights
        self._gate = None if weights.gate is None else SketchedProduct(weights.gate, bits)
        self._up = SketchedProduct(weights.up, bits)
        self._down = SketchedProduct(weights.down.t(), bits)

    def gate(self, x: Tensor) -> Tensor:
        """Returns ĝ [n, d_ff], or û where there is no gate."""
        return self.up(x) if self._gate is None else _biased(self._gate(x), self.weights.gate_bias)

    def up(self, x: Tensor) -> Tensor:
        """Returns û [n, d_ff]."""
        return _biased(self._up(x), self.weights.up_bias)

    def stand_in(self, neurons: Tensor) -> Tensor:
        """Returns Σ_j h_j down̂_j [n, d_model] of neurons h [n, d_ff]."""
        return self._down(neurons)


def _biased(z: Tensor, bias: Tensor | None) -> Tensor:
    return z if bias is None else z + bias


class FoveaSelector(Selector):
    def __init__(self, policy: Fovea, model: SparseModel, profile: Profile | None) -> None:
        super().__init__(policy, model, profile)
        assert profile is not None
        self._policy = policy
        needed = [f"gate_error.{policy.bits}"]
        if model.spec.family.gated:
            needed.append(f"up_error.{policy.bits}")
        if any(name not in profile.tensors for name in needed):
            raise FailedPrecondition("sparsity.profile", f"was not calibrated for sketches of {policy.bits} bits")
        self._gate_error = profile.tensors[f"gate_error.{policy.bits}"]  # δ [n_layers, d_ff]
        self._up_error = profile.tensors.get(f"up_error.{policy.bits}")  # ε
        if policy.budget == "measured" and not isinstance(policy.keep_ratio, tuple) and "damage" in profile.tensors:
            sparse = [layer for layer, keep in enumerate(self.keep) if keep < 1.0]
            shares = allocate(profile.tensors["damage"][sparse], policy.keep_ratio)
            keep = dict(zip(sparse, shares, strict=True))
            self.keep = tuple(keep.get(layer, 1.0) for layer in range(model.n_layers))

    def prepare(self) -> None:
        _ = self.sketches

    @property
    def sketches(self) -> list[SketchedMlp]:
        bits, derived = self._policy.bits, self.model.derived
        if f"sketches.{bits}" not in derived:
            derived[f"sketches.{bits}"] = [SketchedMlp(weights, bits) for weights in self.model.layers]
        made: list[SketchedMlp] = derived[f"sketches.{bits}"]
        return made

    def select(self, state: SequenceState, layer: int, mlp: MlpInput) -> Selection:
        weights, sketched = mlp.weights, self.sketches[layer]
        if self._policy.gate == "exact" and weights.gate is not None:
            gate, error = mlp.gate, torch.zeros_like(self._gate_error[layer])
        else:
            gate, error = sketched.gate(mlp.x), self._gate_error[layer]
        act = weights.activated
        # s² gives the same order as s.
        scores = (act(gate + error).square() + act(gate - error).square()) * weights.down_norm.square()
        blurred = act(gate)
        if weights.gate is not None:
            assert self._up_error is not None
            up = sketched.up(mlp.x)
            scores *= up.square() + self._up_error[layer].square()
            blurred = blurred * up
        active = top_mask(scores, self.keep[layer])
        if not self._policy.compensate:
            return Selection(active)
        return Selection(active, lambda final: sketched.stand_in(blurred.masked_fill(final, 0.0)))

    def cost(self, layer: int, weight_bits: int = 16) -> Cost:
        weights = self.weights(layer)
        share = 1 / weights.matrices
        bits = self._policy.bits
        # These are dense products: the stand-in too reads all of its sketch, which is faster than gathering half of it.
        inputs, output = (
            share * min(1.0, sketch_bits(bits, n) / weight_bits) for n in (weights.up.shape[1], weights.d_ff)
        )
        sketched = (weights.matrices - 1) * inputs + (output if self._policy.compensate else 0.0)
        if self._policy.gate == "exact" and weights.gate is not None:
            return Cost(sketched - inputs + share, 1.0 - share)
        return Cost(sketched, 1.0)

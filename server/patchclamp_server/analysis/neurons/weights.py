"""What a neuron's weights are in the residual stream: the direction that it reads, and the one that it writes.

    gate_j · norm(x) ∝ (g_in * gate_j) · x           what opens the neuron; g_in: scale of the norm before the MLP
    Δlogit_t ∝ a_j (g_out * down_j) · (g * u_t)      what its value a_j adds; g: scale of the final norm, g_out: that of
                                                     a norm between MLP and residual stream, where the family has one

The divisor of each norm depends on the token and is left out: it is the same for all tokens t of the vocabulary, and
positive. A layer norm subtracts the mean of its input, so a direction before it is taken without its own.

    p_t = w · (g * u_t)          for a direction w of the residual stream: what it adds to the logit of every token
    mean and variance of p over the vocabulary:  w · m,  wᵀ C w      m, C: mean and covariance of the rows g * u_t

Source: Davies 2025, Decoding specialised feature neurons in LLMs with the final projection layer; there raw rows are
multiplied by the unembedding, here the scales of the norms between are folded in.
"""

from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from patchclamp_server.model.decoder import Block, Decoder
from patchclamp_server.model.row_operators import Norm
from patchclamp_server.model.spec import DecoderSpec
from patchclamp_server.sparsity.mlp import matrix, mlp_weights


class NeuronWeights(Enum):
    """A matrix of an MLP, one row of it for each neuron."""

    GATE = "gate"
    UP = "up"
    DOWN = "down"


def weights_of(spec: DecoderSpec) -> tuple[NeuronWeights, ...]:
    """Returns the matrices that the MLPs of a family have."""
    return tuple(w for w in NeuronWeights if w is not NeuronWeights.GATE or spec.family.gated)


@torch.inference_mode()
def neuron_directions(block: Block, spec: DecoderSpec) -> dict[NeuronWeights, Tensor]:
    """Returns for each matrix float32 [d_ff, d_model]: directions of the residual stream, norms folded in."""
    mlp = mlp_weights(block, spec)
    found = {NeuronWeights.UP: _before(block.mlp_norm, mlp.up), NeuronWeights.DOWN: mlp.down.float()}
    if mlp.gate is not None:
        found[NeuronWeights.GATE] = _before(block.mlp_norm, mlp.gate)
    if block.post_mlp_norm is not None:
        found[NeuronWeights.DOWN] = found[NeuronWeights.DOWN] * block.post_mlp_norm.weight.float()
    return found


@dataclass(frozen=True, eq=False)
class Unembedding:
    """The rows u_t of the unembedding [vocab, d_model] in the model's own type, and the final norm."""

    rows: Tensor
    norm: Norm

    @classmethod
    def of(cls, decoder: Decoder) -> "Unembedding":
        return cls(matrix(decoder.unembedding), decoder.final_norm)

    def products(self, directions: Tensor, into: Tensor | None = None) -> Tensor:
        """Returns p [n, vocab] float32 of directions [n, d_model]; in the first rows of `into` [≥ n, vocab], of the
        type of `rows`, where that is given: new memory of this size costs a tenth of the product."""
        out = None if into is None else into[: len(directions)]
        return torch.mm(self._read(directions).to(self.rows.dtype), self.rows.T, out=out).float()

    def products_at(self, directions: Tensor, tokens: Tensor) -> Tensor:
        """Returns p [n, k] of the tokens [n, k] int64 of each direction [n, d_model]."""
        read = self._read(directions)
        return torch.einsum("nd,nkd->nk", read, self.rows[tokens].float())

    def products_of(self, directions: Tensor, tokens: Tensor) -> Tensor:
        """Returns p [n, k] of the same tokens [k] int64 for all directions [n, d_model]."""
        return self._read(directions) @ self.rows[tokens].float().T

    def _read(self, directions: Tensor) -> Tensor:
        return _centred(self.norm, directions) * self.norm.weight.float()


@dataclass(frozen=True, eq=False)
class Vocabulary(Unembedding):
    """The unembedding with the mean [d_model] and the covariance of g * u_t, in float32."""

    mean: Tensor
    covariance: Tensor

    @classmethod
    @torch.inference_mode()
    def of(cls, decoder: Decoder) -> "Vocabulary":
        rows = matrix(decoder.unembedding)
        scale = decoder.final_norm.weight.float()
        mean, covariance = torch.zeros_like(scale), torch.zeros(len(scale), len(scale), device=rows.device)
        parts = [rows[start : start + 8192] for start in range(0, len(rows), 8192)]
        for part in parts:
            mean += part.float().sum(0) / len(rows)
        for part in parts:
            centred = part.float() - mean
            covariance += centred.T @ centred / len(rows)
        return cls(rows, decoder.final_norm, mean * scale, covariance * scale.outer(scale))

    @torch.inference_mode()
    def read_rows(self, tokens: Tensor) -> Tensor:
        """Returns float32 [k, d_model] of tokens [k] int64: g * u_t as a direction of the residual stream reads it, so
        that p_t = w · row."""
        return _before(self.norm, self.rows[tokens])

    @torch.inference_mode()
    def read_covariance(self) -> Tensor:
        """Returns the covariance float64 [d_model, d_model] of these rows of all tokens. What a layer norm takes away
        has no variance, to the precision of float64: an inverse has to tell it from what has little."""
        return _centred(self.norm, _centred(self.norm, self.covariance.double()).T)

    def spread(self, directions: Tensor) -> tuple[Tensor, Tensor]:
        """Returns mean and standard deviation [n] of p over the vocabulary."""
        directions = _centred(self.norm, directions)
        variance = ((directions @ self.covariance) * directions).sum(1)
        return directions @ self.mean, variance.clamp(min=0).sqrt()


def _before(norm: Norm, rows: Tensor) -> Tensor:
    """Returns rows that multiply the output of a norm as directions of its input."""
    return _centred(norm, rows.float() * norm.weight.float())


def _centred(norm: Norm, directions: Tensor) -> Tensor:
    """Returns directions without what a layer norm takes away."""
    return directions if norm.bias is None else directions - directions.mean(-1, keepdim=True)

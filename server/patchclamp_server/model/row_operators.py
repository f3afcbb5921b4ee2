"""A decoder's operators on single rows, besides products and activations: norms, rotary embedding, soft caps.

Each has two backends behind one interface. Compiled loops (invariant/operators.py), in which the bits of a row depend
on no other row, run where they apply, and torch's operators elsewhere. On a GPU kernels fuse them with edits
(kernel_forward.py).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from patchclamp_server.cpu.invariant import operators


class Norm:
    """An RMS norm, or a layer norm where there is a bias, over the last dimension."""

    def __init__(self, weight: Tensor, bias: Tensor | None, eps: float) -> None:
        self.weight = weight
        self.bias = bias
        self.eps = eps

    def __call__(self, x: Tensor) -> Tensor:  # [T, width]
        if operators.holds_for(x):
            if self.bias is None:
                return operators.rms_norm(x, self.weight, self.eps)
            return operators.layer_norm(x, self.weight, self.bias, self.eps)
        if self.bias is None:
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)

    def divisor(self, x: Tensor) -> Tensor:
        """Returns what rows x [..., width] are divided by, [..., 1]."""
        spread = x.square().mean(-1, keepdim=True) if self.bias is None else x.var(-1, correction=0, keepdim=True)
        return (spread + self.eps).sqrt()

    def share(self, part: Tensor, divisor: Tensor) -> Tensor:
        """Returns what a part of x adds to norm(x), given the divisor of x: with that held fixed a norm is linear, and
        the shares of all parts sum to norm(x) without its bias."""
        centred = part if self.bias is None else part - part.mean(-1, keepdim=True)
        return centred / divisor * self.weight.to(part.dtype)


@dataclass(frozen=True, eq=False)
class HeadNorms:
    """The RMS norms of the queries and of the keys of every head, which have the same eps."""

    q: Norm
    k: Norm
    # These are the weights head by head [n_heads + n_kv_heads, head_dim].
    weights: Tensor

    @classmethod
    def of(cls, q: Norm, k: Norm, n_heads: int, n_kv_heads: int) -> "HeadNorms":
        return cls(q, k, torch.cat((q.weight.expand(n_heads, -1), k.weight.expand(n_kv_heads, -1))))

    @property
    def eps(self) -> float:
        return self.q.eps


def finish_heads(
    qkv: Tensor, n_heads: int, n_kv_heads: int, norms: HeadNorms | None, rotary: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns queries [T, n_heads, head_dim], keys and values [T, n_kv_heads, head_dim], as they are attended with.

    `qkv` [T, n_heads + 2 n_kv_heads, head_dim] is what the projection gives, and may be changed in place. `rotary` has
    cos and signed sin [T, rotary_dim] of the rows.
    """
    attended = n_heads + n_kv_heads
    if operators.holds_for(qkv):
        weights, eps = (None, 0.0) if norms is None else (norms.weights, norms.eps)
        operators.finish_heads(qkv, attended, weights, eps, rotary)
        return qkv[:, :n_heads], qkv[:, n_heads:attended], qkv[:, attended:]
    qk, v = qkv[:, :attended], qkv[:, attended:]
    if norms is not None:
        qk = torch.cat((norms.q(qk[:, :n_heads]), norms.k(qk[:, n_heads:])), dim=1)
    if rotary is not None:
        cos, signed_sin = rotary
        qk = _rotate(qk, cos[:, None], signed_sin[:, None])
    return qk[:, :n_heads], qk[:, n_heads:], v


def _rotate(qk: Tensor, cos: Tensor, signed_sin: Tensor) -> Tensor:
    """Returns x cos + rotate_half(x) sin, as a roll by half: `signed_sin` includes the sign of the first half."""
    dim = cos.shape[-1]
    if dim == qk.shape[-1]:
        return torch.addcmul(qk * cos, torch.roll(qk, dim // 2, -1), signed_sin)
    turned, rest = qk[..., :dim], qk[..., dim:]
    turned = torch.addcmul(turned * cos, torch.roll(turned, dim // 2, -1), signed_sin)
    return torch.cat((turned, rest), dim=-1)


def cap_softly(x: Tensor, cap: float) -> Tensor:
    """Returns cap tanh(x / cap), or x itself where the cap is 0. x [T, width] may be changed in place."""
    if not cap:
        return x
    return operators.cap_softly(x, cap) if operators.holds_for(x) else torch.tanh(x / cap) * cap

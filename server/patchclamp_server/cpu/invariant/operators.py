"""These operators run rows.py on torch tensors, without copies of their memory; threads share the rows."""

from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from patchclamp_server.cpu.invariant import edits, rows
from patchclamp_server.cpu.memory import in_parts

_NONE = np.empty((0, 0), dtype=np.float32)
# The cost of a byte of a row, relative to one that is only read: an activation takes some ten operations.
_WORK = 8


def holds_for(x: Tensor) -> bool:
    """Returns whether rows of x are computed here; elsewhere torch's operators compute them. Compiled loops have no
    derivatives: what is differentiated is torch's."""
    return x.device.type == "cpu" and x.dtype == torch.float32 and not x.requires_grad


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Returns x / sqrt(mean x² + eps) · weight, x [..., width]."""
    flat = _rows(x)
    out = torch.empty_like(flat)
    _each_row(partial(rows.rms_norms, flat.numpy(), weight.numpy(), np.float32(eps), out.numpy()), flat)
    return out.view(x.shape)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Returns (x - mean x) / sqrt(var x + eps) · weight + bias, x [..., width]."""
    flat = _rows(x)
    out = torch.empty_like(flat)
    work = partial(rows.layer_norms, flat.numpy(), weight.numpy(), bias.numpy(), np.float32(eps), out.numpy())
    _each_row(work, flat)
    return out.view(x.shape)


def finish_heads(
    qkv: Tensor, attended: int, norm: Tensor | None, eps: float, rotary: tuple[Tensor, Tensor] | None
) -> None:
    """Applies norms and rotary embedding to the first `attended` heads of qkv [n, heads, width], in place.

    `norm` is [attended, width]; `rotary` has cos and signed sin [n, rotary].
    """
    if norm is None and rotary is None:
        return
    weights = _NONE if norm is None else norm.numpy()
    cos, signed_sin = (_NONE, _NONE) if rotary is None else (table.numpy() for table in rotary)
    work = partial(rows.finish_heads, qkv.numpy(), attended, weights, np.float32(eps), cos, signed_sin)
    _each_row(work, qkv)


def activate(hidden: Tensor, activation: str, *, gated: bool) -> Tensor:
    """Returns act(z) for z [n, width], or act(gate) · up for [n, 2 width] with the gates first."""
    assert hidden.ndim == 2
    neurons = torch.empty(hidden.shape[0], hidden.shape[1] // 2 if gated else hidden.shape[1])
    _each_row(partial(rows.activations, hidden.numpy(), rows.CODES[activation], gated, neurons.numpy()), hidden)
    return neurons


def cap_softly(x: Tensor, cap: float) -> Tensor:
    """Sets x ← cap tanh(x / cap), x [n, width], in place."""
    assert x.ndim == 2
    _each_row(partial(rows.cap_softly, x.numpy(), np.float32(cap)), x)
    return x


def row_dots(x: Tensor, y: Tensor) -> Tensor:
    """Returns x_i · y_i, [n], of rows [n, width]."""
    assert x.shape == y.shape
    assert x.ndim == 2
    out = torch.empty(len(x))
    rows.row_dots(x.contiguous().numpy(), y.contiguous().numpy(), out.numpy())
    return out


def pair_dots(x: Tensor, rows_of: NDArray[np.int64], which: NDArray[np.int64], vectors: Tensor) -> Tensor:
    """Returns x_rows[e] · v_which[e], [E], of x [n, width] and vectors [k, width], without a copy of either."""
    assert x.shape[1] == vectors.shape[1]
    out = torch.empty(len(rows_of))
    rows.pair_dots(x.contiguous().numpy(), rows_of, which, vectors.contiguous().numpy(), out.numpy())
    return out


def row_norms(x: Tensor) -> Tensor:
    """Returns |x_i|, [n], of rows [n, width], each the float32 next to the root: torch's vectors are off by a bit."""
    squares = row_dots(x, x)
    np.sqrt(squares.numpy(), out=squares.numpy())
    return squares


def turns(sine: Tensor, cosine: Tensor, most: Tensor) -> tuple[Tensor, Tensor]:
    """Returns cos θ and sin θ, [n] each, of θ = min(most, atan2(sine, cosine))."""
    turned = torch.empty(2, len(sine))
    rows.turns(sine.numpy(), cosine.numpy(), most.numpy(), turned.numpy())
    return turned[0], turned[1]


def low_rank(start: Tensor, h: Tensor, owner: Tensor, difference: Tensor, bias: Tensor, rotation: Tensor) -> Tensor:
    """Returns start_i + Rᵀ (D h_i + b) of rows h [n, width], with D, R [k, rank, width] and b [k, rank] of owner[i]."""
    out = start.clone(memory_format=torch.contiguous_format)
    matrices = (difference.contiguous().numpy(), bias.contiguous().numpy(), rotation.contiguous().numpy())
    rows.low_rank(h.contiguous().numpy(), owner.numpy(), *matrices, out.numpy())
    return out


def affine(h: Tensor, owner: Tensor, matrix: Tensor, bias: Tensor) -> Tensor:
    """Returns A h_i + b [n, out] of rows h [n, width], with A [k, out, width] and b [k, out] of owner[i]."""
    out = torch.empty(len(h), matrix.shape[1])
    matrices = (matrix.contiguous().numpy(), bias.contiguous().numpy())
    rows.affine(h.contiguous().numpy(), owner.numpy(), *matrices, out.numpy())
    return out


def add_rows(start: Tensor, owner: Tensor, weights: Tensor, vectors: Tensor) -> Tensor:
    """Returns start_i + Σ_r w_ir V_r of rows `start` [n, width], with w [n, r], and V [k, r, width] of owner[i]."""
    out = start.clone(memory_format=torch.contiguous_format)
    rows.add_rows(owner.numpy(), weights.contiguous().numpy(), vectors.contiguous().numpy(), out.numpy())
    return out


def warm_up() -> None:
    """Compiles what edits need, so that no request waits for it."""
    row = torch.ones(1, 1)
    turns(row_dots(row, row), row[0], row[0])
    owner = torch.zeros(1, dtype=torch.int64)
    low_rank(row, row, owner, row[None], row, row[None])
    affine(row, owner, row[None], row)
    add_rows(row, owner, row, row[None])
    first = owner.numpy()
    pair_dots(row, first, first, row)
    one, x, bounds = row[0].numpy(), row.numpy(), (np.empty(0, dtype=np.float32),) * 2
    edits.edit_rows(edits.ADD, x, first, first, x, one, one, one, one, False, one.copy(), one.copy())
    edits.add_to_rows(x, first, first, x, one, one, one.copy())
    edits.edit_units(x, first, np.arange(2), first, 1, one, x, *bounds, one, one, one.copy(), one.copy())


def _rows(x: Tensor) -> Tensor:
    """Flattens [..., width] to a contiguous [n, width]: compiled code reads by these two numbers and checks nothing."""
    return x.reshape(-1, x.shape[-1]).contiguous()


def _each_row(work: "partial[None]", x: Tensor) -> None:
    in_parts(work, x.shape[0], 1, _WORK * x.numel() * x.itemsize)

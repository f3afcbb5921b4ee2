"""Weights have four bits in groups along a row: w[r, c] = scale[r, g] · (q[r, c] - zero[r, g]), g = c // group_size.

A group of G columns is G/8 little-endian words of 32 bits, and column c of it is nibble c // (G/8) of word c % (G/8).
So nibble n of all words of a group, in order, is a run of neighbouring columns, then comes nibble n + 1: a kernel that
unpacks words [R, groups, 1, G/8] into nibbles [R, groups, 8, G/8] has its columns in order and moves nothing between
registers. (In the usual order, nibble n of word m is column 8m + n, it would have to.)

A zero is a real number, kept in the dtype of the scales; none at all means 8 everywhere (symmetric). Rows are what the
sparse ops pick (a neuron, or an input channel), so whatever is picked brings its own scales, also contiguous.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from patchclamp_kernels.runtime import check, check_tensor

GROUP_SIZES = (32, 64, 128)
SYMMETRIC_ZERO = 8
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True, eq=False)
class Int4Weight:
    """A weight [rows, columns] in four bits. Raises ValueError where the parts do not fit each other."""

    packed: Tensor  # uint8 [rows, columns / 2]
    scales: Tensor  # float32, float16 or bfloat16 [rows, columns / group_size]
    zeros: Tensor | None  # like the scales, or None for 8
    group_size: int

    def __post_init__(self) -> None:
        check(self.group_size in GROUP_SIZES, f"group_size is {self.group_size}, not one of {GROUP_SIZES}")
        device = self.packed.device
        check_tensor("packed", self.packed, shape=(None, None), dtypes=(torch.uint8,), device=device)
        rows, columns = self.shape
        check(columns % self.group_size == 0, f"packed has {columns} columns, not groups of {self.group_size}")
        groups = (rows, columns // self.group_size)
        check_tensor("scales", self.scales, shape=groups, dtypes=_FLOATS, device=device)
        if self.zeros is not None:
            check_tensor("zeros", self.zeros, shape=groups, dtypes=(self.scales.dtype,), device=device)

    @property
    def shape(self) -> tuple[int, int]:
        return self.packed.shape[0], 2 * self.packed.shape[1]

    @property
    def device(self) -> torch.device:
        return self.packed.device

    def dequantise(self, dtype: torch.dtype) -> Tensor:
        rows, columns = self.shape
        q = unpack(self.packed, self.group_size).to(dtype).view(rows, -1, self.group_size)
        zeros = SYMMETRIC_ZERO if self.zeros is None else self.zeros.to(dtype)[..., None]
        return (self.scales.to(dtype)[..., None] * (q - zeros)).view(rows, columns)


def pack(q: Tensor, group_size: int) -> Tensor:
    """Packs uint8 [rows, columns] of 0 to 15 into uint8 [rows, columns / 2] in the order of the module."""
    check(q.ndim == 2 and q.dtype == torch.uint8, f"q is {q.dtype} {list(q.shape)}, not uint8 [rows, columns]")
    check(q.shape[1] % group_size == 0, f"q has {q.shape[1]} columns, not groups of {group_size}")
    low, high = q.view(q.shape[0], q.shape[1] // group_size, 4, 2, group_size // 8).unbind(3)
    return (low | high << 4).transpose(2, 3).reshape(q.shape[0], q.shape[1] // 2)


def unpack(packed: Tensor, group_size: int) -> Tensor:
    """Does the inverse of `pack`."""
    rows, half = packed.shape
    words = packed.view(rows, 2 * half // group_size, group_size // 8, 4).transpose(2, 3)
    return torch.stack((words & 15, words >> 4), dim=3).reshape(rows, 2 * half)


def quantise(weight: Tensor, group_size: int = 64, *, symmetric: bool = False) -> Int4Weight:
    """Rounds to nearest. Asymmetric, the 16 levels span [min(0, smallest), max(0, largest)] of the group and one of
    them is 0. Symmetric, level 8 is 0 and the value of the largest magnitude is level 0, whatever its sign."""
    check(weight.ndim == 2, f"weight has shape {list(weight.shape)}, not [rows, columns]")
    check(group_size in GROUP_SIZES, f"group_size is {group_size}, not one of {GROUP_SIZES}")
    check(weight.shape[1] % group_size == 0, f"weight has {weight.shape[1]} columns, not groups of {group_size}")
    groups = weight.float().view(weight.shape[0], -1, group_size)
    if symmetric:
        extreme = groups.gather(2, groups.abs().argmax(2, keepdim=True))
        scales = extreme / -SYMMETRIC_ZERO
    else:
        low, high = groups.amin(2, keepdim=True).clamp(max=0), groups.amax(2, keepdim=True).clamp(min=0)
        scales = (high - low) / 15
    # Rounded first, so that the levels are chosen for the scale that is kept.
    scales = torch.where(scales == 0, 1, scales).to(weight.dtype)
    zeros = torch.full_like(scales, SYMMETRIC_ZERO) if symmetric else (-low / scales.float()).round().clamp(0, 15)
    q = (groups / scales.float() + zeros).round().clamp(0, 15).to(torch.uint8)
    return Int4Weight(
        pack(q.view(weight.shape), group_size),
        scales.squeeze(2).contiguous(),
        None if symmetric else zeros.to(weight.dtype).squeeze(2).contiguous(),
        group_size,
    )


Weight = Tensor | Int4Weight


def check_weight(name: str, weight: Weight, *, shape: tuple[int | None, int | None], like: Tensor) -> None:
    """Checks a weight. `like` is its input: on the same device, and of the same dtype where the weight is dense."""
    if isinstance(weight, Int4Weight):
        fits = all(want is None or want == have for want, have in zip(shape, weight.shape, strict=True))
        check(fits, f"{name} has shape {list(weight.shape)}, not {list(shape)}")
        check(weight.device == like.device, f"{name} is on {weight.device}, not on {like.device}")
    else:
        check_tensor(name, weight, shape=shape, dtypes=(like.dtype,), device=like.device)


def dense(weight: Weight, dtype: torch.dtype) -> Tensor:
    return weight.dequantise(dtype) if isinstance(weight, Int4Weight) else weight.to(dtype)


def kernel_arguments(weight: Weight) -> dict[str, Tensor | int | None]:
    """Returns the kernels' arguments for a weight. `stride` is the length of a row in elements of `weight`."""
    if isinstance(weight, Int4Weight):
        return {
            "weight": weight.packed.view(torch.int32),
            "scales": weight.scales,
            "zeros": weight.zeros,
            "stride": weight.packed.shape[1] // 4,
            "groups": weight.scales.shape[1],
            "GROUP": weight.group_size,
        }
    return {"weight": weight, "scales": None, "zeros": None, "stride": weight.shape[1], "groups": 0, "GROUP": 0}


def check_block(name: str, size: int, weight: Weight) -> None:
    """Raises ValueError unless a tile of columns is whole groups."""
    group = weight.group_size if isinstance(weight, Int4Weight) else 1
    check(size % group == 0, f"config has {name} {size}, not a multiple of groups of {group}")


def kind(weight: Weight) -> str:
    """Returns the weight's part of a bucket of configurations."""
    return "int4" if isinstance(weight, Int4Weight) else f"{8 * weight.element_size()}bit"


@triton.jit
def load_words(weight, row, active, first, stride, GROUP: tl.constexpr, BLOCK: tl.constexpr):
    """Loads columns first to first + BLOCK of the active ones of rows [R], in float32 [R, BLOCK / GROUP, 8, GROUP / 8]:
    each level times 16 ** n for nibble n, as masking leaves it. `nibble_units` takes that back, for fewer numbers."""
    word = first // 8 + tl.arange(0, BLOCK // 8)
    words = tl.load(
        weight + row[:, None] * stride + word[None, :], mask=active[:, None] & (word < stride)[None, :], other=0
    )
    words = tl.reshape(words.to(tl.uint32, bitcast=True), [row.shape[0], BLOCK // GROUP, 1, GROUP // 8])
    words = tl.broadcast_to(words, [row.shape[0], BLOCK // GROUP, 8, GROUP // 8])
    nibble = tl.full([8], 15, tl.uint32) << (4 * tl.arange(0, 8)).to(tl.uint32)
    return (words & nibble[None, None, :, None]).to(tl.float32)


@triton.jit
def nibble_units():
    """Returns 16 ** -n for n = 0 to 7, exactly: a power of two is its exponent."""
    return ((127 - 4 * tl.arange(0, 8)) << 23).to(tl.float32, bitcast=True)


@triton.jit
def load_scales(scales, zeros, row, active, first, groups, GROUP: tl.constexpr, BLOCK: tl.constexpr):
    """Loads scale and zero in float32 [R, BLOCK / GROUP] of those columns; the scale is 0 wherever nothing is read."""
    group = first // GROUP + tl.arange(0, BLOCK // GROUP)
    inside = active[:, None] & (group < groups)[None, :]
    at = row[:, None] * groups + group[None, :]
    scale = tl.load(scales + at, mask=inside, other=0.0).to(tl.float32)
    if zeros is None:
        zero = tl.full([row.shape[0], BLOCK // GROUP], 8.0, tl.float32)
    else:
        zero = tl.load(zeros + at, mask=inside, other=0.0).to(tl.float32)
    return scale, zero


@triton.jit
def load_dense(
    weight,
    scales,
    zeros,
    row,
    active,
    first,
    columns,
    stride,
    groups,
    dtype: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Loads columns first to first + BLOCK of the active ones of rows [R], dense [R, BLOCK] in `dtype`; 0 elsewhere."""
    if GROUP == 0:
        column = first + tl.arange(0, BLOCK)
        inside = active[:, None] & (column < columns)[None, :]
        w = tl.load(weight + row[:, None] * stride + column[None, :], mask=inside, other=0.0)
    else:
        words = load_words(weight, row, active, first, stride, GROUP, BLOCK)
        scale, zero = load_scales(scales, zeros, row, active, first, groups, GROUP, BLOCK)
        units = scale[:, :, None, None] * nibble_units()[None, None, :, None]
        w = words * units - (scale * zero)[:, :, None, None]
        w = tl.reshape(w.to(dtype), [row.shape[0], BLOCK])
    return w

"""Kernels that the ahead-of-time checker must find fault with, and one that it must not.

As a program (without TRITON_INTERPRET) it compiles them for a capability and prints the reports as JSON.
"""

import sys

import triton
import triton.language as tl

from patchclamp_kernels.cases import CompileCase
from patchclamp_kernels.compiled import compile_case, to_json
from patchclamp_kernels.configs import Config


@triton.jit
def copy(x, out, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, tl.load(x + at, mask=at < n), mask=at < n)


@triton.jit
def strided_copy(x, out, n, stride, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, tl.load(x + at * stride, mask=at < n), mask=at < n)


@triton.jit
def sum_of_blocks(x, out, blocks, BLOCK: tl.constexpr):
    """Holds all of a block in the registers of one warp through the loop."""
    at = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for i in range(blocks):
        total += tl.load(x + i * BLOCK + at)
    tl.store(out + at, total)


@triton.jit
def one_block_copy(x, out, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    total = tl.sum(tl.load(x + at[:, None] * BLOCK + at[None, :]), axis=1)
    tl.store(out + at, total)


@triton.jit
def product(x, y, out, depth, BLOCK: tl.constexpr):
    """Stages many blocks of both factors in shared memory."""
    at = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK, BLOCK], dtype=tl.float32)
    for start in range(0, depth, BLOCK):
        left = tl.load(x + at[:, None] * depth + start + at[None, :])
        right = tl.load(y + (start + at[:, None]) * BLOCK + at[None, :])
        total = tl.dot(left, right, total)
    tl.store(out + at[:, None] * BLOCK + at[None, :], total)


_VECTOR = {"x": "*bf16", "out": "*bf16", "n": "i32"}
_BLOCK = Config({"BLOCK": 1024})
CASES = [
    CompileCase("fits", copy, _VECTOR, {}, _BLOCK, divisible=("n",)),
    CompileCase("unaligned mask", copy, _VECTOR, {}, _BLOCK),
    CompileCase("strided", strided_copy, {**_VECTOR, "stride": "i32"}, {}, _BLOCK, divisible=("n",)),
    CompileCase(
        "too many registers",
        sum_of_blocks,
        {"x": "*fp32", "out": "*fp32", "blocks": "i32"},
        {},
        Config({"BLOCK": 8192}, num_warps=1),
    ),
    CompileCase(
        "too much shared memory",
        product,
        {"x": "*bf16", "y": "*bf16", "out": "*fp32", "depth": "i32"},
        {},
        Config({"BLOCK": 128}, num_warps=8, num_stages=8),
        divisible=("depth",),
    ),
    CompileCase("not a power of two", one_block_copy, {"x": "*fp32", "out": "*fp32"}, {}, Config({"BLOCK": 96})),
]


if __name__ == "__main__":
    print(to_json([compile_case("toy", case, int(sys.argv[1])) for case in CASES]))

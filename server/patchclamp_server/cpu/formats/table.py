"""The generator of each format, and how many bytes and weights one step of it reads."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from patchclamp_server.cpu.formats import blocks, k_blocks
from patchclamp_server.cpu.stored import Format
from patchclamp_server.cpu.vector import UNIT


@dataclass(frozen=True)
class Step:
    """`decode(builder, pointer)` yields a pair of vectors for each 32 of `weights`, which take `size` bytes."""

    decode: Callable[[Any, Any], Iterator[blocks.Pair]]
    weights: int
    size: int


_DECODERS = {
    Format.F32: blocks.f32,
    Format.F16: blocks.f16,
    Format.BF16: blocks.bf16,
    Format.Q4_0: blocks.q4_0,
    Format.Q4_1: blocks.q4_1,
    Format.Q5_0: blocks.q5_0,
    Format.Q5_1: blocks.q5_1,
    Format.Q8_0: blocks.q8_0,
    Format.Q2_K: k_blocks.q2_k,
    Format.Q3_K: k_blocks.q3_k,
    Format.Q4_K: k_blocks.q4_k,
    Format.Q5_K: k_blocks.q5_k,
    Format.Q6_K: k_blocks.q6_k,
}


def step_of(format: Format) -> Step:
    weights = max(UNIT, format.weights)
    return Step(_DECODERS[format], weights, format.row_bytes(weights))

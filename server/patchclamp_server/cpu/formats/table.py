"""The generator of each format, and how many bytes and weights one step of it reads."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from patchclamp_server.cpu.formats import blocks, k_blocks
from patchclamp_server.cpu.formats.blocks import Block
from patchclamp_server.cpu.stored import Format
from patchclamp_server.cpu.vector import UNIT

_Keep = Callable[[Any, Any, Any, Any], None]


@dataclass(frozen=True)
class Step:
    """`keep(builder, block, kept, halves)` stores `scales` numbers of a block as float32, and `decode(builder, block)`
    yields a vector for each 16 of its `weights`, which take `size` bytes."""

    keep: _Keep | None
    scales: int
    decode: Callable[[Any, Block], Iterator[Any]]
    weights: int
    size: int


_CODE: dict[Format, tuple[_Keep | None, int, Callable[[Any, Block], Iterator[Any]]]] = {
    Format.F32: (None, 0, blocks.f32),
    Format.F16: (None, 0, blocks.f16),
    Format.BF16: (None, 0, blocks.bf16),
    Format.Q4_0: (None, 0, blocks.q4_0),
    Format.Q4_1: (None, 0, blocks.q4_1),
    Format.Q5_0: (None, 0, blocks.q5_0),
    Format.Q5_1: (None, 0, blocks.q5_1),
    Format.Q8_0: (None, 0, blocks.q8_0),
    Format.Q2_K: (k_blocks.keep_of_q2_k, 32, k_blocks.q2_k),
    Format.Q3_K: (k_blocks.keep_of_q3_k, 16, k_blocks.q3_k),
    Format.Q4_K: (k_blocks.keep_of_q4_k, 16, k_blocks.q4_k),
    Format.Q5_K: (k_blocks.keep_of_q4_k, 16, k_blocks.q5_k),
    Format.Q6_K: (k_blocks.keep_of_q6_k, 16, k_blocks.q6_k),
}


def step_of(format: Format) -> Step:
    weights = max(UNIT, format.weights)
    return Step(*_CODE[format], weights, format.row_bytes(weights))

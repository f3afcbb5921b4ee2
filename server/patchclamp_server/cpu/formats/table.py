"""The generator of each format, and how many bytes and weights one step of it reads."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from patchclamp_server.cpu.formats import blocks, k_blocks
from patchclamp_server.cpu.formats.lanes import at
from patchclamp_server.cpu.stored import Format
from patchclamp_server.cpu.vector import UNIT

_Keep = Callable[[Any, list[Any], Any], None]


@dataclass(frozen=True)
class Step:
    """`keep(builder, blocks, kept)` stores `scales` numbers of each of some blocks as float32, one block after another,
    and `decode(builder, block, kept)` yields a vector for each 16 of its `weights`, which take `size` bytes."""

    keep: _Keep | None
    scales: int
    decode: Callable[[Any, Any, Any], Iterator[Any]]
    weights: int
    size: int


def _one_by_one(scales: int, keep: Callable[[Any, Any, Any], None]) -> tuple[_Keep, int]:
    def keep_each(b: Any, of_rows: list[Any], kept: Any) -> None:
        for r, block in enumerate(of_rows):
            keep(b, block, at(b, kept, r * scales))

    return keep_each, scales


_CODE: dict[Format, tuple[_Keep | None, int, Callable[[Any, Any, Any], Iterator[Any]]]] = {
    Format.F32: (None, 0, blocks.f32),
    Format.F16: (None, 0, blocks.f16),
    Format.BF16: (None, 0, blocks.bf16),
    Format.Q4_0: (blocks.keep_scale, 1, blocks.q4_0),
    Format.Q4_1: (blocks.keep_scale_and_low, 2, blocks.q4_1),
    Format.Q5_0: (blocks.keep_scale, 1, blocks.q5_0),
    Format.Q5_1: (blocks.keep_scale_and_low, 2, blocks.q5_1),
    Format.Q8_0: (blocks.keep_scale, 1, blocks.q8_0),
    Format.Q2_K: (*_one_by_one(32, k_blocks.keep_of_q2_k), k_blocks.q2_k),
    Format.Q3_K: (*_one_by_one(16, k_blocks.keep_of_q3_k), k_blocks.q3_k),
    Format.Q4_K: (*_one_by_one(16, k_blocks.keep_of_q4_k), k_blocks.q4_k),
    Format.Q5_K: (*_one_by_one(16, k_blocks.keep_of_q4_k), k_blocks.q5_k),
    Format.Q6_K: (*_one_by_one(16, k_blocks.keep_of_q6_k), k_blocks.q6_k),
}


def step_of(format: Format) -> Step:
    weights = max(UNIT, format.weights)
    return Step(*_CODE[format], weights, format.row_bytes(weights))

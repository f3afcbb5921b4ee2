"""How the codes of each format are read."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from patchclamp_server.cpu.integers import blocks, k_blocks
from patchclamp_server.cpu.integers.columns import Run
from patchclamp_server.cpu.stored import Format

_LINE = 64


@dataclass(frozen=True)
class Codes:
    """`read(builder, rows)` yields runs of a block of 16 rows, at `places`. Codes stand for c - 2^shift, or for c where
    it is 0; `small` ones have at most 6 bits."""

    read: Callable[[Any, list[Any]], Iterator[Run]]
    shift: int = 0
    has_lows: bool = False
    places: tuple[int, ...] = (0,)
    small: bool = True

    @property
    def weights(self) -> int:
        """The weights of a run."""
        return 16 if self.places is k_blocks.PLACES_OF_16 else 32

    @property
    def run_bytes(self) -> int:
        """The bytes of a run in memory: its codes, scales and lows."""
        return _LINE * (self.weights // 4 + 1 + self.has_lows)

    @property
    def block_bytes(self) -> int:
        return self.run_bytes * len(self.places)


_PLACES_OF_32 = tuple(range(0, 256, 32))
CODES = {
    Format.Q4_0: Codes(blocks.q4_0, 3),
    Format.Q4_1: Codes(blocks.q4_1, has_lows=True),
    Format.Q5_0: Codes(blocks.q5_0, 4),
    Format.Q5_1: Codes(blocks.q5_1, has_lows=True),
    Format.Q8_0: Codes(blocks.q8_0, 7, small=False),
    Format.Q2_K: Codes(k_blocks.q2_k, 0, True, k_blocks.PLACES_OF_16),
    Format.Q3_K: Codes(k_blocks.q3_k, 2, False, k_blocks.PLACES_OF_16),
    Format.Q4_K: Codes(k_blocks.q4_k, 0, True, _PLACES_OF_32),
    Format.Q5_K: Codes(k_blocks.q5_k, 0, True, _PLACES_OF_32),
    Format.Q6_K: Codes(k_blocks.q6_k, 5, False, k_blocks.PLACES_OF_16),
}

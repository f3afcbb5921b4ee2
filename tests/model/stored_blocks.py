"""Matrices in every format that is served where it lies: quantised by the package `gguf`, or, where that has no
quantiser, random blocks, whose weights are then what `gguf.dequantize` says."""

import gguf
import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from numpy.typing import NDArray

Kind = GGMLQuantizationType
# Where the float16 scales of a block lie; all else are codes and the scales of its parts, which may be any bytes.
SCALES = {Kind.Q2_K: (80, 82), Kind.Q3_K: (108,), Kind.Q4_K: (0, 2), Kind.Q5_K: (0, 2), Kind.Q6_K: (208,)}
STORED = (Kind.F32, Kind.F16, Kind.BF16, Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1, Kind.Q8_0, *SCALES)


def blocks_like(values: NDArray[np.float32], kind: Kind) -> NDArray[np.generic]:
    """Returns what a file holds for `values` [rows, width], or for random ones of their size."""
    if kind not in SCALES:
        return np.asarray(gguf.quantize(values, kind))
    per_block, size = GGML_QUANT_SIZES[kind]
    random = np.random.default_rng(values.shape[0] + int(kind))
    blocks = random.integers(0, 256, (values.size // per_block, size), dtype=np.uint8)
    weights = _scaled(blocks, kind, np.full(len(blocks), 1e-3), random)
    factor = 1e-3 * float(values.std() / gguf.dequantize(weights, kind).std())
    _scaled(blocks, kind, factor * random.uniform(0.5, 1.5, len(blocks)), random)
    return blocks.reshape(values.shape[0], -1)


def _scaled(
    blocks: NDArray[np.uint8], kind: Kind, scales: NDArray[np.float64], random: np.random.Generator
) -> NDArray[np.uint8]:
    for i, place in enumerate(SCALES[kind]):
        # The second is taken off, times other small numbers: seven of the first are as much.
        numbers = scales * (1.0 if i == 0 else 7.0)
        blocks[:, place : place + 2] = numbers.astype("<f2").view(np.uint8).reshape(-1, 2)
    return blocks

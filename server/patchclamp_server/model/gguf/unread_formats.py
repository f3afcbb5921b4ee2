"""Formats that no product reads where they lie (IQ4_XS, TQ1_0, ...) become float32 in memory when a model is loaded."""

import logging
from math import prod

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from numpy.typing import NDArray

from patchclamp_server.model.errors import ModelSourceError

logger = logging.getLogger(__name__)
# Rows that are dequantised at a time: it takes many times the bytes of their codes.
_WEIGHTS_AT_ONCE = 1 << 22
_FLOATS = {GGMLQuantizationType.F64: np.float64}


def dequantised(
    path: str, name: str, kind: GGMLQuantizationType, shape: tuple[int, ...], memory: NDArray[np.uint8]
) -> NDArray[np.uint8]:
    """Returns the bytes of a tensor in float32. Raises ModelSourceError for a format of integers, or one unknown."""
    block, size = GGML_QUANT_SIZES[kind]
    row, left = divmod(shape[-1], block)
    rows, row_bytes = prod(shape[:-1]), row * size
    if left or rows * row_bytes > len(memory):
        raise ModelSourceError(f"{path} is not a whole GGUF file: tensor {name} of {kind.name} has {len(memory)} bytes")
    stored = memory[: rows * row_bytes].reshape(rows, row_bytes)
    dense = np.empty((rows, shape[-1]), dtype=np.float32)
    step = max(1, _WEIGHTS_AT_ONCE // shape[-1])
    try:
        for start in range(0, rows, step):
            some = stored[start : start + step]
            if kind in _FLOATS:
                dense[start : start + step] = some.copy().view(_FLOATS[kind])
            else:
                dense[start : start + step] = dequantize(some, kind)
    except NotImplementedError as error:
        raise ModelSourceError(f"{path}: tensor {name} is of format {kind.name}, which is not supported") from error
    logger.warning("%s: tensor %s of %s takes %d bytes as float32", path, name, kind.name, dense.nbytes)
    return dense.view(np.uint8).reshape(-1)

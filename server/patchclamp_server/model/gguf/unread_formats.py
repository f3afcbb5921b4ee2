"""Formats that no product reads where they lie (IQ4_XS, TQ1_0, ...) become float32 in memory when a model is loaded."""

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from math import prod
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from numpy.typing import NDArray

from patchclamp_server.model.errors import ModelSourceError
from patchclamp_server.sizes import shown_size

logger = logging.getLogger(__name__)
# Rows that are dequantised at a time: it takes many times the bytes of their codes.
_WEIGHTS_AT_ONCE = 1 << 22
_FLOATS = {GGMLQuantizationType.F64: np.float64}


def dequantised(
    path: str, name: str, kind: GGMLQuantizationType, shape: tuple[int, ...], memory: NDArray[np.uint8]
) -> Callable[[], NDArray[np.uint8]]:
    """Returns what makes the bytes of a tensor in float32: their memory is planned before. Raises ModelSourceError for
    a format of integers, or one unknown."""
    block, size = GGML_QUANT_SIZES[kind]
    row, left = divmod(shape[-1], block)
    rows, row_bytes = prod(shape[:-1]), row * size
    if left or rows * row_bytes > len(memory):
        raise ModelSourceError(f"{path} is not a whole GGUF file: tensor {name} of {kind.name} has {len(memory)} bytes")
    stored = memory[: rows * row_bytes].reshape(rows, row_bytes)
    try:
        _floats(stored[:1], kind)
    except NotImplementedError as error:
        raise ModelSourceError(f"{path}: tensor {name} is of format {kind.name}, which is not supported") from error
    return partial(_all_rows, stored, kind, shape[-1])


def say_dequantised(path: str, weights: Mapping[str, Sequence[int]]) -> None:
    """Logs what tensors of such formats take; `weights` has how many each has, by the name of its format."""
    for format, counts in weights.items():
        logger.warning(
            "%s: no product reads %s where it lies: as float32 %d tensors take %s",
            *(path, format, len(counts), shown_size(4 * sum(counts))),
        )


def _all_rows(stored: NDArray[np.uint8], kind: GGMLQuantizationType, width: int) -> NDArray[np.uint8]:
    dense = np.empty((len(stored), width), dtype=np.float32)
    step = max(1, _WEIGHTS_AT_ONCE // width)
    for start in range(0, len(stored), step):
        dense[start : start + step] = _floats(stored[start : start + step], kind)
    return dense.view(np.uint8).reshape(-1)


def _floats(rows: NDArray[np.uint8], kind: GGMLQuantizationType) -> NDArray[Any]:
    return rows.copy().view(_FLOATS[kind]) if kind in _FLOATS else dequantize(rows, kind)

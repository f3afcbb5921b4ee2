"""Formats that no product reads where they lie (IQ4_XS, TQ1_0, ...) become float32 in memory when a model is loaded."""

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial

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
Decode = Callable[[NDArray[np.uint8]], NDArray[np.uint8]]


def decoder(path: str, name: str, kind: GGMLQuantizationType, shape: tuple[int, ...]) -> Decode:
    """Returns what makes float32 of the bytes of a tensor. Raises ModelSourceError for a format of integers, or one
    unknown."""
    if kind not in _FLOATS:
        try:
            dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), dtype=np.uint8), kind)
        except NotImplementedError as error:
            raise ModelSourceError(f"{path}: tensor {name} is of format {kind.name}, which is not supported") from error
    return partial(_decoded, kind, shape)


def say_dequantised(path: str, sizes: Mapping[str, Sequence[int]]) -> None:
    """Logs what tensors of such formats will take; `sizes` are their bytes in float32, by the name of the format."""
    for format, own in sizes.items():
        logger.warning(
            "%s: no product reads %s where it lies: as float32 %d tensors take %s",
            *(path, format, len(own), shown_size(sum(own))),
        )


def _decoded(kind: GGMLQuantizationType, shape: tuple[int, ...], memory: NDArray[np.uint8]) -> NDArray[np.uint8]:
    block, size = GGML_QUANT_SIZES[kind]
    stored = memory.reshape(-1, shape[-1] // block * size)
    dense = np.empty((len(stored), shape[-1]), dtype=np.float32)
    step = max(1, _WEIGHTS_AT_ONCE // shape[-1])
    for start in range(0, len(stored), step):
        some = stored[start : start + step]
        if kind in _FLOATS:
            dense[start : start + step] = some.copy().view(_FLOATS[kind])
        else:
            dense[start : start + step] = dequantize(some, kind)
    return dense.view(np.uint8).reshape(-1)

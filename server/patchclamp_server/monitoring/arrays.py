"""Array types of the statistics, and float64 limits for float32 values."""

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Float32s = NDArray[np.float32]
Ints = NDArray[np.int64]


def floor32(numbers: Floats) -> Float32s:
    """Returns the largest float32 that is not above each: a float32 v is above the one if it is above the other."""
    with np.errstate(over="ignore"):  # beyond float32 is infinity, and the largest float32 below it
        rounded = numbers.astype(np.float32)
    down = np.where(rounded > numbers, np.nextafter(rounded, np.float32(-np.inf)), rounded)
    # The compiled loops know one memory layout.
    return np.ascontiguousarray(down)

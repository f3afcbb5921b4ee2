"""Array types of the statistics, and float64 limits for float32 values."""

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Float32s = NDArray[np.float32]
Ints = NDArray[np.int64]


def floor32(numbers: Floats) -> Float32s:
    """Returns the largest float32 not above each number: a float32 v is above the one if it is above the other."""
    with np.errstate(over="ignore"):  # a number beyond float32 becomes infinity, and then the largest float32 below it
        rounded = numbers.astype(np.float32)
    down = np.where(rounded > numbers, np.nextafter(rounded, np.float32(-np.inf)), rounded)
    # The compiled loops know only one memory layout.
    return np.ascontiguousarray(down)

"""Model files are mapped into memory: the system reads a page when it is touched, and may drop it again.

A file that is deleted, or replaced by renaming another over it, stays what it was for a model that is served. One that
is written to in place is not: its weights change with it, and reading what was cut off ends the process (SIGBUS).
"""

import mmap
from pathlib import Path

import numpy as np
from numpy.typing import NDArray


def mapped(path: Path) -> NDArray[np.uint8]:
    """Returns the bytes of a file, which cannot be written. The mapping lives as long as the array and its slices."""
    with path.open("rb") as file:
        if not path.stat().st_size:
            return np.zeros(0, dtype=np.uint8)
        return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), dtype=np.uint8)

"""What the headers of files say of their tensors: names, formats and shapes. No weight is read."""

import math
from dataclasses import dataclass

from patchclamp_server.cpu.stored import Format


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a file; the last number of its shape is that of the weights in a row."""

    name: str
    format: Format
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the weights. Raises ValueError unless its rows are whole blocks."""
        if not self.shape:
            return self.format.size
        return math.prod(self.shape[:-1]) * self.format.row_bytes(self.shape[-1])

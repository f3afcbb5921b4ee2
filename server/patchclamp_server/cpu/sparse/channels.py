"""This projection reads only the input channels that matter: y = Σ_{j kept} x_j W[:, j] + b.

Channel j is kept unless |x_j| · scale_j < threshold. TEAL (arXiv 2408.14690) has no scale; in WINA it is ‖W[:, j]‖.
A NaN is kept, so that it shows. Rows select for themselves. A row that keeps all channels takes the dense path.
"""

import numpy as np
import torch
from torch import Tensor

from patchclamp_server.cpu.linear import Linear
from patchclamp_server.cpu.sparse.input_rows import input_rows
from patchclamp_server.cpu.sparse.kernels import select_channels
from patchclamp_server.cpu.sparse.output_rows import Floats, as_floats

_NO_SCALE: Floats = np.empty(0, dtype=np.float32)


class SparseLinear:
    """Keeps an input-major copy beside the projection, unless the projection is `input_major` itself."""

    def __init__(self, linear: Linear) -> None:
        self.linear = linear
        self._rows = input_rows(linear)
        self.width = linear.shape[1]
        self._bias = None if linear.bias is None else as_floats(linear.bias)

    def __call__(self, x: Tensor, threshold: float, scale: Tensor | None = None) -> Tensor:
        """Returns y [T, out] of x [T, in] and scale [in] float32."""
        scales = _NO_SCALE if scale is None else as_floats(scale)
        return torch.cat([self._row(x[i : i + 1], threshold, scales) for i in range(x.shape[0])])

    def warm_up(self) -> None:
        """Compiles what is compiled at run time."""
        x = torch.zeros(1, self.width)
        x[0, 0] = 1.0
        self(x, 0.5)

    def _row(self, x: Tensor, threshold: float, scale: Floats) -> Tensor:
        row = as_floats(x)[0]
        kept = np.empty(len(row), dtype=np.int64)
        n = select_channels(row, scale, np.float32(threshold), kept)
        if n == len(row):
            return self.linear(x)
        y = self._rows.sum(row[None, kept[:n]], kept[:n])
        return torch.from_numpy(y if self._bias is None else y + self._bias).to(x.dtype)

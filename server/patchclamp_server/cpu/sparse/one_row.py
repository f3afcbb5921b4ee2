"""The dense product of one row uses the vectors of the sparse products, with all rows of weights chosen."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from patchclamp_server.cpu.sparse.input_rows import FloatInputRows
from patchclamp_server.cpu.sparse.output_rows import FloatOutputRows, as_array, as_floats


def one_row_product(weight: Tensor, *, input_major: bool) -> Callable[[Tensor], Tensor]:
    """Returns the product x [1, in] -> x Wᵀ [1, out] float32, for `weight` [out, in] in float32 or bfloat16."""
    if input_major:
        product = FloatInputRows(as_array(weight.t())).take(np.arange(weight.shape[1]))
    else:
        product = FloatOutputRows(as_array(weight)).leading(weight.shape[0])
    return lambda x: torch.from_numpy(product(as_floats(x)))

"""This linear layer skips input channels of small score (in TEAL |x_j|, in WINA |x_j|·‖W_:,j‖).

    y[b] = Σ_{j kept} x[b, j] · W[j] + bias        j is kept unless |x[b, j]| · channel_scale[j] < threshold[b]

x is [B, in], W [in, out] in-major (the weights of a channel are one contiguous row) and y [B, out]. Scores are float32
whatever the dtype of x, so that a selection is the same everywhere; a NaN is kept, so that it shows. Weights are
float32, float16 or bfloat16 like x, or Int4Weight. The kernel of TEAL (arXiv 2408.14690) adds in the order of atomics
and takes batch 1, fp16.

The weights of a channel that is not kept are not read: see `rows.py` for how, and for what bounds it. In a batch a
channel is read if any row of a tile of 32 keeps it, and is multiplied by 0 in the others, so weights must be finite.
"""

import torch
from torch import Tensor

from patchclamp_kernels.configs import Config
from patchclamp_kernels.runtime import accumulation_dtype, check_tensor, uses_kernel
from patchclamp_kernels.sparse_mlp.int4 import Weight, check_weight, dense
from patchclamp_kernels.sparse_mlp.rows import weighted_rows

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def sparse_linear_reference(
    x: Tensor,
    weight_in_major: Weight,
    *,
    threshold: float | Tensor,
    channel_scale: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    acc = accumulation_dtype(x.dtype)
    score = x.float().abs()
    if channel_scale is not None:
        score = score * channel_scale.float()
    limit = torch.as_tensor(threshold, dtype=torch.float32, device=x.device).view(-1, 1)
    y = torch.where(score < limit, 0, x.to(acc)) @ dense(weight_in_major, acc)
    return (y if bias is None else y + bias.to(acc)).to(x.dtype)


def sparse_linear(
    x: Tensor,
    weight_in_major: Weight,
    *,
    threshold: float | Tensor,
    channel_scale: Tensor | None = None,
    bias: Tensor | None = None,
    out: Tensor | None = None,
    config: Config | None = None,
) -> Tensor:
    """Returns y [B, out]. `threshold` is one number, or float32 [B]; `channel_scale` is float32 [in]; `bias` is [out]
    like x.

    Raises ValueError naming the argument.
    """
    check_tensor("x", x, shape=(None, None), dtypes=_DTYPES, device=x.device)
    check_weight("weight_in_major", weight_in_major, shape=(x.shape[1], None), like=x)
    shape = (x.shape[0], weight_in_major.shape[1])
    if isinstance(threshold, Tensor):
        check_tensor("threshold", threshold, shape=(x.shape[0],), dtypes=(torch.float32,), device=x.device)
    if channel_scale is not None:
        check_tensor("channel_scale", channel_scale, shape=(x.shape[1],), dtypes=(torch.float32,), device=x.device)
    if bias is not None:
        check_tensor("bias", bias, shape=(shape[1],), dtypes=(x.dtype,), device=x.device)
    if out is None:
        out = torch.empty(shape, dtype=x.dtype, device=x.device)
    check_tensor("out", out, shape=shape, dtypes=(x.dtype,), device=x.device)
    if not uses_kernel(x):
        value = sparse_linear_reference(x, weight_in_major, threshold=threshold, channel_scale=channel_scale, bias=bias)
        return out.copy_(value)
    weighted_rows(
        "sparse_linear",
        x,
        weight_in_major,
        out,
        threshold=threshold,
        channel_scale=channel_scale,
        bias=bias,
        config=config,
    )
    return out

"""The lens in torch over all logits is the definition of the op."""

from dataclasses import dataclass

import torch
from torch import Tensor

from patchclamp_kernels.runtime import accumulation_dtype

# The id in a row without a distribution.
NOT_FINITE = -1


@dataclass(frozen=True, eq=False)
class LensTopK:
    values: Tensor  # float32 [T, k], log-probabilities, most likely first
    ids: Tensor  # int64 [T, k]
    log_total: Tensor  # float32 [T]


def logit_lens_topk_reference(
    x: Tensor,
    unembedding: Tensor,
    *,
    k: int,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-6,
    soft_cap: float = 0.0,
) -> LensTopK:
    acc = accumulation_dtype(x.dtype)
    h = normalised_reference(x, norm_weight, norm_bias, eps)
    logits = h.to(acc) @ unembedding.to(acc).T
    if soft_cap:
        logits = torch.tanh(logits / soft_cap) * soft_cap
    log_total = logits.logsumexp(dim=-1)
    # A stable sort keeps the lowest id first among equals, which topk does not promise.
    ordered = logits.sort(dim=-1, descending=True, stable=True)
    values, ids = ordered.values[:, :k] - log_total[:, None], ordered.indices[:, :k]
    finite = logits.amax(dim=-1).isfinite()
    nan = float("nan")
    return LensTopK(
        torch.where(finite[:, None], values, nan),
        torch.where(finite[:, None], ids, NOT_FINITE),
        torch.where(finite, log_total, nan),
    )


def normalised_reference(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Returns h in the dtype of x."""
    if weight is None:
        return x
    h = x.to(accumulation_dtype(x.dtype))
    if bias is not None:
        h = h - h.mean(dim=-1, keepdim=True)
    h = h * torch.rsqrt(h.square().mean(dim=-1, keepdim=True) + eps) * weight
    return (h if bias is None else h + bias).to(x.dtype)

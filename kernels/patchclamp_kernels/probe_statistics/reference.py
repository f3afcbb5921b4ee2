"""The statistics in torch, probe by probe, are the definition of the op."""

import torch
from torch import Tensor

from patchclamp_kernels.runtime import accumulation_dtype


def probe_statistics_reference(
    x: Tensor,
    probes: Tensor,
    *,
    low: Tensor,
    high: Tensor,
    histogram: Tensor,
    count: Tensor,
    not_finite: Tensor,
    total: Tensor,
    total_squares: Tensor,
    largest: Tensor,
    offsets: Tensor | None = None,
    row_mask: Tensor | None = None,
    thresholds: Tensor | None = None,
    fired: Tensor | None = None,
) -> Tensor:
    """Returns the values [T, P] in the accumulation dtype; statistics are added in place, as by the kernel."""
    acc = accumulation_dtype(x.dtype)
    values = x.to(acc) @ probes.to(acc).T
    if offsets is not None:
        values = values + offsets
    bins = histogram.shape[1] - 2
    for p in range(len(probes)):
        v = values[:, p] if row_mask is None else values[row_mask != 0, p]
        finite = v.isfinite()
        not_finite[p] += int((~finite).sum())
        v = v[finite]
        inside = ((v - low[p]) * (bins / (high[p] - low[p]))).floor().clamp(0, bins - 1).long() + 1
        slot = torch.where(v < low[p], 0, torch.where(v >= high[p], bins + 1, inside))
        histogram[p] += torch.bincount(slot, minlength=bins + 2)
        count[p] += len(v)
        total[p] += v.to(total.dtype).sum()
        total_squares[p] += v.to(total.dtype).square().sum()
        if len(v):
            largest[p] = max(largest[p], v.max())
        if fired is not None and thresholds is not None:
            fired[p] += int((v > thresholds[p]).sum())
    return values

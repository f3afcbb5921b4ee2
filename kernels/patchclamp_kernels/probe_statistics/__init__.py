"""This op accumulates projections of activations onto probes into statistics that stay on the device.

    v[t, p]  = x[t]·probe[p] + offset[p]                  for rows t with row_mask[t] != 0
    slot     = 0                                          where v < low[p]
             = bins + 1                                   where v >= high[p]
             = 1 + floor((v - low[p]) · bins / (high[p] - low[p]))   else, at most `bins`
    histogram[p, slot] += 1,  count[p] += 1,  total[p] += v,  total_squares[p] += v²,
    largest[p] = max(largest[p], v),  fired[p] += v > threshold[p]

x [T, d] and probes [P, d] share a dtype (float32, float16, bfloat16); the projection is summed in float32. Sums are
float32 or float64: a counter that runs for days wants float64. Units are those of the activations.

A value that is NaN or infinite counts in `not_finite[p]` and nowhere else: one broken row must not turn the sums that
a scrape reads into NaN for good, and must not pass unseen either.

Statistics live on the device and are read once a scrape, so a step never waits for them. Counts go through integer
atomics, whose order cannot be told from the result. Sums and maxima of a tile of rows go to scratch, and a second pass
in which an instance owns its probes adds the tiles in order: the same batch twice adds the same bits. Up to one tile of
rows (a decode batch) the first pass adds them itself and the second is not launched.

The server does not call it yet: probes and features in watches (issue 16) bring it into the CUDA path.

The op is bound by P·d bytes of probes (8 MiB for 1,024 probes at d 4096 in bf16) at decode, and by 2·T·P·d FLOPs from
some hundred rows on. A tile in which no row counts reads neither x nor probes: prompts that are not watched cost two
empty launches.
"""

from patchclamp_kernels.probe_statistics.cases import compile_cases, tuning_cases
from patchclamp_kernels.probe_statistics.op import probe_statistics
from patchclamp_kernels.probe_statistics.reference import probe_statistics_reference

__all__ = ["compile_cases", "probe_statistics", "probe_statistics_reference", "tuning_cases"]

"""probe_statistics: 1,024 probes over the rows of a step, against the bytes of the probes and the products."""

from collections.abc import Iterator

import torch
from torch import Tensor

from gpu.checks import BOUNDS, DTYPES, MATRIX_UNITS, Checks, exact, poisoned
from gpu.setting import Setting
from gpu.timing import Timer, bounded
from patchclamp_kernels.probe_statistics import probe_statistics, probe_statistics_reference

OP = "probe_statistics"
BINS = 64


def _sums(probes: int, device: torch.device) -> dict[str, Tensor]:
    integers = {n: torch.zeros(probes, dtype=torch.int64, device=device) for n in ("count", "not_finite", "fired")}
    sums = {n: torch.zeros(probes, dtype=torch.float64, device=device) for n in ("total", "total_squares")}
    histogram = torch.zeros(probes, BINS + 2, dtype=torch.int64, device=device)
    return {"histogram": histogram, "largest": torch.full((probes,), -torch.inf, device=device), **integers, **sums}


def _ranges(probes: int, device: torch.device) -> dict[str, Tensor]:
    low = -3 - torch.rand(probes, device=device)
    return {"low": low, "high": -low, "thresholds": torch.rand(probes, device=device)}


def checks(setting: Setting) -> Iterator[tuple[str, dict[str, object]]]:
    found = Checks(OP, setting.seed)
    device = torch.device(setting.device)
    probes = setting.pick(1024, 1024, 30)
    for shape in setting.shapes:
        for dtype in DTYPES:
            for rows in setting.pick((1, 64, 700), (64, 700), (1, 19)):
                x = torch.randn(rows, shape.d_model, device=device, dtype=dtype)
                vectors = torch.randn(probes, shape.d_model, device=device).to(dtype) * shape.d_model**-0.5
                options = {
                    **_ranges(probes, device),
                    "offsets": torch.randn(probes, device=device) * 0.1,
                    "row_mask": (torch.rand(rows, device=device) < 0.8).int(),
                }
                out, true = _sums(probes, device), _sums(probes, device)
                values = poisoned((rows, probes), torch.float32, device)
                probe_statistics(x, vectors, **options, **out, out_values=values)
                true_values = probe_statistics_reference(exact(x), exact(vectors), **options, **true)
                case = f"{shape.name}: {rows} rows"
                # A sum of both signs is small beside its terms: it is held to their size.
                size = (true["total_squares"] * rows).sqrt() + 1e-9
                found.close(
                    case,
                    dtype,
                    bound=BOUNDS[dtype] if dtype == torch.float32 else MATRIX_UNITS,
                    values=(values, true_values),
                    squares=(out["total_squares"], true["total_squares"]),
                    totals=(1 + out["total"] / size, 1 + true["total"] / size),
                )
                integers = {n: (out[n], true[n]) for n in ("count", "not_finite")}
                found.same(case, dtype, share=0.0, **integers)
                # A value on the edge of a bin falls either way.
                found.same(case, dtype, share=0.02, **{n: (out[n], true[n]) for n in ("histogram", "fired")})
                yield from found.taken()


def timings(setting: Setting) -> Iterator[tuple[str, dict[str, object]]]:
    timer, device, dtype = Timer(setting), torch.device(setting.device), torch.bfloat16
    probes = setting.pick(1024, 1024, 30)
    for shape in setting.shapes:
        for rows in setting.pick((1, 64, 256, 2048), (1, 256), (3,)):
            moved = (probes + rows) * shape.d_model * dtype.itemsize + 2 * 36 * probes
            runs = []
            for _ in range(timer.n_sets(moved)):
                x, vectors = (torch.randn(n, shape.d_model, device=device, dtype=dtype) for n in (rows, probes))
                vectors *= shape.d_model**-0.5
                options = {**_ranges(probes, device), **_sums(probes, device)}
                runs.append(lambda x=x, v=vectors, o=options: probe_statistics(x, v, **o))
            row = bounded(setting, timer.one(runs), byte_count=moved, flops=2 * rows * probes * shape.d_model)
            yield "kernels", {"op": OP, "model": shape.name, "case": f"{rows} rows x {probes} probes", **row}

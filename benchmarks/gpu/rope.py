"""rope_kv_write: rotation, q and k norms, and what lands in the cache."""

from collections.abc import Iterator

import torch
from torch import Tensor

from gpu.checks import DTYPES, Checks, exact, poisoned
from gpu.models import rotary_table
from gpu.setting import Setting, Shape
from gpu.timing import Timer, bounded
from patchclamp_kernels.rope_kv_write import rope_kv_write
from patchclamp_kernels.rope_kv_write import rope_kv_write_reference as reference

OP = "rope_kv_write"
BLOCK = 16


def _inputs(shape: Shape, rows: int, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    heads = shape.n_heads + 2 * shape.n_kv_heads
    cos, signed_sin = rotary_table(shape, dtype, device)
    inputs = {
        "qkv": torch.randn(rows, heads * shape.head_dim, device=device, dtype=dtype),
        "cos": cos,
        "signed_sin": signed_sin,
        "positions": torch.randint(0, shape.context_length, (rows,), device=device),
    }
    if shape.qk_norm:
        inputs |= {n: torch.rand(shape.head_dim, device=device).to(dtype) + 0.5 for n in ("q_norm", "k_norm")}
    return inputs


def _cache(shape: Shape, rows: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Twice the room that the rows need, and slots in any order."""
    blocks = 2 * (-(-rows // BLOCK))
    size = (blocks, BLOCK, shape.n_kv_heads, shape.head_dim)
    return (
        poisoned(size, dtype, device),
        poisoned(size, dtype, device),
        torch.randperm(blocks * BLOCK)[:rows].to(device),
    )


def checks(setting: Setting) -> Iterator[tuple[str, dict[str, object]]]:
    found = Checks(OP, setting.seed)
    device = torch.device(setting.device)
    for shape in setting.shapes:
        for dtype in DTYPES:
            for rows in setting.pick((1, 17, 512), (1, 512), (1, 17)):
                inputs = _inputs(shape, rows, dtype, device)
                keys, values, slots = _cache(shape, rows, dtype, device)
                slots[-1] = -1
                true_keys, true_values = exact(keys), exact(values)
                out = poisoned((rows, shape.n_heads, shape.head_dim), dtype, device)
                options = {"n_heads": shape.n_heads, "eps": 1e-6}
                rope_kv_write(**inputs, slots=slots, key_cache=keys, value_cache=values, out=out, **options)
                wide = {name: x if name == "positions" else exact(x) for name, x in inputs.items()}
                q = reference(**wide, slots=slots, key_cache=true_keys, value_cache=true_values, **options)
                case = f"{shape.name}: {rows} rows"
                found.same(
                    case,
                    dtype,
                    share=0.0,
                    untouched_keys=(keys.isnan(), true_keys.isnan()),
                    untouched_values=(values.isnan(), true_values.isnan()),
                )
                written = [(a.nan_to_num(), b.nan_to_num()) for a, b in ((keys, true_keys), (values, true_values))]
                found.close(case, dtype, q=(out, q))
                if rows > 1:
                    found.close(case, dtype, keys=written[0], values=written[1])
                yield from found.taken()


def timings(setting: Setting) -> Iterator[tuple[str, dict[str, object]]]:
    timer, device, dtype = Timer(setting), torch.device(setting.device), torch.bfloat16
    for shape in setting.shapes:
        for rows in setting.pick((1, 64, 256, 2048), (1, 256), (3,)):
            width = (shape.n_heads + 2 * shape.n_kv_heads) * shape.head_dim
            moved = dtype.itemsize * rows * (2 * width + 2 * shape.head_dim)
            runs = []
            for _ in range(timer.n_sets(moved)):
                inputs = _inputs(shape, rows, dtype, device)
                keys, values, slots = _cache(shape, rows, dtype, device)
                out = torch.empty(rows, shape.n_heads, shape.head_dim, device=device, dtype=dtype)
                inputs |= {"slots": slots, "key_cache": keys, "value_cache": values, "out": out}
                runs.append(lambda i=inputs, n=shape.n_heads: rope_kv_write(**i, n_heads=n, eps=1e-6))
            row = bounded(setting, timer.one(runs), byte_count=moved)
            yield "kernels", {"op": OP, "model": shape.name, "case": f"{rows} rows", **row}

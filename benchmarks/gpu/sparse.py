"""sparse_mlp and sparse_linear: the bytes of the active neurons, against those and against the dense MLP of cuBLAS."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from gpu.checks import DTYPES, Checks, exact, poisoned
from gpu.setting import Setting, Shape
from gpu.timing import Timer, bounded
from patchclamp_kernels.sparse_mlp import (
    Int4Weight,
    NeuronSets,
    sparse_down,
    sparse_down_reference,
    sparse_linear,
    sparse_linear_reference,
    sparse_mlp,
    sparse_up,
    sparse_up_reference,
)

OP = "sparse_mlp"
GROUP = 64
# A standard normal input keeps half of its channels above this, three tenths above the next.
THRESHOLDS = {0.5: 0.6745, 0.3: 1.0364}


def _weight(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.empty(rows, columns, dtype=dtype, device=device).normal_(0.0, columns**-0.5)


def _int4(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Int4Weight:
    packed = torch.randint(0, 256, (rows, columns // 2), device=device, dtype=torch.uint8)
    scales = torch.rand(rows, columns // GROUP, device=device).to(dtype) * 0.02 * columns**-0.5 + 0.001
    zeros = torch.randint(6, 10, scales.shape, device=device).to(dtype)
    return Int4Weight(packed, scales, zeros, GROUP)


def _sets(shape: Shape, keep: float, rows: int, sets: int, device: torch.device) -> NeuronSets:
    """Row b has set b modulo `sets`."""
    k = round(keep * shape.d_ff)
    index = torch.stack([torch.randperm(shape.d_ff)[:k].sort().values for _ in range(sets)])
    return NeuronSets(index.to(device, torch.int32), (torch.arange(rows) % sets).to(device, torch.int32))


def checks(setting: Setting) -> Iterator[tuple[str, dict[str, object]]]:
    found = Checks(OP, setting.seed)
    device = torch.device(setting.device)
    for shape in setting.shapes:
        for dtype in DTYPES:
            weights = {"dense": (_weight, _weight)}
            if dtype == torch.bfloat16:
                weights["int4"] = (_int4, _int4)
            for form, (make_up, make_down) in weights.items():
                up = make_up(2 * shape.d_ff, shape.d_model, dtype, device)
                down = make_down(shape.d_ff, shape.d_model, dtype, device)
                for rows, n_sets in setting.pick(((1, 1), (8, 3), (32, 1)), ((1, 1), (8, 3)), ((1, 1), (5, 2))):
                    sets = _sets(shape, 0.4, rows, n_sets, device)
                    _check(found, f"{shape.name}: {form}, {rows} rows, {n_sets} sets", dtype, up, down, sets)
                    yield from found.taken()
                del up, down
    yield from _linear_checks(setting)


def _check(found: Checks, case: str, dtype: torch.dtype, up, down, sets: NeuronSets) -> None:
    device, rows = sets.index.device, len(sets.which)
    x = torch.randn(rows, up.shape[1], device=device, dtype=dtype)
    h = poisoned((rows, sets.index.shape[1]), dtype, device)
    sparse_up(x, up, sets, out=h)
    wide_up, wide_down = (w if isinstance(w, Int4Weight) else exact(w) for w in (up, down))
    true_h = sparse_up_reference(exact(x), wide_up, sets)
    y = poisoned((rows, x.shape[1]), dtype, device)
    sparse_down(h, down, sets, out=y)
    again = sparse_down(sparse_up(x, up, sets), down, sets)
    found.same(case, dtype, share=0.0, repeated=(again, y))
    # Of the neurons that the kernel computed: each half answers for itself.
    found.close(case, dtype, up=(h, true_h), down=(y, sparse_down_reference(exact(h), wide_down, sets)))


def _linear_checks(setting: Setting) -> Iterator[tuple[str, dict[str, object]]]:
    found = Checks("sparse_linear", setting.seed)
    device = torch.device(setting.device)
    shape = setting.shapes[0]
    for dtype in DTYPES:
        for rows in setting.pick((1, 8, 32), (1, 8), (1, 3)):
            weight = _weight(shape.d_model, shape.d_ff, dtype, device)
            x = torch.randn(rows, shape.d_model, device=device, dtype=dtype)
            scale = torch.rand(shape.d_model, device=device) + 0.5
            out = poisoned((rows, shape.d_ff), dtype, device)
            options = {"threshold": THRESHOLDS[0.5], "channel_scale": scale}
            sparse_linear(x, weight, out=out, **options)
            # Scores are those of the rounded input, whatever the reference computes in.
            true = sparse_linear_reference(exact(x), exact(weight), **options)
            found.close(f"{shape.name}: {rows} rows", dtype, y=(out, true))
    yield from found.taken()


def timings(setting: Setting) -> Iterator[tuple[str, dict[str, object]]]:
    timer = Timer(setting)
    for shape in setting.shapes:
        yield from _mlp_timings(setting, timer, shape)
        yield from _linear_timings(setting, timer, shape)


def _mlp_timings(setting: Setting, timer: Timer, shape: Shape) -> Iterator[tuple[str, dict[str, object]]]:
    device, dtype = torch.device(setting.device), torch.bfloat16
    d, d_ff = shape.d_model, shape.d_ff
    copies = timer.n_sets(0.3 * 3 * d * d_ff * dtype.itemsize, most=6)
    ups = [_weight(2 * d_ff, d, dtype, device) for _ in range(copies)]
    downs = [_weight(d_ff, d, dtype, device) for _ in range(copies)]
    transposed = [w.t().contiguous() for w in downs]
    quantised = [(_int4(2 * d_ff, d, dtype, device), _int4(d_ff, d, dtype, device)) for _ in range(4 * copies)]
    for rows in setting.pick((1, 8, 32), (1, 8, 32), (1, 3)):
        x = torch.randn(rows, d, device=device, dtype=dtype)

        def dense(x: Tensor, up: Tensor, down: Tensor, neuron_major: bool) -> Tensor:
            gate, value = F.linear(x, up).chunk(2, dim=1)
            h = F.silu(gate) * value
            return h @ down if neuron_major else F.linear(h, down)

        variants = {
            "dense": [lambda x=x, u=u, w=w: dense(x, u, w, False) for u, w in zip(ups, transposed, strict=True)],
            "neuron major": [lambda x=x, u=u, w=w: dense(x, u, w, True) for u, w in zip(ups, downs, strict=True)],
        }
        keeps = {f"keep {keep} x {rows}": (keep, 1, False) for keep in (0.5, 0.3)}
        keeps[f"int4 keep 0.5 x {rows}"] = (0.5, 1, True)
        if rows == 8:
            keeps[f"own sets, keep 0.3 x {rows}"] = (0.3, rows, False)
        for case, (keep, n_sets, four_bits) in keeps.items():
            sets = _sets(shape, keep, rows, n_sets, device)
            weights = quantised if four_bits else list(zip(ups, downs, strict=True))
            out = torch.empty_like(x)
            variants[case] = [lambda x=x, u=u, w=w, s=sets, o=out: sparse_mlp(x, u, w, s, out=o) for u, w in weights]
        took = timer.together(variants)
        for case, (keep, n_sets, four_bits) in keeps.items():
            # Of several random sets what is read is the union.
            share = 1 - (1 - keep) ** n_sets
            neuron_bytes = 3 * d * (0.5 + 2 * dtype.itemsize / GROUP if four_bits else dtype.itemsize)
            moved = share * d_ff * neuron_bytes + (2 * d + 2 * keep * d_ff) * rows * dtype.itemsize
            versus = {
                "vs_dense": round(took["dense"].seconds / took[case].seconds, 3),
                "dense_us": round(took["dense"].seconds * 1e6, 2),
                "neuron_major_us": round(took["neuron major"].seconds * 1e6, 2),
            }
            row = bounded(setting, took[case], byte_count=moved, flops=6 * rows * keep * d_ff * d)
            yield "kernels", {"op": OP, "model": shape.name, "case": case, **row, "versus": versus}


def _linear_timings(setting: Setting, timer: Timer, shape: Shape) -> Iterator[tuple[str, dict[str, object]]]:
    device, dtype = torch.device(setting.device), torch.bfloat16
    d, width = shape.d_model, shape.d_ff
    copies = timer.n_sets(0.3 * d * width * dtype.itemsize, most=8)
    weights = [_weight(d, width, dtype, device) for _ in range(copies)]
    dense = [w.t().contiguous() for w in weights]
    x = torch.randn(1, d, device=device, dtype=dtype)
    variants = {keep: [lambda w=w, t=t: sparse_linear(x, w, threshold=t) for w in weights] for keep, t in
                THRESHOLDS.items()}  # fmt: skip
    took = timer.together({**variants, "dense": [lambda w=w: F.linear(x, w) for w in dense]})
    for keep, threshold in THRESHOLDS.items():
        kept = float((x.float().abs() >= threshold).sum())
        versus = {"vs_dense": round(took["dense"].seconds / took[keep].seconds, 3)}
        row = bounded(setting, took[keep], byte_count=(kept * width + d + width) * dtype.itemsize)
        case = f"threshold, keep {keep}"
        yield "kernels", {"op": "sparse_linear", "model": shape.name, "case": case, **row, "versus": versus}

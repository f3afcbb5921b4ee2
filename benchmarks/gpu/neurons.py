"""gated_activation: neurons with clamps, their receipts and readings; what clamps cost beside the activation."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from gpu.checks import DTYPES, Checks, exact, poisoned
from gpu.programs import StepTables, clamp_program
from gpu.setting import Setting, Shape
from gpu.timing import Timer, bounded
from patchclamp_kernels.gated_activation import (
    NeuronProgram,
    gated_activation,
    gated_activation_reference,
    neuron_receipts,
    neuron_receipts_reference,
    neuron_statistics,
    neuron_statistics_reference,
    neuron_tiles,
)
from patchclamp_server.model.sites import Site, place_number

OP = "gated_activation"
PLACE = place_number(Site.MLP_POST, 0)
# Of a program at a place: the clamps, and what reads neurons.
ENTRIES = 2


def checks(setting: Setting) -> Iterator[tuple[str, dict[str, object]]]:
    found = Checks(OP, setting.seed)
    device = torch.device(setting.device)
    for shape in setting.shapes:
        n = setting.pick(32, 16, 5)
        programs = [
            None if i % 5 == 4 else clamp_program(shape, i, min(64, shape.d_ff // 2), (0,), read=True) for i in range(n)
        ]
        for dtype in DTYPES:
            tables = StepTables(shape, programs, dtype, device)
            hidden = torch.randn(n, 2 * shape.d_ff, device=device, dtype=dtype)
            rows, true_rows = tables.rows(), tables.rows()
            partial = poisoned((n, neuron_tiles(shape.d_ff, device), ENTRIES, 2), torch.float32, device)
            wide = torch.zeros(partial.shape, dtype=torch.float64, device=device)
            out = poisoned((n, shape.d_ff), dtype, device)
            table, options = tables.tables.table, {"activation": "silu", "gated": True}
            gated_activation(hidden, out=out, program=NeuronProgram(table, rows, PLACE, partial), **options)
            program = NeuronProgram(table, true_rows, PLACE, wide)
            true = gated_activation_reference(exact(hidden), program=program, **options)
            places = torch.tensor([PLACE], dtype=torch.int32, device=device)
            neuron_receipts(table, rows, places, partial[None])
            neuron_receipts_reference(table, true_rows, places, wide[None])
            case = f"{shape.name}: {n} rows, clamps"
            found.close(
                case,
                dtype,
                neurons=(out, true),
                readings=(rows.readings, true_rows.readings),
                changes=(rows.receipts[..., 1], true_rows.receipts[..., 1]),
            )
            found.same(case, dtype, share=0.0, edited=(rows.receipts[..., 0], true_rows.receipts[..., 0]))
            yield from found.taken()
    for activation in ("gelu", "gelu_tanh", "relu"):
        hidden = torch.randn(7, setting.shapes[0].d_ff, device=device)
        out = poisoned(tuple(hidden.shape), hidden.dtype, device)
        gated_activation(hidden, activation=activation, gated=False, out=out)
        true = gated_activation_reference(exact(hidden), activation=activation, gated=False)
        found.close(f"{activation}, ungated", torch.float32, neurons=(out, true))
    _check_statistics(found, setting)
    yield from found.taken()


def _check_statistics(found: Checks, setting: Setting) -> None:
    shape, device = setting.shapes[0], torch.device(setting.device)
    neurons = torch.randn(setting.pick(300, 300, 9), shape.d_ff, device=device, dtype=torch.bfloat16)
    watched = torch.randperm(shape.d_ff)[: setting.pick(500, 500, 20)].to(device, torch.int32)
    thresholds = torch.rand(len(watched), device=device)
    mask = torch.rand(len(neurons), device=device) < 0.7

    def sums() -> dict[str, torch.Tensor]:
        fired = torch.zeros(len(watched), dtype=torch.int64, device=device)
        total = torch.zeros(len(watched), dtype=torch.float64, device=device)
        return {"fired": fired, "total": total, "largest": torch.full_like(thresholds, -torch.inf)}

    out, true = sums(), sums()
    neuron_statistics(neurons, watched, thresholds, mask, **out)
    neuron_statistics_reference(exact(neurons), watched, thresholds, mask, **true)
    pairs = {name: (out[name], true[name]) for name in out}
    found.close(f"{shape.name}: statistics", torch.float32, total=pairs["total"], largest=pairs["largest"])
    found.same(f"{shape.name}: statistics", torch.float32, share=0.0, fired=pairs["fired"])


def timings(setting: Setting) -> Iterator[tuple[str, dict[str, object]]]:
    timer = Timer(setting)
    for shape in setting.shapes:
        for rows in setting.pick((1, 64, 256), (256,), (3,)):
            yield from _timings(setting, timer, shape, rows)


def _timings(setting: Setting, timer: Timer, shape: Shape, rows: int) -> Iterator[tuple[str, dict[str, object]]]:
    device, dtype = torch.device(setting.device), torch.bfloat16
    moved = 3 * rows * shape.d_ff * dtype.itemsize
    sets = timer.n_sets(moved)
    inputs = [torch.randn(rows, 2 * shape.d_ff, device=device, dtype=dtype) for _ in range(sets)]
    out = [torch.empty(rows, shape.d_ff, device=device, dtype=dtype) for _ in range(sets)]
    neurons = min(64, shape.d_ff // 2)
    clamped = [clamp_program(shape, 0, neurons, (0,))] * rows
    different = [clamp_program(shape, i, neurons, (0,)) for i in range(rows)]

    def runs(programs: list | None) -> list:
        program = None
        if programs is not None:
            tables = StepTables(shape, programs, dtype, device)
            partial = torch.empty(rows, neuron_tiles(shape.d_ff, device), ENTRIES, 2, device=device)
            program = NeuronProgram(tables.tables.table, tables.rows(), PLACE, partial)
        return [
            lambda h=h, o=o: gated_activation(h, activation="silu", gated=True, out=o, program=program)
            for h, o in zip(inputs, out, strict=True)
        ]

    def by_torch(h: torch.Tensor, o: torch.Tensor) -> None:
        gate, up = h.chunk(2, dim=1)
        torch.mul(F.silu(gate), up, out=o)

    variants = {"plain": runs(None), "unclamped": runs([None] * rows), f"{neurons} clamps, one program": runs(clamped)}
    variants[f"{neurons} clamps, {rows} programs"] = runs(different)
    variants["torch"] = [lambda h=h, o=o: by_torch(h, o) for h, o in zip(inputs, out, strict=True)]
    took = timer.together(variants)
    for name, timing in took.items():
        if name == "torch":
            continue
        versus = {
            "vs_unclamped": round(timing.seconds / took["unclamped"].seconds, 4),
            "torch_us": round(took["torch"].seconds * 1e6, 2),
        }
        row = bounded(setting, timing, byte_count=moved)
        yield "kernels", {"op": OP, "model": shape.name, "case": f"{rows} rows, {name}", **row, "versus": versus}

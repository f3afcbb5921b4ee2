"""residual_edits and accumulate_receipts: a decode batch with every kind of edit against the reference; what programs
cost beside the residual add and the norm that every step pays."""

from collections.abc import Iterator

import torch

from gpu.checks import DTYPES, Checks, exact, poisoned
from gpu.programs import StepTables, add_program, mixed_program
from gpu.setting import Setting, Shape
from gpu.timing import Timer, bounded
from patchclamp_kernels.receipts import accumulate_receipts, accumulate_receipts_reference
from patchclamp_kernels.residual_edits import NormParams, residual_edits, residual_edits_reference
from patchclamp_server.model.sites import Site, place_number

OP = "residual_edits"
# The boundary behind layer 0: what its MLP adds, its resid_post, the resid_pre and the norm of layer 1.
DELTA = (place_number(Site.MLP_OUT, 0), place_number(Site.MLP_OUT, 0) + 1)
STREAM = (place_number(Site.RESID_POST, 0), place_number(Site.RESID_PRE, 1) + 1)


def checks(setting: Setting) -> Iterator[tuple[str, dict[str, object]]]:
    found = Checks(OP, setting.seed)
    device = torch.device(setting.device)
    for shape in setting.shapes:
        n = setting.pick(64, 32, 18)
        programs = [None if i % 7 == 6 else mixed_program(shape, i, (0,)) for i in range(n)]
        for dtype in DTYPES:
            tables = StepTables(shape, programs, dtype, device)
            x, delta = (torch.randn(n, shape.d_model, device=device, dtype=dtype) for _ in range(2))
            norm = NormParams(torch.rand(shape.d_model, device=device).to(dtype) + 0.5, None, 1e-5)
            rows, true_rows = tables.rows(), tables.rows()
            out = poisoned(tuple(x.shape), dtype, device)
            places = {"delta_places": DELTA, "places": STREAM}
            true_x = exact(x)
            wide = NormParams(exact(norm.weight), None, norm.eps)
            true = residual_edits_reference(
                true_x, delta=exact(delta), norm=wide, program=tables.step(true_rows, wide=True), **places
            )
            alone, again = x.clone(), x.clone()
            residual_edits(again, delta=delta, norm=norm, program=tables.step(tables.rows()), **places)
            residual_edits(x, delta=delta, norm=norm, out=out, program=tables.step(rows), **places)
            case = f"{shape.name}: {n} rows, all kinds"
            found.close(case, dtype, x=(x, true_x), norm=(out, true), readings=(rows.readings, true_rows.readings))
            found.close(case, dtype, changes=(rows.receipts[..., 1], true_rows.receipts[..., 1]))
            found.same(case, dtype, edited=(rows.receipts[..., 0], true_rows.receipts[..., 0]))
            residual_edits(alone, delta=delta, norm=norm)
            none = torch.tensor([i for i, p in enumerate(programs) if p is None], device=device)
            found.same(case, dtype, share=0.0, rows_without_program=(x[none], alone[none]), repeated=(again, x))
            yield from found.taken()
    yield from _receipt_checks(setting)


def _receipt_checks(setting: Setting) -> Iterator[tuple[str, dict[str, object]]]:
    found = Checks("receipts", setting.seed)
    device = torch.device(setting.device)
    lengths = torch.tensor([1, 0, 300, 64, 1, 65, 7], dtype=torch.int32)
    first = torch.cumsum(lengths, 0, dtype=torch.int32) - lengths
    rows, items = int(lengths.sum()), 5
    receipts = torch.rand(rows, items, 2, device=device)
    counters = torch.randperm(64)[: len(lengths) * items].view(-1, items).to(device, torch.int32)
    counters[2, 3] = -1
    spans = torch.stack((first, lengths), dim=1).to(device)
    counts = torch.rand(64, 2, dtype=torch.float64, device=device)
    true = counts.clone()
    accumulate_receipts(counts, receipts, spans, counters)
    accumulate_receipts_reference(true, receipts, spans, counters)
    found.close(f"{len(lengths)} spans", torch.float32, counts=(counts, true))
    yield from found.taken()


def timings(setting: Setting) -> Iterator[tuple[str, dict[str, object]]]:
    timer = Timer(setting)
    for shape in setting.shapes:
        for rows in setting.pick((1, 64, 256), (256,), (5,)):
            yield from _timings(setting, timer, shape, rows)


def _timings(setting: Setting, timer: Timer, shape: Shape, rows: int) -> Iterator[tuple[str, dict[str, object]]]:
    device, dtype = torch.device(setting.device), torch.bfloat16
    none = [None] * rows
    one = [add_program(shape, 0, (0,))] * rows
    adds = [add_program(shape, i, (0,)) for i in range(rows)]
    mixed = [mixed_program(shape, i, (0,)) for i in range(rows)]
    row_bytes = shape.d_model * dtype.itemsize
    base = 4 * rows * row_bytes
    norm = NormParams(torch.ones(shape.d_model, dtype=dtype, device=device), None, 1e-5)
    sets = timer.n_sets(base)
    inputs = [
        tuple(torch.randn(rows, shape.d_model, device=device, dtype=dtype) for _ in range(3)) for _ in range(sets)
    ]

    def runs(programs: list | None) -> list:
        if programs is None:
            return [lambda i=i: residual_edits(i[0], delta=i[1], norm=norm, out=i[2]) for i in inputs]
        tables = StepTables(shape, programs, dtype, device)
        step = tables.step(tables.rows())
        return [
            lambda i=i: residual_edits(
                i[0], delta=i[1], norm=norm, out=i[2], program=step, delta_places=DELTA, places=STREAM
            )
            for i in inputs
        ]

    cases = {
        "no tables": (None, 0),
        "unsteered": (none, 0),
        "one add a row, one program": (one, 1),
        f"one add a row, {rows} programs": (adds, rows),
        f"{rows} programs, all kinds": (mixed, sum(_vectors(p) for p in mixed)),
    }
    took = timer.together({case: runs(programs) for case, (programs, _) in cases.items()})
    for case, (_, vectors) in cases.items():
        row = bounded(setting, took[case], byte_count=base + vectors * row_bytes)
        versus = {"vs_unsteered": round(took[case].seconds / took["unsteered"].seconds, 4)}
        yield "kernels", {"op": OP, "model": shape.name, "case": f"{rows} rows, {case}", **row, "versus": versus}


def _vectors(program) -> int:
    """Rows of the banks that a program reads at the boundary."""
    edit = program.edits[0]
    payload = edit.payload[0]
    read = 2 * len(payload[0]) if payload[0].dim() == 2 else 1
    return read + (edit.gate is not None) + len(program.readouts)

"""This has the kernel of `residual_edits`, its checked wrappers, and the variants in use."""

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from patchclamp_kernels.cases import CompileCase, TuningCase
from patchclamp_kernels.configs import Config, config_for
from patchclamp_kernels.program_table import ProgramRows, ProgramTable
from patchclamp_kernels.residual_edits.entries import Row, run_entries
from patchclamp_kernels.residual_edits.reference import NormParams, Places, ProgramStep, residual_edits_reference
from patchclamp_kernels.runtime import check, check_tensor, uses_kernel

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
NO_NORM, RMS_NORM, LAYER_NORM = 0, 1, 2
_LAYER_NORM = tl.constexpr(LAYER_NORM)
# Sizes that vary by step or layer must not make variants of their own.
_SIZES = ("n_bounds", "words", "items", "open_columns", "reading_columns")
_PLACES = ("delta_start", "delta_end", "start", "end")


@triton.jit
def _normalised(h, lane, weight, bias, eps, D: tl.constexpr, NORM: tl.constexpr):
    inside = lane < D
    if NORM == _LAYER_NORM:
        h = tl.where(inside, h - tl.sum(h, axis=0) / D, 0.0)
    h = h * tl.rsqrt(tl.sum(h * h, axis=0) / D + eps) * tl.load(weight + lane, mask=inside, other=0.0).to(tl.float32)
    if NORM == _LAYER_NORM:
        h = h + tl.load(bias + lane, mask=inside, other=0.0).to(tl.float32)
    return h


@triton.jit(do_not_specialize=[*_SIZES, *_PLACES])
def residual_edits_kernel(
    x,
    delta,
    delta_weight,
    delta_bias,
    weight,
    bias,
    out,
    entries,
    ints,
    floats,
    unit_ints,
    unit_numbers,
    latch,
    bank,
    head_bank,
    slot,
    mask,
    position,
    counted,
    opened,
    receipts,
    readings,
    n_bounds,
    words,
    items,
    open_columns,
    reading_columns,
    delta_start,
    delta_end,
    start,
    end,
    delta_eps,
    eps,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HAS_DELTA: tl.constexpr,
    DELTA_NORM: tl.constexpr,
    EDITS_DELTA: tl.constexpr,
    EDITS_X: tl.constexpr,
    NORM: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    inside = lane < D
    at = t * D + lane
    if EDITS_DELTA or EDITS_X:
        own_slot = tl.load(slot + t)
        has_program = own_slot >= 0
        bounds = entries + own_slot.to(tl.int64) * n_bounds
        row = Row(
            ints,
            floats,
            unit_ints,
            unit_numbers,
            latch,
            bank,
            head_bank,
            mask + t * words,
            opened + t * open_columns,
            receipts + t * items * 2,
            readings + t * reading_columns,
            tl.load(position + t),
            tl.load(counted + t),
            x + t * D,
        )
    h = tl.load(x + at, mask=inside, other=0.0)
    if HAS_DELTA:
        e = tl.load(delta + at, mask=inside, other=0.0).to(tl.float32)
        if DELTA_NORM:
            e = _normalised(e, lane, delta_weight, delta_bias, delta_eps, D, DELTA_NORM)
            e = e.to(x.dtype.element_ty).to(tl.float32)
        if EDITS_DELTA:
            first = tl.load(bounds + delta_start, mask=has_program, other=0)
            last = tl.load(bounds + delta_end, mask=has_program, other=0)
            e = run_entries(e, lane, row, first, last, D, HEAD_DIM).to(x.dtype.element_ty).to(tl.float32)
        h = (h.to(tl.float32) + e).to(x.dtype.element_ty)
    if EDITS_X:
        first = tl.load(bounds + start, mask=has_program, other=0)
        last = tl.load(bounds + end, mask=has_program, other=0)
        h = run_entries(h.to(tl.float32), lane, row, first, last, D, HEAD_DIM).to(x.dtype.element_ty)
    if HAS_DELTA:
        tl.store(x + at, h, mask=inside)
    elif EDITS_X:
        tl.store(x + at, h, mask=inside & (first < last))
    if NORM:
        h = _normalised(h.to(tl.float32), lane, weight, bias, eps, D, NORM)
        tl.store(out + at, h.to(out.dtype.element_ty), mask=inside)


def residual_edits(
    x: Tensor,
    *,
    delta: Tensor | None = None,
    delta_norm: NormParams | None = None,
    program: ProgramStep | None = None,
    delta_places: Places | None = None,
    places: Places | None = None,
    norm: NormParams | None = None,
    out: Tensor | None = None,
    config: Config | None = None,
) -> Tensor | None:
    """Adds `delta` to x [T, d] in place with the edits of each row's program, and returns norm(x) [T, d], or None.

    `delta_places` and `places` are the half-open ranges of places whose entries run on delta and on the sum. Writes
    `opened`, `receipts` and `readings` of `program.rows`, and latches. Raises ValueError naming an argument that does
    not fit.
    """
    _check(x, delta, delta_norm, program, delta_places, places, norm, out)
    if norm is not None and out is None:
        out = torch.empty_like(x)
    if not uses_kernel(x):
        return residual_edits_reference(
            x,
            delta=delta,
            delta_norm=delta_norm,
            program=program,
            delta_places=delta_places,
            places=places,
            norm=norm,
            out=out,
        )
    if len(x) == 0:
        return out
    d = x.shape[1]
    block = triton.next_power_of_2(d)
    if config is None:
        config = config_for("residual_edits", f"d{block}", default_config(d), x.device)
    table = program.table if program is not None else None
    rows = program.rows if program is not None else None
    head_bank = program.head_bank if program is not None else None
    residual_edits_kernel[(len(x),)](
        x,
        delta,
        delta_norm and delta_norm.weight,
        delta_norm and delta_norm.bias,
        norm and norm.weight,
        norm and norm.bias,
        out,
        *_table_arguments(table),
        program and program.bank,
        # Unread where there are no heads.
        head_bank if head_bank is not None else program and program.bank,
        *_row_arguments(rows),
        table.entries.shape[1] if table is not None else 0,
        *_sizes(rows),
        *(delta_places or (0, 0)),
        *(places or (0, 0)),
        delta_norm.eps if delta_norm is not None else 0.0,
        norm.eps if norm is not None else 0.0,
        D=d,
        BLOCK=block,
        HEAD_DIM=program.head_dim if program is not None and head_bank is not None else 0,
        HAS_DELTA=delta is not None,
        DELTA_NORM=_norm_kind(delta_norm),
        EDITS_DELTA=delta_places is not None,
        EDITS_X=places is not None,
        NORM=_norm_kind(norm),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        # A fused multiply-add in one variant and not in another would break the equality of their bits.
        enable_fp_fusion=False,
    )
    return out


def edit_rows(x: Tensor, *, program: ProgramStep, places: Places, config: Config | None = None) -> None:
    """Edits the activations x [T, width] of a site in place: `residual_edits` with nothing to add or to normalise."""
    residual_edits(x, program=program, places=places, config=config)


def default_config(d: int) -> Config:
    """Gives a row of more than 2048 elements 512 threads, which leaves 128 registers to each: with 256 threads, and 16
    elements in each, edits of a delta of 4096 spill. It is the same for all variants of a width, whose sums must be of
    the same bits."""
    return Config(num_warps=16 if triton.next_power_of_2(d) > 2048 else 8, num_stages=1)


def _check(
    x: Tensor,
    delta: Tensor | None,
    delta_norm: NormParams | None,
    program: ProgramStep | None,
    delta_places: Places | None,
    places: Places | None,
    norm: NormParams | None,
    out: Tensor | None,
) -> None:
    check_tensor("x", x, shape=(None, None), dtypes=DTYPES, device=x.device)
    for name, given in (("delta", delta), ("out", out)):
        if given is not None:
            check_tensor(name, given, shape=tuple(x.shape), dtypes=(x.dtype,), device=x.device)
    check(delta is not None or delta_norm is None, "delta_norm needs delta")
    check(delta is not None or delta_places is None, "delta_places needs delta")
    check(norm is not None or out is None, "out needs norm")
    for name, given_norm in (("delta_norm", delta_norm), ("norm", norm)):
        if given_norm is not None:
            _check_norm(name, given_norm, x)
    for name, given_places in (("delta_places", delta_places), ("places", places)):
        if given_places is not None:
            check(program is not None, f"{name} needs program")
            assert program is not None
            start, end = given_places
            most = program.table.entries.shape[1] - 1
            check(0 <= start <= end <= most, f"{name} is {start} to {end}, not a range within 0 to {most}")
    if program is not None:
        check(len(program.rows.slot) == len(x), f"program has {len(program.rows.slot)} rows, x has {len(x)}")
        bank, device = program.bank, x.device
        check_tensor("program.bank", bank, shape=(None, x.shape[1]), dtypes=(x.dtype,), device=device)


def _check_norm(name: str, norm: NormParams, x: Tensor) -> None:
    for part, given in (("weight", norm.weight), ("bias", norm.bias)):
        if given is not None:
            shape, dtypes = (x.shape[1],), (x.dtype, torch.float32)
            check_tensor(f"{name}.{part}", given, shape=shape, dtypes=dtypes, device=x.device)


def _norm_kind(norm: NormParams | None) -> int:
    if norm is None:
        return NO_NORM
    return RMS_NORM if norm.bias is None else LAYER_NORM


def _table_arguments(table: ProgramTable | None) -> tuple[Tensor | None, ...]:
    if table is None:
        return (None,) * 6
    return (table.entries, table.ints, table.floats, table.unit_ints, table.unit_numbers, table.latch)


def _row_arguments(rows: ProgramRows | None) -> tuple[Tensor | None, ...]:
    if rows is None:
        return (None,) * 7
    return (rows.slot, rows.mask, rows.position, rows.counted, rows.opened, rows.receipts, rows.readings)


def _sizes(rows: ProgramRows | None) -> tuple[int, ...]:
    if rows is None:
        return (0,) * 4
    return (rows.mask.shape[1], rows.receipts.shape[1], rows.opened.shape[1], rows.readings.shape[1])


_TABLE_TYPES = {
    "entries": "*i32",
    "ints": "*i32",
    "floats": "*fp32",
    "unit_ints": "*i32",
    "unit_numbers": "*fp32",
    "latch": "*i64",
    "bank": "*bf16",
    "head_bank": "*bf16",
    "slot": "*i32",
    "mask": "*i64",
    "position": "*i64",
    "counted": "*i32",
    "opened": "*i32",
    "receipts": "*fp32",
    "readings": "*fp32",
}


def compile_cases() -> list[CompileCase]:
    """Returns the cases of Llama-3-8B and Qwen3-1.7B in bf16."""
    cases = []
    for d, head_dim in ((4096, 128), (2048, 128)):
        for delta in (False, True):
            for program in (False, True):
                if delta or program:
                    cases.append(_compile_case(d, delta=delta, program=program, norm=RMS_NORM, head_dim=head_dim))
        cases.append(_compile_case(d, delta=False, program=False, norm=RMS_NORM, head_dim=head_dim))
    cases.append(_compile_case(4096, delta=False, program=True, norm=NO_NORM, head_dim=128))
    cases.append(_compile_case(14336, delta=False, program=True, norm=NO_NORM, head_dim=0))
    cases.append(_compile_case(6144, delta=False, program=True, norm=NO_NORM, head_dim=0))
    return cases


def _compile_case(d: int, *, delta: bool, program: bool, norm: int, head_dim: int) -> CompileCase:
    signature = {"x": "*bf16", **dict.fromkeys((*_SIZES, *_PLACES), "i32"), "delta_eps": "fp32", "eps": "fp32"}
    signature |= {"delta": "*bf16"} if delta else {}
    signature |= {"weight": "*bf16", "out": "*bf16"} if norm else {}
    signature |= _TABLE_TYPES if program else {}
    pointers = ("delta", "delta_weight", "delta_bias", "weight", "bias", "out", *_TABLE_TYPES)
    constexprs = {
        **{name: None for name in pointers if name not in signature},
        "D": d,
        "BLOCK": triton.next_power_of_2(d),
        "HEAD_DIM": head_dim if program else 0,
        "HAS_DELTA": delta,
        "DELTA_NORM": NO_NORM,
        "EDITS_DELTA": delta and program,
        "EDITS_X": program,
        "NORM": norm,
    }
    name = f"d{d}{' delta' if delta else ''}{' program' if program else ''}{' rms' if norm else ''}"
    options = {"enable_fp_fusion": False}
    return CompileCase(name, residual_edits_kernel, signature, constexprs, default_config(d), options=options)


def tuning_cases(device: torch.device) -> list[TuningCase]:
    """Tunes the plain residual add and norm of a full decode batch, which every step pays."""
    cases = []
    for d in (4096, 2048):
        x, delta, out = (torch.randn(256, d, device=device).bfloat16() for _ in range(3))
        norm = NormParams(torch.ones(d, dtype=x.dtype, device=device), None, 1e-5)
        candidates = tuple(Config(num_warps=warps, num_stages=1) for warps in (2, 4, 8, 16))
        run = partial(_tune, x, delta, norm, out)
        cases.append(TuningCase("residual_edits", f"d{d}", candidates, run))
    return cases


def _tune(x: Tensor, delta: Tensor, norm: NormParams, out: Tensor, config: Config) -> object:
    return residual_edits(x, delta=delta, norm=norm, out=out, config=config)

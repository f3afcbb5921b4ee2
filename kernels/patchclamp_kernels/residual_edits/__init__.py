"""This op adds, edits, observes and normalises in one pass over the residual stream.

    e = delta[t]                     or round(norm(delta[t])), then the entries of the row's program at `delta_places`
    h = round(x[t] + round(e))       then the entries at `places`
    x[t] = round(h)
    out[t] = round(norm(x[t]))       RMS norm, or LayerNorm with a bias

x, delta, out [T, d] are float32, float16 or bfloat16; everything between two roundings is fp32. program_table.py says
what an entry does; edits are those of Turner et al. 2023 (add), Arditi et al. 2024 (project out), Wu et al. 2024
(LOW_RANK: ReFT), Vu & Nguyen 2025 (rotate), with conditions as in Lee et al. 2024 (CAST).

One program instance takes one row and keeps it in registers: x and delta are read once, x and out written once, so the
bound is 8 bytes for each element in bf16 with delta and norm, and 2 more for each vector that an edit of the row reads.
The entries are walked by an ordinary loop over scalars, so a row pays for the entries of its own program and none for
the programs of others; a row without entries loads its slot and two bounds. There is one kernel for all kinds: which
programs meet in a step never makes a launch or a variant of its own.

A row without a program, or in the scope of none of its items, keeps the bits it has without any program: nothing is
multiplied by a strength of 0 or added as a zero, and multiply-adds are fused in no variant. For rows without edits two
calls, one with the delta and one with the norm, give the bits of the fused one.

Neurons are edited by way of the row of x in memory, rounded to its dtype. A latched gate sees its own row's condition
in the same launch, and other rows' conditions of earlier launches only.
"""

from patchclamp_kernels.residual_edits.kernel import compile_cases, edit_rows, residual_edits, tuning_cases
from patchclamp_kernels.residual_edits.reference import (
    NormParams,
    Places,
    ProgramStep,
    residual_edits_reference,
)

__all__ = [
    "NormParams",
    "Places",
    "ProgramStep",
    "compile_cases",
    "edit_rows",
    "residual_edits",
    "residual_edits_reference",
    "tuning_cases",
]

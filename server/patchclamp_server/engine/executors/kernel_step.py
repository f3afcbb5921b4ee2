"""Puts a step on the device as the kernels take it: arrays of the batch and of its programs."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from patchclamp_kernels.paged_attention import RaggedBatch
from patchclamp_kernels.program_table import ProgramRows
from patchclamp_kernels.receipts import accumulate_receipts
from patchclamp_server.engine.batch import StepBatch
from patchclamp_server.interventions.kernel_plan import KernelPlan
from patchclamp_server.interventions.slots import SlotTables
from patchclamp_server.model.attention.peaks import Peaks
from patchclamp_server.model.attention.pools import Pool
from patchclamp_server.model.decoder import BlockProducts
from patchclamp_server.model.kernel_forward import KernelForward, KernelInputs, Programs
from patchclamp_server.model.sites import Site
from patchclamp_server.model.spec import DecoderSpec


def step_arrays(batch: StepBatch, plan: KernelPlan) -> dict[str, np.ndarray]:
    """Returns arrays by name: [T] token_ids, positions, slots, slot, mask [T, words], counted; spans [S, 2], counters
    [S, items]."""
    return {
        "token_ids": batch.token_ids,
        "positions": batch.positions,
        "slots": batch.slots,
        "slot": plan.slot,
        "mask": plan.mask,
        "counted": plan.counted,
        "spans": plan.spans,
        "counters": plan.counters,
    }


def program_rows(arrays: Mapping[str, Tensor], *, columns: int, items: int, readings: int) -> ProgramRows:
    """Returns rows with room for what the kernels write: at least one number a row, so that no pointer is null."""
    slot = arrays["slot"]
    rows, device = len(slot), slot.device
    return ProgramRows(
        slot=slot,
        mask=arrays["mask"],
        position=arrays["positions"],
        counted=arrays["counted"],
        opened=torch.zeros((rows, max(columns, 1)), dtype=torch.int32, device=device),
        receipts=torch.zeros((rows, items, 2), dtype=torch.float32, device=device),
        readings=torch.zeros((rows, max(readings, 1)), dtype=torch.float32, device=device),
    )


def banks_of(tables: SlotTables, spec: DecoderSpec, *, neurons: bool) -> dict[int, Tensor]:
    """Returns the banks of the widths that kernels take vectors of; that of the neurons is large and seldom needed."""
    widths = {spec.d_model, spec.sites[Site.ATTN_Z], spec.head_dim}
    if neurons:
        widths.add(spec.d_ff)
    return {width: tables.bank(width).data for width in sorted(widths)}


def programs_of(tables: SlotTables, spec: DecoderSpec, rows: ProgramRows, plan: KernelPlan) -> Programs:
    return Programs(
        tables.table,
        rows,
        banks_of(tables, spec, neurons=plan.neuron_rows or plan.preactivations),
        spec.head_dim,
        attn_q=plan.attn_q,
        attn_z=plan.attn_z,
        neurons=plan.neurons,
        neuron_rows=plan.neuron_rows,
        preactivations=plan.preactivations,
        most_neuron_entries=plan.most_neuron_entries,
        breaks=plan.breaks,
        observers=plan.observers,
    )


def kernel_inputs(
    arrays: Mapping[str, Tensor], attention: RaggedBatch, programs: Programs, peaks: Peaks | None
) -> KernelInputs:
    return KernelInputs(arrays["token_ids"], arrays["positions"], arrays["slots"], attention, programs, peaks)


def all_peaks(spec: DecoderSpec, rows: int, device: torch.device) -> Peaks:
    """Returns the peaks of all rows at all layers."""
    return Peaks(dict.fromkeys(range(spec.n_layers), np.arange(rows)), rows, spec.n_heads, device)


def run_step(
    forward: KernelForward,
    tables: SlotTables,
    pools: list[Pool],
    inputs: KernelInputs,
    arrays: Mapping[str, Tensor],
    products: Sequence[BlockProducts] | None = None,
) -> tuple[Tensor, Tensor]:
    """Returns the residual stream and its final norm [T, d_model]; adds the step to the receipts."""
    x, normed = forward(inputs, pools, products)
    accumulate_receipts(tables.counts, inputs.programs.rows.receipts, arrays["spans"], arrays["counters"])
    return x, normed

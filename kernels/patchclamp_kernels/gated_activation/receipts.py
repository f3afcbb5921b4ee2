"""This op makes receipts of neuron edits from the sums that `gated_activation` left.

    receipts[t, item] += (1, |Δ|₂ / |h|₂)    for every NEURONS entry of the item that ran at row t, over all places

|h|² and |Δ|² are summed over the tiles of a row. One launch serves all places of a step (with one `partial` for each),
because a launch after each layer would cost more than the edits. An instance owns a row and a block of items, and reads
many places at once; sums have a fixed order, so that receipts are the same bits in every run. Only latency bounds it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from patchclamp_kernels.cases import CompileCase
from patchclamp_kernels.configs import Config, config_for
from patchclamp_kernels.gated_activation.activation import _ITEM, _KIND, _NEURONS
from patchclamp_kernels.program_table import ITEM, KIND, EntryKind, ProgramRows, ProgramTable
from patchclamp_kernels.runtime import check, check_tensor, uses_kernel

DEFAULT = Config({"BLOCK_PLACES": 16, "BLOCK_ITEMS": 32}, num_warps=4, num_stages=1)
# |h| of a row of zeros.
TINY = torch.finfo(torch.float32).tiny
_TINY = tl.constexpr(TINY)


def neuron_receipts_reference(table: ProgramTable, rows: ProgramRows, places: Tensor, partial: Tensor) -> None:
    for t, slot in enumerate(rows.slot.tolist()):
        if slot < 0 or not rows.counted[t]:
            continue
        for p, place in enumerate(places.tolist()):
            first, end = table.entries[slot, place : place + 2].tolist()
            for e in range(first, end):
                squares, change = partial[p, t, :, e - first].sum(0)
                if table.ints[e, KIND] == EntryKind.NEURONS and change >= 0:
                    receipt = rows.receipts[t, table.ints[e, ITEM]]
                    receipt[0] += 1
                    receipt[1] += change.sqrt() / squares.sqrt().clamp_min(TINY)


@triton.jit(
    do_not_specialize=["n_places", "places_of_slot", "items", "partial_rows", "tiles", "max_entries"],
    do_not_specialize_on_alignment=["slot", "counted", "receipts", "places", "partial"],
)
def _neuron_receipts_kernel(
    entries,
    ints,
    slot,
    counted,
    receipts,
    places,
    partial,
    n_places,
    places_of_slot,
    items,
    partial_rows,
    tiles,
    max_entries,
    BLOCK_PLACES: tl.constexpr,
    BLOCK_ITEMS: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    item = tl.program_id(1) * BLOCK_ITEMS + tl.arange(0, BLOCK_ITEMS)
    program = tl.load(slot + row)
    if (program >= 0) & (tl.load(counted + row) != 0):
        tile = tl.arange(0, BLOCK_TILES)[None, :]
        ran = tl.zeros([BLOCK_ITEMS], tl.float32)
        relative = tl.zeros([BLOCK_ITEMS], tl.float32)
        p = 0
        while p < n_places:
            index = p + tl.arange(0, BLOCK_PLACES)
            place = tl.load(places + index, mask=index < n_places, other=0)
            bounds = entries + program * places_of_slot + place
            first = tl.load(bounds, mask=index < n_places, other=0)
            end = tl.load(bounds + 1, mask=index < n_places, other=0)
            at_place = (index * partial_rows + row) * tiles
            most = tl.max(end - first)
            j = 0
            while j < most:
                e = first + j
                kind = tl.load(ints + e * 8 + _KIND, mask=e < end, other=-1)
                owner = tl.load(ints + e * 8 + _ITEM, mask=e < end, other=-1)
                sums = partial + ((at_place[:, None] + tile) * max_entries + j) * 2
                wanted = (kind == _NEURONS)[:, None] & (tile < tiles)
                squares = tl.sum(tl.load(sums, mask=wanted, other=0.0), 1)
                change = tl.sum(tl.load(sums + 1, mask=wanted, other=0.0), 1)
                share = tl.sqrt(tl.maximum(change, 0.0)) / tl.maximum(tl.sqrt(squares), _TINY)
                # -1 in every tile marks an entry that did not run.
                counts = (kind == _NEURONS) & ~(change < 0.0)
                mine = counts[:, None] & (owner[:, None] == item[None, :])
                ran += tl.sum(mine.to(tl.float32), 0)
                relative += tl.sum(tl.where(mine, share[:, None], 0.0), 0)
                j += 1
            p += BLOCK_PLACES
        receipt = receipts + (row * items + item) * 2
        there = item < items
        tl.store(receipt, tl.load(receipt, mask=there, other=0.0) + ran, mask=there)
        tl.store(receipt + 1, tl.load(receipt + 1, mask=there, other=0.0) + relative, mask=there)


def neuron_receipts(
    table: ProgramTable, rows: ProgramRows, places: Tensor, partial: Tensor, *, config: Config | None = None
) -> None:
    """Adds to `rows.receipts` what `gated_activation` did with programs at `places` (int32 [P], each once).

    partial [P, T or more, tiles, max_entries, 2]: partial[p] was given to it at places[p]. Raises ValueError for a
    wrong argument.
    """
    device, n_rows = partial.device, rows.slot.shape[0]
    int32, float32 = torch.int32, torch.float32
    check_tensor("places", places, shape=(None,), dtypes=(int32,), device=device)
    check_tensor("partial", partial, shape=(len(places), None, None, None, 2), dtypes=(float32,), device=device)
    check(partial.shape[1] >= n_rows, f"partial has {partial.shape[1]} rows, fewer than {n_rows}")
    tensors: list[tuple[str, Tensor, tuple[int | None, ...], torch.dtype]] = [
        ("table.entries", table.entries, (None, None), int32),
        ("table.ints", table.ints, (None, 8), int32),
        ("rows.slot", rows.slot, (n_rows,), int32),
        ("rows.counted", rows.counted, (n_rows,), int32),
        ("rows.receipts", rows.receipts, (n_rows, None, 2), float32),
    ]
    for name, x, shape, dtype in tensors:
        check_tensor(name, x, shape=shape, dtypes=(dtype,), device=device)
    items = rows.receipts.shape[1]
    if not uses_kernel(partial):
        neuron_receipts_reference(table, rows, places, partial)
        return
    if n_rows == 0 or items == 0 or len(places) == 0:
        return
    config = config or config_for("neuron_receipts", "", DEFAULT, device)
    _neuron_receipts_kernel[(n_rows, triton.cdiv(items, config.blocks["BLOCK_ITEMS"]))](
        table.entries,
        table.ints,
        rows.slot,
        rows.counted,
        rows.receipts,
        places,
        partial,
        len(places),
        table.entries.shape[1],
        items,
        partial.shape[1],
        partial.shape[2],
        partial.shape[3],
        BLOCK_TILES=triton.next_power_of_2(partial.shape[2]),
        **config.blocks,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )


def compile_cases() -> list[CompileCase]:
    signature = {
        **dict.fromkeys(("entries", "ints", "slot", "counted", "places"), "*i32"),
        **dict.fromkeys(("receipts", "partial"), "*fp32"),
        **dict.fromkeys(("n_places", "places_of_slot", "items", "partial_rows", "tiles", "max_entries"), "i32"),
    }
    return [
        CompileCase(
            f"neuron_receipts d_ff={d_ff}",
            _neuron_receipts_kernel,
            signature,
            {**DEFAULT.blocks, "BLOCK_TILES": tiles},
            DEFAULT,
            vector_bytes=0,
        )
        for d_ff, tiles in ((14336, 16), (6144, 8))
    ]

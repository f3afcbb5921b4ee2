"""A batch tells `paged_attention` what to compute, and Attended is what it gives back."""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

TILE_ROWS = 128


@dataclass(frozen=True, eq=False)
class RaggedBatch:
    """Describes T rows of S sequences; consecutive rows of a sequence are consecutive tokens.

    The first `n_single` sequences have one row each, rows 0 to n_single - 1, which the decode kernel computes; `tiles`
    sends the rows of the others to the prefill kernel. `context_lengths` counts the keys of a sequence after this
    step, its new rows included: row i of n stands at position context - n + i. A context of 0 is a sequence that only
    pads the batch: its outputs are 0, and its argmax -1.

    In a CUDA graph the tensors are static buffers, and `max_context` is the bound for which the graph was captured:
    it sets how many programs share a context, and the lengths themselves are read on the device.
    """

    block_tables: Tensor  # int32 [S, max_blocks]: entries past a context are not read
    query_starts: Tensor  # int32 [S + 1]
    context_lengths: Tensor  # int32 [S]
    n_single: int
    tiles: (
        Tensor  # int32 [n_tiles, 2]: sequence, and the first of up to `tile_rows` of its rows, counted from its own 0
    )
    max_context: int
    block_size: int
    tile_rows: int = TILE_ROWS

    @classmethod
    def build(
        cls,
        spans: Sequence[tuple[int, int, Sequence[int]]],
        block_size: int,
        device: torch.device,
        tile_rows: int = TILE_ROWS,
    ) -> Self:
        """Builds a batch with one copy to the device; `spans` are (rows, position of the first, block ids) in order.

        Raises ValueError when a span has more tokens than its blocks hold.
        """
        contexts = [offset + rows for rows, offset, _ in spans]
        widths = [-(-context // block_size) for context in contexts]
        width = max(widths, default=0)
        for i, ((_, _, blocks), used) in enumerate(zip(spans, widths, strict=True)):
            if len(blocks) < used:
                raise ValueError(f"spans[{i}] has {contexts[i]} tokens in {len(blocks)} blocks of {block_size}")
        n_single = next((i for i, (rows, _, _) in enumerate(spans) if rows != 1), len(spans))
        table, starts, tiles = array("i"), array("i", [0]), array("i")
        for i, ((rows, _, blocks), used) in enumerate(zip(spans, widths, strict=True)):
            table.extend(blocks[:used])
            table.extend([0] * (width - used))
            starts.append(starts[-1] + rows)
            if i >= n_single:
                for first in range(0, rows, tile_rows):
                    tiles.extend((i, first))
        # Every part begins at 16 bytes: Triton compiles a kernel anew for a pointer that is aligned differently.
        packed, places = array("i"), []
        for part in (table, starts, array("i", contexts), tiles):
            places.append((len(packed), len(part)))
            packed.extend(part)
            packed.extend([0] * (-len(packed) % 4))
        on_device = torch.frombuffer(packed, dtype=torch.int32).to(device)
        of_table, of_starts, of_contexts, of_tiles = (on_device[first : first + n] for first, n in places)
        return cls(
            block_tables=of_table.view(len(spans), width),
            query_starts=of_starts,
            context_lengths=of_contexts,
            n_single=n_single,
            tiles=of_tiles.view(-1, 2),
            max_context=max(contexts, default=0),
            block_size=block_size,
            tile_rows=tile_rows,
        )


@dataclass(frozen=True, eq=False)
class Streaming:
    """The heads marked in `heads` see only the first `sink` and the last `recent` keys (StreamingLLM, Xiao et al.
    2023; DuoAttention, Xiao et al. 2024). Their own key is one of the recent ones: recent ≥ 1."""

    heads: Tensor  # bool or int32 [H]
    sink: int
    recent: int


@dataclass(frozen=True, eq=False)
class Attended:
    """The outputs of T rows; those that were not asked for are None."""

    z: Tensor  # [T, H * D]
    argmax: Tensor | None = None  # int32 [T, H]: position of the key with the largest weight, the first of equals
    probability: Tensor | None = None  # float32 [T, H]: its weight
    marked_mass: Tensor | None = None  # float32 [T, H]: the weight on the keys of the row's marked span
    off_sink: Tensor | None = None  # float32 [T, H]: the largest weight on a key of a position above 0

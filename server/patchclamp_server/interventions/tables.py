"""Device tables that live across steps: the vectors of all running programs, their receipt counters and latches.

A program is written into the tables once, when its request is admitted. From then on a step names rows.
"""

from collections import defaultdict
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from patchclamp_server.interventions.bound import BoundProgram, Kind
from patchclamp_server.model.arrays import IntArray

NEVER = torch.iinfo(torch.int64).max
FloatArray = np.ndarray
# Row of every bank that is always zero; pads what is shorter than the longest of its kind.
ZERO_ROW = 0


class VectorBank:
    """Vectors of one width, [capacity, width]."""

    def __init__(self, width: int, dtype: torch.dtype, device: torch.device, capacity: int) -> None:
        self.data = torch.zeros((capacity, width), dtype=dtype, device=device)
        self._free = list(range(capacity - 1, ZERO_ROW, -1))

    def store(self, vectors: Tensor) -> list[int]:  # [n, width]
        while len(self._free) < len(vectors):
            old = len(self.data)
            self.data = torch.cat((self.data, torch.zeros_like(self.data)))
            self._free.extend(range(2 * old - 1, old - 1, -1))
        # They are taken once they are written: a write that fails takes none.
        rows = self._free[len(self._free) - len(vectors) :][::-1]
        self.data[rows] = vectors.to(self.data)
        del self._free[len(self._free) - len(vectors) :]
        return rows

    def release(self, rows: list[int]) -> None:
        self._free.extend(rows)

    @property
    def n_held(self) -> int:
        return len(self.data) - 1 - len(self._free)


@dataclass(frozen=True)
class EditRows:
    """Where the numbers of one edit at one layer are.

    `rows`: bank rows: the vector; R then W of a low-rank edit; the offsets of a head edit. `numbers`: what is not a
    vector, on the host: (bias,) of a low-rank edit, (index, factor, offset, low, high) of neurons, (index, factor) of
    heads.
    """

    rows: IntArray
    numbers: tuple[np.ndarray, ...] = ()


@dataclass(eq=False)
class LoadedProgram:
    """Rows of a program in the tables. `edits[i]` and `readouts[i]` are by layer."""

    # One row of counters and latches for each edit.
    counters: list[int]
    edits: list[dict[int, EditRows]] = field(default_factory=list)
    gates: list[int] = field(default_factory=list)
    aborts: list[int] = field(default_factory=list)
    readouts: list[dict[int, IntArray]] = field(default_factory=list)
    # Everything held in the banks, by width.
    held: dict[int, list[int]] = field(default_factory=dict)


class Tables:
    """Rows are given out at admission and returned at the end."""

    def __init__(
        self, dtype: torch.dtype, device: torch.device, *, capacity: int = 1024, bank_elements: int = 0
    ) -> None:
        """`bank_elements`: room of a bank of vectors from the start; never for less than 256 vectors."""
        self.dtype = dtype
        self.device = device
        self._bank_elements = bank_elements
        self.banks: dict[int, VectorBank] = {}
        # Rows edited, and the sum of |delta| / |h| over them.
        self.counts = torch.zeros((capacity, 2), dtype=torch.float64, device=device)
        # Position at which the latch of the edit fired first.
        self.latch = torch.full((capacity,), NEVER, dtype=torch.int64, device=device)
        self._free = list(range(capacity - 1, -1, -1))

    def bank(self, width: int) -> VectorBank:
        if width not in self.banks:
            rows = max(256, self._bank_elements // width)
            self.banks[width] = VectorBank(width, self.dtype, self.device, rows)
        return self.banks[width]

    # Banks may have been made in inference mode, and can only be written there then.
    @torch.inference_mode()
    def load(self, program: BoundProgram) -> LoadedProgram:
        """Writes a program into the tables: one copy for each width of vector in it. What fails holds nothing."""
        loaded = LoadedProgram(self._acquire(len(program.edits)))
        try:
            self._write(program, loaded)
        except BaseException:
            self.release(loaded)
            raise
        return loaded

    def _write(self, program: BoundProgram, loaded: LoadedProgram) -> None:
        writer = _Writer()
        for edit in program.edits:
            for layer in edit.layers:
                payload = edit.payload[layer]
                if edit.kind is Kind.LOW_RANK:
                    writer.add(torch.cat(payload[:2]))
                elif edit.kind is Kind.HEADS:
                    writer.add(payload[2])
                elif edit.kind is not Kind.NEURONS:
                    writer.add(payload[0][None])
        for edit in program.edits:
            if edit.gate is not None:
                writer.add(edit.gate.unit[None])
        for abort in program.aborts:
            writer.add(abort.condition.unit[None])
        for readout in program.readouts:
            for layer in readout.vectors:
                writer.add(readout.vectors[layer])
        for width, vectors in writer.vectors.items():
            loaded.held[width] = self.bank(width).store(torch.cat(vectors))
        places = {width: iter(rows) for width, rows in loaded.held.items()}

        def take(n: int, width: int) -> IntArray:
            return np.array([next(places[width]) for _ in range(n)], dtype=np.int64)

        for edit in program.edits:
            own = {}
            for layer in edit.layers:
                payload = edit.payload[layer]
                if edit.kind is Kind.LOW_RANK:
                    own[layer] = EditRows(take(2 * len(payload[0]), payload[0].shape[1]), (payload[2].numpy(),))
                elif edit.kind is Kind.HEADS:
                    numbers = (payload[0].numpy(), payload[1].numpy())
                    own[layer] = EditRows(take(len(payload[0]), payload[2].shape[1]), numbers)
                elif edit.kind is Kind.NEURONS:
                    own[layer] = EditRows(np.empty(0, dtype=np.int64), tuple(t.numpy() for t in payload))
                else:
                    own[layer] = EditRows(take(1, len(payload[0])))
            loaded.edits.append(own)
        for edit in program.edits:
            loaded.gates.append(ZERO_ROW if edit.gate is None else int(take(1, len(edit.gate.unit))[0]))
        for abort in program.aborts:
            loaded.aborts.append(int(take(1, len(abort.condition.unit))[0]))
        for readout in program.readouts:
            loaded.readouts.append({layer: take(*vectors.shape) for layer, vectors in readout.vectors.items()})

    @property
    def n_held(self) -> int:
        """Rows that programs hold: of counters, and of vectors."""
        banks = list(self.banks.values())
        return len(self.counts) - len(self._free) + sum(bank.n_held for bank in banks)

    def release(self, loaded: LoadedProgram) -> None:
        self._free.extend(loaded.counters)
        for width, rows in loaded.held.items():
            self.banks[width].release(rows)

    def read(self, loaded: LoadedProgram) -> np.ndarray:
        """Counts [n_edits, 2] of a program."""
        counts: np.ndarray = self.counts[loaded.counters].cpu().numpy()
        return counts

    def _acquire(self, n: int) -> list[int]:
        while len(self._free) < n:
            old = len(self.counts)
            counts = torch.cat((self.counts, torch.zeros_like(self.counts)))
            # Both or none: their rows are the same.
            self.latch = torch.cat((self.latch, torch.full_like(self.latch, NEVER)))
            self.counts = counts
            self._free.extend(range(2 * old - 1, old - 1, -1))
        if not n:
            return []
        rows = self._free[-n:][::-1]
        self.counts[rows] = 0.0
        self.latch[rows] = NEVER
        del self._free[-n:]
        return rows


class _Writer:
    """Collects vectors by width, in order."""

    def __init__(self) -> None:
        self.vectors: dict[int, list[Tensor]] = defaultdict(list)

    def add(self, vectors: Tensor) -> None:
        self.vectors[vectors.shape[1]].append(vectors)

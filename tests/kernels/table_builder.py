"""Program tables from readable descriptions, for tests of the kernels that read them.

    builder = TableBuilder(width=48, places=2)
    program = builder.program()
    program.add(vector, strength=2.0, place=1)
    step = builder.step(rows=[program, None], dtype=torch.bfloat16)

Items are numbered in the order of description, and so are `opened` and `readings` columns and latches.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from patchclamp_kernels.program_table import NO_GATE, EntryFlag, EntryKind, ProgramRows, ProgramTable
from patchclamp_kernels.residual_edits import ProgramStep

NEVER = torch.iinfo(torch.int64).max


@dataclass(frozen=True)
class Gate:
    """A condition of a program, as edits name it."""

    column: int
    latch: int | None


@dataclass(eq=False)
class Program:
    """One program under construction. Edits return their item; all entries take the `place` at which they run."""

    builder: "TableBuilder"
    slot: int
    entries: list[tuple[int, list[int], list[float]]] = field(default_factory=list)
    items: int = 0

    def add(self, vector: Tensor, strength: float = 1.0, **how: object) -> int:
        return self._vector(EntryKind.ADD, vector, strength, **how)

    def replace(self, vector: Tensor, strength: float = 1.0, **how: object) -> int:
        return self._vector(EntryKind.REPLACE, vector, strength, **how)

    def project(self, unit: Tensor, low: float, high: float, strength: float = 1.0, **how: object) -> int:
        return self._vector(EntryKind.PROJECT, unit, strength, bounds=(low, high), **how)

    def rotate(self, unit: Tensor, radians: float, strength: float = 1.0, **how: object) -> int:
        return self._vector(EntryKind.ROTATE, unit, strength, bounds=(radians, 0.0), **how)

    def low_rank(self, r: Tensor, w: Tensor, bias: Tensor, strength: float = 1.0, **how: object) -> int:
        units = [
            ([self.builder.store(r_), self.builder.store(w_)], [0.0, float(b), 0.0, 0.0])
            for r_, w_, b in zip(r, w, bias, strict=True)
        ]
        return self._units(EntryKind.LOW_RANK, units, strength, **how)

    def affine(self, matrix: Tensor, bias: Tensor, strength: float = 1.0, **how: object) -> int:
        units = [
            ([i, self.builder.store(a)], [0.0, float(b), 0.0, 0.0])
            for i, (a, b) in enumerate(zip(matrix, bias, strict=True))
        ]
        return self._units(EntryKind.AFFINE, units, strength, **how)

    def affine_low_rank(self, left: Tensor, right: Tensor, bias: Tensor, strength: float = 1.0, **how: object) -> int:
        columns = [*zip(left.T, right.T, [0.0] * left.shape[1], strict=True), (bias, torch.zeros_like(bias), 1.0)]
        units = [([self.builder.store(u), self.builder.store(v)], [0.0, b, 0.0, 0.0]) for u, v, b in columns]
        return self._units(EntryKind.AFFINE_LOW_RANK, units, strength, **how)

    def patch(self, rows: dict[int, Tensor], mask: Tensor, strength: float = 1.0, **how: object) -> int:
        units = [
            ([position, self.builder.store(row)], [0.0] * 4)
            for position, row in ((-1, mask), *sorted(rows.items(), key=lambda item: item[0]))
        ]
        return self._units(EntryKind.PATCH, units, strength, **how)

    def patch_subspace(self, rows: dict[int, Tensor], basis: Tensor, strength: float = 1.0, **how: object) -> int:
        """`basis` [rank, width]: rows that are orthonormal."""
        numbered = [*enumerate(basis, -1 - len(basis)), *sorted(rows.items(), key=lambda item: item[0])]
        units = [([place, self.builder.store(row)], [0.0] * 4) for place, row in numbered]
        return self._units(EntryKind.PATCH, units, strength, **how)

    def neurons(
        self,
        neurons: Sequence[int],
        strength: float = 1.0,
        factor: float = 1.0,
        offset: float = 0.0,
        low: float = -torch.inf,
        high: float = torch.inf,
        **how: object,
    ) -> int:
        units = [([neuron, 0], [factor, offset, low, high]) for neuron in neurons]
        return self._units(EntryKind.NEURONS, units, strength, **how)

    def heads(
        self, heads: Sequence[int], offsets: Tensor, strength: float = 1.0, factor: float = 0.0, **how: object
    ) -> int:
        units = [
            ([head, self.builder.store_head(offset)], [factor, 0.0, 0.0, 0.0])
            for head, offset in zip(heads, offsets, strict=True)
        ]
        return self._units(EntryKind.HEADS, units, strength, **how)

    def condition(
        self, unit: Tensor, threshold: float, *, above: bool = True, cosine: bool = False, latched: bool = False,
        place: int = 0,
    ) -> Gate:  # fmt: skip
        gate = Gate(self.builder.new_column("open"), self.builder.new_latch() if latched else None)
        flags = EntryFlag.COSINE * cosine | EntryFlag.LATCHED * latched
        ints = [EntryKind.CONDITION, self._item(), flags, self.builder.store(unit), 0, NO_GATE, gate.latch or 0]
        self.entries.append((place, [*ints, gate.column], [1.0 if above else -1.0, threshold, 0.0, 0.0]))
        return gate

    def features(
        self,
        encoder: Tensor,
        decoder: Tensor,
        bias: Tensor,
        jump: Tensor,
        strength: float = 1.0,
        *,
        factor: float = 0.0,
        offset: float = 0.0,
        low: float = -math.inf,
        high: float = math.inf,
        **how: object,
    ) -> int:
        units = [
            ([self.builder.store(d), self.builder.store(e)], [factor, offset, float(b), float(j)])
            for e, d, b, j in zip(encoder, decoder, bias, jump, strict=True)
        ]
        return self._units(EntryKind.FEATURES, units, strength, bounds=(low, high), **how)

    def feature_values(self, encoder: Tensor, bias: Tensor, jump: Tensor, *, place: int = 0) -> int:
        """Returns the column of the first of the readings."""
        column, item = self.builder.new_column("reading", len(encoder)), self._item()
        for i, (e, b, j) in enumerate(zip(encoder, bias, jump, strict=True)):
            ints = [EntryKind.PROJECTION, item, EntryFlag.FEATURE, self.builder.store(e), 0, NO_GATE, 0, column + i]
            self.entries.append((place, ints, [0.0, 0.0, float(b), float(j)]))
        return column

    def feature_condition(
        self, encoder: Tensor, bias: float, jump: float, threshold: float, *, above: bool = True, place: int = 0
    ) -> Gate:
        gate = Gate(self.builder.new_column("open"), None)
        ints = [EntryKind.CONDITION, self._item(), EntryFlag.FEATURE, self.builder.store(encoder), 0, NO_GATE, 0]
        self.entries.append((place, [*ints, gate.column], [1.0 if above else -1.0, threshold, bias, jump]))
        return gate

    def projection(self, vector: Tensor, *, place: int = 0) -> int:
        """Returns the column of the reading."""
        column = self.builder.new_column("reading")
        ints = [EntryKind.PROJECTION, self._item(), 0, self.builder.store(vector), 0, NO_GATE, 0, column]
        self.entries.append((place, ints, [0.0] * 4))
        return column

    def neuron_values(self, neurons: Sequence[int], *, place: int = 0) -> int:
        """Returns the column of the first of the readings."""
        column = self.builder.new_column("reading", len(neurons))
        first = self.builder.store_units([([neuron, 0], [0.0] * 4) for neuron in neurons])
        ints = [EntryKind.NEURON_VALUES, self._item(), 0, first, len(neurons), NO_GATE, 0, column]
        self.entries.append((place, ints, [0.0] * 4))
        return column

    def skip_items(self, n: int) -> None:
        """Leaves numbers of items unused, to reach those beyond the first word of a mask."""
        self.items += n

    def _vector(self, kind: EntryKind, vector: Tensor, strength: float, **how: object) -> int:
        return self._edit(kind, self.builder.store(vector), 0, strength, **how)

    def _units(
        self, kind: EntryKind, units: list[tuple[list[int], list[float]]], strength: float, **how: object
    ) -> int:
        return self._edit(kind, self.builder.store_units(units), len(units), strength, **how)

    def _edit(
        self,
        kind: EntryKind,
        first: int,
        count: int,
        strength: float,
        *,
        place: int = 0,
        gate: Gate | None = None,
        preserve_norm: bool = False,
        bounds: tuple[float, float] = (0.0, 0.0),
    ) -> int:
        latched = gate is not None and gate.latch is not None
        flags = EntryFlag.PRESERVE_NORM * preserve_norm | EntryFlag.LATCHED * latched
        item = self._item()
        column, latch = (NO_GATE, 0) if gate is None else (gate.column, gate.latch or 0)
        self.entries.append((place, [kind, item, flags, first, count, column, latch, 0], [strength, *bounds, 0.0]))
        return item

    def _item(self) -> int:
        self.items += 1
        return self.items - 1


class TableBuilder:
    def __init__(self, width: int, places: int = 1, head_dim: int = 0) -> None:
        self.width, self.places, self.head_dim = width, places, head_dim
        self.programs: list[Program] = []
        self.vectors: list[Tensor] = [torch.zeros(width)]
        self.head_vectors: list[Tensor] = []
        self.units: list[tuple[list[int], list[float]]] = []
        self.latches = 0
        self.columns = {"open": 0, "reading": 0}

    def program(self) -> Program:
        self.programs.append(Program(self, len(self.programs)))
        return self.programs[-1]

    def store(self, vector: Tensor) -> int:
        self.vectors.append(vector)
        return len(self.vectors) - 1

    def store_head(self, vector: Tensor) -> int:
        self.head_vectors.append(vector)
        return len(self.head_vectors) - 1

    def store_units(self, units: list[tuple[list[int], list[float]]]) -> int:
        self.units += units
        return len(self.units) - len(units)

    def new_latch(self) -> int:
        self.latches += 1
        return self.latches - 1

    def new_column(self, of: str, n: int = 1) -> int:
        self.columns[of] += n
        return self.columns[of] - n

    def step(
        self,
        rows: Sequence[Program | None],
        dtype: torch.dtype = torch.float32,
        *,
        out_of_scope: Sequence[tuple[int, int]] = (),
        position: Sequence[int] | None = None,
        counted: Sequence[int] | None = None,
    ) -> ProgramStep:
        """A batch whose row t runs `rows[t]`, in scope of all its items but the (row, item) of `out_of_scope`."""
        t, items = len(rows), max([1, *(program.items for program in self.programs)])
        masks = torch.zeros(t, -(-items // 64), dtype=torch.int64)
        for row, program in enumerate(rows):
            for item in range(program.items if program is not None else 0):
                if (row, item) not in out_of_scope:
                    # The sign bit is an item as well.
                    masks[row, item // 64] |= (1 << item % 64) - ((item % 64 == 63) << 64)
        slots = [-1 if program is None else program.slot for program in rows]
        head_bank = torch.stack(self.head_vectors).to(dtype) if self.head_vectors else None
        return ProgramStep(
            self._table(),
            ProgramRows(
                slot=torch.tensor(slots, dtype=torch.int32),
                mask=masks,
                position=torch.tensor(range(t) if position is None else position, dtype=torch.int64),
                counted=torch.tensor([1] * t if counted is None else counted, dtype=torch.int32),
                opened=torch.full((t, max(1, self.columns["open"])), 7, dtype=torch.int32),
                receipts=torch.zeros(t, items, 2),
                readings=torch.full((t, max(1, self.columns["reading"])), torch.nan),
            ),
            torch.stack(self.vectors).to(dtype),
            head_bank,
            self.head_dim if head_bank is not None else 0,
        )

    def _table(self) -> ProgramTable:
        bounds, ints, floats = [], [], []
        for program in self.programs:
            start = len(ints)
            ordered = sorted(program.entries, key=lambda entry: entry[0])
            bounds.append([start + sum(place < p for place, _, _ in ordered) for p in range(self.places + 1)])
            ints += [entry for _, entry, _ in ordered]
            floats += [numbers for _, _, numbers in ordered]
        i32, f32 = torch.int32, torch.float32
        return ProgramTable(
            torch.tensor(bounds, dtype=i32).reshape(-1, self.places + 1),
            torch.tensor(ints, dtype=i32).reshape(-1, 8),
            torch.tensor(floats, dtype=f32).reshape(-1, 4),
            torch.tensor([unit for unit, _ in self.units], dtype=i32).reshape(-1, 2),
            torch.tensor([numbers for _, numbers in self.units], dtype=f32).reshape(-1, 4),
            torch.full((max(1, self.latches),), NEVER, dtype=torch.int64),
        )


def copied(step: ProgramStep, dtype: torch.dtype | None = None) -> ProgramStep:
    """The same step with memory of its own, and its vectors in `dtype`."""
    dtype = dtype or step.bank.dtype
    table = ProgramTable(**{name: tensor.clone() for name, tensor in vars(step.table).items()})
    rows = ProgramRows(**{name: tensor.clone() for name, tensor in vars(step.rows).items()})
    head_bank = None if step.head_bank is None else step.head_bank.to(dtype)
    return replace(step, table=table, rows=rows, bank=step.bank.to(dtype), head_bank=head_bank)

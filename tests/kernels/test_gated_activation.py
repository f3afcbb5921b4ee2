"""Activations of an MLP, edits and readings of single neurons, their receipts, and statistics of watched ones."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from guards import Guarded, guard
from torch import Tensor

from patchclamp_kernels.configs import Config
from patchclamp_kernels.gated_activation import (
    NeuronProgram,
    compile_cases,
    gated_activation,
    gated_activation_reference,
    neuron_receipts,
    neuron_receipts_reference,
    neuron_statistics,
    neuron_statistics_reference,
    neuron_tiles,
    tuning_cases,
)
from patchclamp_kernels.program_table import NO_GATE, EntryFlag, EntryKind, ProgramRows, ProgramTable
from patchclamp_kernels.runtime import reference_only

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")
# Several tiles and several chunks of units at small shapes.
SMALL = Config({"BLOCK": 64, "CHUNK": 16}, num_warps=4, num_stages=1)
D_FF = 200
NEVER = torch.iinfo(torch.int64).max
INF = float("inf")


# Programs


@dataclass(frozen=True)
class Entry:
    item: int
    units: list[int]
    numbers: list[tuple[float, float, float, float]]  # factor, offset, low, high
    kind: EntryKind = EntryKind.NEURONS
    strength: float = 1.0
    gate: int = NO_GATE
    latch: int | None = None
    column: int = 0


def setting(item: int, units: list[int], value: float = 3.0, **more: Any) -> Entry:
    return Entry(item, units, [(0.0, value, -INF, INF)] * len(units), **more)


def changing(item: int, units: list[int], numbers: tuple[float, float, float, float], **more: Any) -> Entry:
    return Entry(item, units, [numbers] * len(units), **more)


def reading(item: int, units: list[int], column: int = 0, **more: Any) -> Entry:
    return Entry(item, units, [(0.0,) * 4] * len(units), kind=EntryKind.NEURON_VALUES, column=column, **more)


@dataclass
class Setup:
    """Programs by slot, each its entries by place, and the rows of a step. Rows have program 0 unless told."""

    programs: list[dict[int, list[Entry]]]
    n_rows: int = 3
    places: int = 2
    slots: list[int] | None = None
    out_of_scope: list[tuple[int, int]] = field(default_factory=list)  # (row, item)
    items: int = 70
    latch: list[int] = field(default_factory=lambda: [NEVER])
    position: list[int] | None = None
    opened: list[list[int]] | None = None
    counted: list[int] | None = None
    columns: int = 40

    def table(self) -> ProgramTable:
        ints, floats, unit_ints, unit_numbers, bounds = [], [], [], [], []
        for program in self.programs:
            row = []
            for place in range(self.places):
                row.append(len(ints))
                for entry in program.get(place, []):
                    flags = EntryFlag.LATCHED if entry.latch is not None else 0
                    first, count = len(unit_ints), len(entry.units)
                    # The latch of an entry without one is no row at all.
                    latch = 10**6 if entry.latch is None else entry.latch
                    ints.append([entry.kind, entry.item, flags, first, count, entry.gate, latch, entry.column])
                    floats.append([entry.strength, 0.0, 0.0, 0.0])
                    unit_ints += [[unit, 0] for unit in entry.units]
                    unit_numbers += entry.numbers
            bounds.append([*row, len(ints)])
        return ProgramTable(
            guard(torch.tensor(bounds, dtype=torch.int32)).tensor,
            guard(torch.tensor(ints, dtype=torch.int32).view(-1, 8)).tensor,
            guard(torch.tensor(floats, dtype=torch.float32).view(-1, 4)).tensor,
            guard(torch.tensor(unit_ints, dtype=torch.int32).view(-1, 2)).tensor,
            guard(torch.tensor(unit_numbers, dtype=torch.float32).view(-1, 4)).tensor,
            guard(torch.tensor(self.latch)).tensor,
        )

    def rows(self) -> ProgramRows:
        n = self.n_rows
        mask = torch.full((n, 2), -1, dtype=torch.int64)
        for row, item in self.out_of_scope:
            mask[row, item // 64] &= ~(1 << item % 64) if item % 64 < 63 else (1 << 63) - 1
        return ProgramRows(
            guard(torch.tensor(self.slots or [0] * n, dtype=torch.int32)).tensor,
            guard(mask).tensor,
            guard(torch.tensor(self.position or [0] * n, dtype=torch.int64)).tensor,
            guard(torch.tensor(self.counted or [1] * n, dtype=torch.int32)).tensor,
            guard(torch.tensor(self.opened or [[1]] * n, dtype=torch.int32).view(n, -1 if n else 1)).tensor,
            guard(torch.zeros(n, self.items, 2)).tensor,
            guard(torch.full((n, self.columns), float("nan"))).tensor,
        )


@dataclass
class Result:
    neurons: Tensor
    readings: Tensor
    partial: Tensor
    receipts: Tensor


def run(
    hidden: Tensor,
    setup: Setup,
    *,
    activation: str = "silu",
    gated: bool = True,
    place: int = 0,
    max_entries: int = 6,
    config: Config = SMALL,
) -> Result:
    """By the kernels, with margins around everything that is written."""
    given = guard(hidden)
    d_ff = hidden.shape[1] // (2 if gated else 1)
    out = Guarded((len(hidden), d_ff), hidden.dtype)
    tiles = neuron_tiles(d_ff, hidden.device, config)
    # More rows than the step has.
    partial = Guarded((1, len(hidden) + 1, tiles, max_entries, 2), torch.float32)
    readings = guard(setup.rows().readings)
    receipts = guard(setup.rows().receipts)
    table, rows = setup.table(), replace(setup.rows(), readings=readings.tensor, receipts=receipts.tensor)
    program = NeuronProgram(table, rows, place, partial.tensor[0])
    returned = gated_activation(
        given.tensor, activation=activation, gated=gated, program=program, out=out.tensor, config=config
    )
    assert returned.data_ptr() == out.tensor.data_ptr()
    assert torch.equal(bits(given.tensor), bits(hidden))
    neuron_receipts(table, rows, torch.tensor([place], dtype=torch.int32), partial.tensor)
    for guarded in (given, out, partial, readings, receipts):
        guarded.assert_margins_intact()
    return Result(out.tensor, readings.tensor, partial.tensor[0], receipts.tensor)


def truth(hidden: Tensor, setup: Setup, *, activation: str = "silu", gated: bool = True, place: int = 0) -> Result:
    """By the references in float64."""
    rows = setup.rows()
    rows = replace(rows, readings=rows.readings.double(), receipts=rows.receipts.double())
    partial = torch.full((1, len(hidden), 1, 6, 2), float("nan"), dtype=torch.float64)
    program = NeuronProgram(setup.table(), rows, place, partial[0])
    neurons = gated_activation_reference(hidden.double(), activation=activation, gated=gated, program=program)
    neuron_receipts_reference(program.table, rows, torch.tensor([place], dtype=torch.int32), partial)
    return Result(neurons, rows.readings, partial[0], rows.receipts)


def random_hidden(rows: int, columns: int = 2 * D_FF, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return (2 * torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))).to(dtype)


def assert_close(got: Tensor, wanted: Tensor, dtype: torch.dtype = torch.float32) -> None:
    scale = max(1.0, float(wanted.nan_to_num().abs().max())) if wanted.numel() else 1.0
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(got.double(), wanted, rtol=tolerance, atol=tolerance * scale, equal_nan=True)


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8)


def plain(hidden: Tensor, activation: str = "silu") -> Tensor:
    return gated_activation(hidden, activation=activation, gated=True, config=SMALL)


# Activation


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_neurons_are_those_of_the_reference(activation: str, gated: bool, dtype: torch.dtype) -> None:
    hidden = guard(random_hidden(3, 2 * D_FF if gated else D_FF, dtype))
    out = Guarded((3, D_FF), dtype)
    gated_activation(hidden.tensor, activation=activation, gated=gated, out=out.tensor, config=SMALL)
    assert_close(
        out.tensor, gated_activation_reference(hidden.tensor.double(), activation=activation, gated=gated), dtype
    )
    out.assert_margins_intact()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_activation_is_rounded_before_the_product_as_torch_does(activation: str) -> None:
    # Not in bfloat16: Triton's interpreter truncates to it where a GPU rounds to nearest.
    hidden = random_hidden(4, dtype=torch.float16)
    gate, up = hidden.chunk(2, dim=1)
    composed = {
        "silu": F.silu,
        "gelu": F.gelu,
        "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
        "relu": F.relu,
    }[activation](gate) * up
    same = (plain(hidden, activation) == composed).float().mean()
    # exp and erf differ in their last bit, which seldom decides a rounding.
    assert same == 1.0 if activation == "relu" else same > 0.98


@pytest.mark.parametrize("columns", [1, 63, 64, 65, 129])
def test_any_width_of_the_last_tile_is_made_whole(columns: int) -> None:
    hidden = guard(random_hidden(2, 2 * columns)).tensor
    out = Guarded((2, columns), torch.float32)
    gated_activation(hidden, activation="silu", gated=True, out=out.tensor, config=SMALL)
    assert_close(out.tensor, gated_activation_reference(hidden.double(), activation="silu", gated=True))
    out.assert_margins_intact()


@pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_large_inputs_saturate_and_nan_stays_nan(activation: str) -> None:
    hidden = torch.tensor([[-1e4, -100.0, -0.0, 0.0, 100.0, 1e4, float("nan")]])
    neurons = gated_activation(hidden, activation=activation, gated=False, config=SMALL)
    assert neurons[0, :6].abs().tolist() == pytest.approx([0, 0, 0, 0, 100, 1e4])
    assert neurons[0, 6].isnan()


def test_no_rows_make_no_neurons() -> None:
    setup = Setup([{0: [setting(0, [1])]}], n_rows=0)
    assert run(random_hidden(0), setup).neurons.shape == (0, D_FF)


def test_the_default_tiles_give_the_bits_of_small_ones() -> None:
    hidden = random_hidden(2, 2 * 1100)
    default = gated_activation(hidden, activation="silu", gated=True)
    assert torch.equal(bits(default), bits(plain(hidden)))


# Edits

EVERYWHERE = [0, 1, 62, 63, 64, 65, 127, 128, 191, 192, 198, 199]  # both sides of each tile, and the last neuron


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    "numbers", [(0.0, 3.0, -INF, INF), (-1.5, 0.0, -INF, INF), (1.0, 0.7, -INF, INF), (1.0, 0.0, -0.2, 0.3)]
)
def test_neurons_are_set_scaled_shifted_and_clamped(
    numbers: tuple[float, float, float, float], dtype: torch.dtype
) -> None:
    hidden = random_hidden(3, dtype=dtype)
    setup = Setup([{0: [changing(0, EVERYWHERE, numbers, strength=0.6)]}])
    got, wanted = run(hidden, setup), truth(hidden, setup)
    assert_close(got.neurons, wanted.neurons, dtype)
    assert not torch.equal(got.neurons, plain(hidden))


def test_only_the_neurons_of_an_entry_change() -> None:
    hidden = random_hidden(3)
    got = run(hidden, Setup([{0: [setting(0, EVERYWHERE)]}])).neurons
    assert (got[:, EVERYWHERE] == 3.0).all()
    rest = [i for i in range(D_FF) if i not in EVERYWHERE]
    assert torch.equal(bits(got[:, rest]), bits(plain(hidden)[:, rest]))


@pytest.mark.parametrize("step", [1, 2, 7])
def test_long_lists_of_neurons_are_found_in_every_tile(step: int) -> None:
    hidden = random_hidden(2)
    units = list(range(1, D_FF, step))
    numbers = [(0.0, float(unit), -INF, INF) for unit in units]
    got = run(hidden, Setup([{0: [Entry(0, units, numbers)]}], n_rows=2)).neurons
    assert got[0, units].tolist() == units
    assert torch.equal(got[:, 0], plain(hidden)[:, 0])


def test_an_entry_without_neurons_changes_nothing() -> None:
    hidden = random_hidden(2)
    got = run(hidden, Setup([{0: [setting(0, []), reading(1, [])]}], n_rows=2))
    assert torch.equal(bits(got.neurons), bits(plain(hidden)))
    assert got.receipts[:, 0].tolist() == [[1.0, 0.0]] * 2


def test_full_strength_gives_the_target_and_none_leaves_the_bits() -> None:
    hidden = random_hidden(3)
    hidden[:, 5] = -200.0  # silu gives -0.0
    everything = list(range(D_FF))
    target = run(hidden, Setup([{0: [setting(0, everything, 0.1)]}])).neurons
    assert (target == torch.tensor(0.1)).all()
    kept = run(hidden, Setup([{0: [setting(0, everything, 0.1, strength=0.0)]}]))
    assert torch.equal(bits(kept.neurons), bits(plain(hidden)))
    assert kept.receipts[:, 0].tolist() == [[1.0, 0.0]] * 3


@pytest.mark.parametrize("strength", [-0.5, 0.3, 0.5, 0.8, 1.7])
def test_strength_interpolates_as_torch_lerp(strength: float) -> None:
    hidden = random_hidden(2)
    got = run(hidden, Setup([{0: [setting(0, [7, 150], strength=strength)]}], n_rows=2)).neurons
    before = plain(hidden)[:, [7, 150]]
    assert_close(got[:, [7, 150]], torch.lerp(before, torch.tensor(3.0), strength).double())


def test_entries_compose_in_order() -> None:
    double = (2.0, 0.0, -INF, INF)
    entries = [setting(0, [7, 150]), changing(1, [7, 190], double), changing(2, [7], (1.0, 1.0, -INF, INF))]
    hidden = random_hidden(2)
    got = run(hidden, Setup([{0: entries}], n_rows=2)).neurons
    assert got[:, 7].tolist() == [7.0, 7.0]
    assert got[:, 150].tolist() == [3.0, 3.0]
    assert torch.equal(got[:, 190], 2 * plain(hidden)[:, 190])


def test_a_nan_neuron_is_not_clamped_into_a_number() -> None:
    hidden = random_hidden(1)
    hidden[0, 9] = float("nan")
    got = run(hidden, Setup([{0: [changing(0, [8, 9], (1.0, 0.0, 0.0, 0.5))]}], n_rows=1)).neurons
    assert got[0, 9].isnan()
    assert 0.0 <= got[0, 8] <= 0.5


def test_rows_without_a_program_keep_their_bits_beside_rows_that_have_one() -> None:
    hidden = random_hidden(5, dtype=torch.bfloat16)
    programs = [{0: [setting(0, EVERYWHERE), reading(1, [3])]}, {1: [setting(0, EVERYWHERE)]}]
    got = run(hidden, Setup(programs, n_rows=5, slots=[-1, 0, -1, 1, 0]))
    for row in (0, 2, 3):
        assert torch.equal(bits(got.neurons[row]), bits(plain(hidden)[row]))
        assert got.readings[row].isnan().all()
        assert got.partial[row].isnan().all()
        assert not got.receipts[row].any()
    assert (got.neurons[[1, 4]][:, EVERYWHERE] == 3.0).all()


def test_each_row_runs_its_own_program_at_the_place() -> None:
    programs = [{0: [setting(0, [7], 1.0)], 1: [setting(0, [7], 2.0)]}, {0: [setting(0, [7], 3.0)], 1: []}]
    programs.append({1: [setting(0, [7], 4.0)]})
    setup = Setup(programs, n_rows=4, slots=[2, 1, 0, -1])
    hidden = random_hidden(4)
    untouched = plain(hidden)[:, 7].tolist()
    assert run(hidden, setup, place=0).neurons[:, 7].tolist() == [untouched[0], 3.0, 1.0, untouched[3]]
    assert run(hidden, setup, place=1).neurons[:, 7].tolist() == [4.0, untouched[1], 2.0, untouched[3]]


@pytest.mark.parametrize("item", [0, 31, 63, 64, 69])
def test_rows_out_of_the_scope_of_an_item_are_left_alone(item: int) -> None:
    hidden = random_hidden(3)
    setup = Setup([{0: [setting(item, [7]), reading(item, [9])]}], out_of_scope=[(1, item)])
    got = run(hidden, setup)
    assert got.neurons[[0, 2], 7].tolist() == [3.0, 3.0]
    assert torch.equal(bits(got.neurons[1]), bits(plain(hidden)[1]))
    assert got.readings[:, 0].isnan().tolist() == [False, True, False]
    assert got.receipts[:, item, 0].tolist() == [1.0, 0.0, 1.0]


def test_a_gate_opens_an_edit_row_by_row() -> None:
    hidden = random_hidden(3)
    setup = Setup([{0: [setting(0, [7], gate=2)]}], opened=[[1, 1, 0], [0, 0, 1], [1, 1, 0]])
    got = run(hidden, setup)
    assert (got.neurons[:, 7] == 3.0).tolist() == [False, True, False]
    assert got.receipts[:, 0, 0].tolist() == [0.0, 1.0, 0.0]


def test_a_latch_is_open_from_its_position_on_whatever_the_gate_says() -> None:
    hidden = random_hidden(4)
    entries = [setting(0, [7], gate=0, latch=1), setting(1, [8], gate=0, latch=0)]
    setup = Setup([{0: entries}], n_rows=4, latch=[NEVER, 11], position=[10, 11, 12, 10], opened=[[0]] * 3 + [[1]])
    got = run(hidden, setup).neurons
    assert (got[:, 7] == 3.0).tolist() == [False, True, True, False]
    assert torch.equal(got[:, 8], plain(hidden)[:, 8])


def test_readings_are_the_neurons_after_all_edits() -> None:
    hidden = random_hidden(2, dtype=torch.bfloat16)
    units = [3, 7, 64, 199]
    entries = [reading(0, units, column=5), setting(1, [7, 64], 0.375)]
    got = run(hidden, Setup([{0: entries}], n_rows=2))
    assert torch.equal(got.readings[:, 5:9], got.neurons[:, units].float())
    assert got.readings[:, 6].tolist() == [0.375] * 2
    got.readings[:, 5:9] = float("nan")
    assert got.readings.isnan().all()


def test_long_readings_cross_tiles_and_chunks() -> None:
    hidden = random_hidden(2)
    units = list(range(0, D_FF, 5))
    got = run(hidden, Setup([{0: [reading(0, units)]}], n_rows=2))
    assert torch.equal(got.readings, got.neurons[:, units])


def test_ungated_neurons_are_edited_too() -> None:
    hidden = random_hidden(3, D_FF)
    setup = Setup([{0: [changing(0, EVERYWHERE, (0.5, 1.0, 0.0, 1.2)), reading(1, [63])]}])
    got = run(hidden, setup, activation="gelu", gated=False)
    wanted = truth(hidden, setup, activation="gelu", gated=False)
    assert_close(got.neurons, wanted.neurons)
    assert_close(got.readings, wanted.readings)


# Receipts


def test_a_receipt_is_the_relative_change_of_the_row() -> None:
    hidden = random_hidden(3)
    got = run(hidden, Setup([{0: [setting(4, EVERYWHERE, strength=0.6)]}]))
    before = plain(hidden).double()
    wanted = (got.neurons.double() - before).norm(dim=1) / before.norm(dim=1)
    assert_close(got.receipts[:, 4], torch.stack((torch.ones(3, dtype=torch.float64), wanted), 1))
    got.receipts[:, 4] = 0.0
    assert not got.receipts.any()


def test_an_entry_is_relative_to_the_row_it_was_given() -> None:
    hidden = random_hidden(3)
    entries = [
        setting(0, [1, 150], 20.0),
        setting(1, [2, 199], 30.0),
        setting(2, [1], 40.0),
        setting(3, [3], 1.0),
    ]
    got = run(hidden, Setup([{0: entries}])).receipts[:, :4, 1]
    a = plain(hidden).double()
    wanted = []
    for entry in entries:
        edited = a.clone()
        edited[:, entry.units] = entry.numbers[0][1]
        wanted.append((edited - a).norm(dim=1) / a.norm(dim=1))
        a = edited
    assert_close(got, torch.stack(wanted, 1))


def test_readings_do_not_count() -> None:
    got = run(random_hidden(2), Setup([{0: [reading(0, [1]), setting(1, [2]), reading(2, [3])]}], n_rows=2))
    assert got.receipts[:, :3, 0].tolist() == [[0.0, 1.0, 0.0]] * 2


def test_rows_that_were_counted_before_are_not_counted_again() -> None:
    hidden = random_hidden(3)
    got = run(hidden, Setup([{0: [setting(0, [7])]}], counted=[1, 0, 1]))
    assert got.neurons[:, 7].tolist() == [3.0] * 3
    assert got.receipts[:, 0, 0].tolist() == [1.0, 0.0, 1.0]


def test_an_edit_of_a_row_of_zeros_has_a_finite_receipt_when_it_changes_nothing() -> None:
    got = run(torch.zeros(1, 2 * D_FF), Setup([{0: [setting(0, [7], 0.0)]}], n_rows=1))
    assert got.receipts[0, 0].tolist() == [1.0, 0.0]


def test_one_launch_sums_the_receipts_of_all_places() -> None:
    # More than one block of places. Item 40 is at all of them, item 0 at every third, twice.
    n = 7
    config = Config({"BLOCK_PLACES": 4, "BLOCK_ITEMS": 32}, num_warps=4, num_stages=1)
    programs: list[dict[int, list[Entry]]] = [
        {
            p: ([setting(0, [1]), setting(0, [2])] if p % 3 == 0 else []) + [setting(40, [p, p + 100], float(p))]
            for p in range(n)
        },
        {4: [setting(2, [9])]},
    ]
    setup = Setup(programs, n_rows=4, places=n + 1, slots=[0, 1, -1, 0], out_of_scope=[(3, 0)])
    table, receipts = setup.table(), guard(torch.full((4, 70, 2), 0.5))
    rows = replace(setup.rows(), receipts=receipts.tensor)
    partial = guard(torch.full((n, 4, neuron_tiles(D_FF, torch.device("cpu"), SMALL), 3, 2), float("nan")))
    wanted = torch.full((4, 70, 2), 0.5, dtype=torch.float64)
    for p in range(n):
        hidden = random_hidden(4, seed=p)
        program = NeuronProgram(table, rows, p, partial.tensor[p])
        gated_activation(hidden, activation="silu", gated=True, program=program, config=SMALL)
        wanted += truth(hidden, setup, place=p).receipts
    places = guard(torch.arange(n, dtype=torch.int32)).tensor
    neuron_receipts(table, rows, places, partial.tensor, config=config)
    assert_close(receipts.tensor, wanted)
    assert (receipts.tensor[0, [0, 40], 0] - 0.5).tolist() == [6.0, 7.0]
    receipts.assert_margins_intact()
    partial.assert_margins_intact()


def test_receipts_of_no_places_are_left_as_they_are() -> None:
    setup = Setup([{0: [setting(0, [1])]}])
    rows = setup.rows()
    neuron_receipts(setup.table(), rows, torch.empty(0, dtype=torch.int32), torch.empty(0, 3, 4, 6, 2))
    assert not rows.receipts.any()


# Determinism, and the whole against float64


def random_setup(seed: int, rows: int, d_ff: int) -> Setup:
    g = torch.Generator().manual_seed(seed)

    def pick(n: int) -> int:
        return int(torch.randint(n, (), generator=g))

    def numbers() -> tuple[float, float, float, float]:
        factor, offset, low, high = torch.randn(4, generator=g).tolist()
        return (factor, offset, -INF, INF) if pick(2) else (factor, offset, min(low, high), max(low, high))

    programs = []
    for _ in range(3):
        entries = []
        for item in range(1 + pick(5)):
            units = sorted(torch.randperm(d_ff, generator=g)[: 1 + pick(min(d_ff, 40))].tolist())
            latch = pick(2) if pick(4) == 0 else None
            more: dict[str, Any] = {"gate": pick(2) - 1, "latch": latch, "column": 0}
            if item and pick(4) == 0:
                entries.append(reading(item, units, **more))
            else:
                each = [numbers() for _ in units]
                strength = (0.0, 0.4, 1.0, -1.3)[pick(4)]
                entries.append(Entry(item, units, each, strength=strength, **more))
        programs.append({0: entries})
    return Setup(
        programs,
        n_rows=rows,
        slots=[pick(4) - 1 for _ in range(rows)],
        out_of_scope=[(row, item) for row in range(rows) for item in range(5) if pick(4) == 0],
        latch=[NEVER, 5],
        position=[pick(10) for _ in range(rows)],
        opened=[[pick(2)] for _ in range(rows)],
        counted=[pick(2) for _ in range(rows)],
    )


@pytest.mark.parametrize("seed", range(12))
def test_random_programs_agree_with_float64(seed: int) -> None:
    dtype = list(TOLERANCE)[seed % 3]
    rows, d_ff = 1 + seed % 5, (64, 100, 200, 130)[seed % 4]
    activation, gated = ACTIVATIONS[seed % 4], seed % 5 != 0
    hidden = random_hidden(rows, d_ff * (2 if gated else 1), dtype, seed)
    setup = random_setup(seed, rows, d_ff)
    got = run(hidden, setup, activation=activation, gated=gated)
    wanted = truth(hidden, setup, activation=activation, gated=gated)
    assert_close(got.neurons, wanted.neurons, dtype)
    assert_close(got.readings, wanted.readings, dtype)
    assert_close(got.receipts, wanted.receipts, dtype)


def test_the_same_batch_twice_gives_the_same_bits() -> None:
    hidden = random_hidden(4, dtype=torch.bfloat16)
    setup = random_setup(3, 4, D_FF)
    first, second = run(hidden, setup), run(hidden, setup)
    for name in ("neurons", "readings", "receipts"):
        assert torch.equal(bits(getattr(first, name)), bits(getattr(second, name)))


def test_a_row_alone_has_the_bits_of_the_row_in_a_batch() -> None:
    hidden = random_hidden(3)
    entries = [setting(0, EVERYWHERE, strength=0.6), reading(1, [7])]
    batch = run(hidden, Setup([{0: entries}]))
    alone = run(hidden[1:2], Setup([{0: entries}], n_rows=1))
    for name in ("neurons", "readings", "receipts"):
        assert torch.equal(bits(getattr(batch, name)[1:2]), bits(getattr(alone, name)))


def test_the_reference_takes_the_same_arguments_and_gives_the_same() -> None:
    hidden, setup = random_hidden(4), random_setup(5, 4, D_FF)
    got = run(hidden, setup)
    with reference_only():
        wanted = run(hidden, setup)
    assert_close(got.neurons, wanted.neurons.double())
    assert_close(got.readings, wanted.readings.double())
    assert_close(got.receipts, wanted.receipts.double())


# Statistics

FEW = Config({"BLOCK_ROWS": 4, "BLOCK_WATCHED": 8}, num_warps=4, num_stages=1)


@dataclass
class Watch:
    watched: Tensor
    thresholds: Tensor
    fired: Tensor
    total: Tensor
    largest: Tensor

    def arguments(self) -> dict[str, Tensor]:
        return vars(self).copy()


def random_watch(n: int, d_ff: int, sums: torch.dtype = torch.float64) -> Watch:
    g = torch.Generator().manual_seed(1)
    return Watch(
        torch.randint(d_ff, (n,), generator=g, dtype=torch.int32),
        torch.randn(n, generator=g),
        torch.randint(1 << 40, (n,), generator=g),
        torch.randn(n, generator=g).to(sums),
        torch.full((n,), -INF),
    )


def observe(neurons: Tensor, watch: Watch, row_mask: Tensor | None, config: Config | None = FEW) -> Watch:
    guarded = {name: guard(x) for name, x in watch.arguments().items()}
    given = {name: g.tensor for name, g in guarded.items()}
    mask = None if row_mask is None else guard(row_mask).tensor
    neuron_statistics(guard(neurons).tensor, row_mask=mask, config=config, **given)
    for g in guarded.values():
        g.assert_margins_intact()
    return Watch(**given)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("masked", [None, torch.int32, torch.bool])
@pytest.mark.parametrize(("rows", "n"), [(1, 1), (9, 19), (4, 8)])
def test_statistics_are_those_of_the_reference(rows: int, n: int, masked: Any, dtype: torch.dtype) -> None:
    neurons = random_hidden(rows, 50, dtype)
    row_mask = None if masked is None else (torch.arange(rows) % 3 != 1).to(masked)
    watch = random_watch(n, 50)
    got = observe(neurons, watch, row_mask)
    wanted = Watch(**{name: x.clone() for name, x in watch.arguments().items()})
    neuron_statistics_reference(neurons.double(), row_mask=row_mask, **wanted.arguments())
    assert torch.equal(got.fired, wanted.fired)
    assert torch.equal(got.largest, wanted.largest)
    assert_close(got.total, wanted.total)


def test_steps_accumulate() -> None:
    neurons, watch = random_hidden(9, 50), random_watch(5, 50)
    whole = observe(neurons, watch, None)
    halves = observe(neurons[4:], observe(neurons[:4], watch, None), None)
    assert torch.equal(whole.fired, halves.fired)
    assert torch.equal(whole.largest, halves.largest)
    assert_close(whole.total, halves.total)


def test_a_step_of_masked_rows_leaves_the_statistics_alone() -> None:
    neurons, watch = torch.full((6, 50), float("nan")), random_watch(5, 50)
    got = observe(neurons, watch, torch.zeros(6, dtype=torch.int32))
    for name, x in watch.arguments().items():
        assert torch.equal(getattr(got, name), x)


def test_a_threshold_that_is_reached_has_not_fired() -> None:
    watch = Watch(torch.tensor([1, 1], dtype=torch.int32), torch.tensor([0.5, 0.4999]), *zeros(2))
    assert observe(torch.full((3, 4), 0.5), watch, None).fired.tolist() == [0, 3]


def zeros(n: int) -> tuple[Tensor, Tensor, Tensor]:
    return torch.zeros(n, dtype=torch.int64), torch.zeros(n), torch.full((n,), -INF)


def test_a_nan_shows_in_total_and_largest_and_does_not_fire() -> None:
    neurons = torch.ones(3, 4)
    neurons[1, 2] = float("nan")
    got = observe(neurons, Watch(torch.tensor([2, 3], dtype=torch.int32), torch.zeros(2), *zeros(2)), None)
    assert got.fired.tolist() == [2, 3]
    assert got.total.isnan().tolist() == got.largest.isnan().tolist() == [True, False]


def test_statistics_of_nothing_are_nothing() -> None:
    watch = random_watch(5, 50)
    assert torch.equal(observe(torch.empty(0, 50), watch, None).total, watch.total)
    observe(random_hidden(3, 50), random_watch(0, 50), None)


def test_statistics_have_the_same_bits_twice_with_the_default_configuration() -> None:
    neurons, watch = random_hidden(150, 50, torch.bfloat16), random_watch(20, 50, torch.float32)
    first, second = observe(neurons, watch, None, None), observe(neurons, watch, None, None)
    assert torch.equal(bits(first.total), bits(second.total))
    assert_close(first.total, watch.total.double() + neurons.double()[:, watch.watched.long()].sum(0))


# Arguments


def program(**changed: Any) -> NeuronProgram:
    setup = Setup([{0: [setting(0, [1])]}])
    table = replace(setup.table(), **{k: v for k, v in changed.items() if k in ProgramTable.__dataclass_fields__})
    rows = replace(setup.rows(), **{k: v for k, v in changed.items() if k in ProgramRows.__dataclass_fields__})
    return NeuronProgram(table, rows, changed.get("place", 0), changed.get("partial", torch.empty(3, 4, 6, 2)))


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("activation", {"activation": "tanh"}),
        ("hidden", {"hidden": torch.zeros(3, 2, 2)}),
        ("hidden", {"hidden": torch.zeros(3, 401)}),
        ("hidden", {"hidden": torch.zeros(3, 400, dtype=torch.float64)}),
        ("hidden", {"hidden": torch.zeros(400, 3).T}),
        ("out", {"out": torch.zeros(3, 201)}),
        ("out", {"out": torch.zeros(3, 200, dtype=torch.float16)}),
        ("program.place", {"program": lambda: program(place=2)}),
        ("program.place", {"program": lambda: program(place=-1)}),
        ("program.partial", {"program": lambda: program(partial=torch.empty(3, 3, 6, 2))}),
        ("program.partial", {"program": lambda: program(partial=torch.empty(2, 4, 6, 2))}),
        ("program.table.ints", {"program": lambda: program(ints=torch.zeros(1, 8))}),
        ("program.table.floats", {"program": lambda: program(floats=torch.zeros(2, 4))}),
        ("program.table.unit_numbers", {"program": lambda: program(unit_numbers=torch.zeros(1, 3))}),
        ("program.rows.slot", {"program": lambda: program(slot=torch.zeros(2, dtype=torch.int32))}),
        ("program.rows.mask", {"program": lambda: program(mask=torch.zeros(3, 1, dtype=torch.int32))}),
        ("program.rows.readings", {"program": lambda: program(readings=torch.zeros(2, 4))}),
    ],
)
def test_wrong_arguments_are_refused_by_name(name: str, changed: dict[str, Any]) -> None:
    arguments = {"hidden": torch.zeros(3, 400), "activation": "silu", "gated": True, "config": SMALL} | changed
    if "program" in arguments:
        arguments["program"] = arguments["program"]()
    with pytest.raises(ValueError, match=f"^{name} "):
        gated_activation(**arguments)


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("places", {"places": torch.zeros(1)}),
        ("partial", {"partial": torch.zeros(2, 3, 4, 6, 2)}),
        ("partial", {"partial": torch.zeros(1, 2, 4, 6, 2)}),
        ("rows.counted", {"counted": torch.zeros(3)}),
        ("rows.receipts", {"receipts": torch.zeros(3, 2)}),
    ],
)
def test_wrong_arguments_of_receipts_are_refused_by_name(name: str, changed: dict[str, Any]) -> None:
    given = {"places": torch.zeros(1, dtype=torch.int32), "partial": torch.zeros(1, 3, 4, 6, 2)} | changed
    valid = program(**{k: v for k, v in given.items() if k not in ("places", "partial")})
    with pytest.raises(ValueError, match=f"^{name} "):
        neuron_receipts(valid.table, valid.rows, given["places"], given["partial"])


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("neurons", torch.zeros(3)),
        ("watched", torch.zeros(2)),
        ("thresholds", torch.zeros(3)),
        ("row_mask", torch.zeros(3)),
        ("fired", torch.zeros(2, dtype=torch.int32)),
        ("total", torch.zeros(2, dtype=torch.float16)),
        ("largest", torch.zeros(2, dtype=torch.float64)),
    ],
)
def test_wrong_arguments_of_statistics_are_refused_by_name(name: str, wrong: Tensor) -> None:
    fired, total, largest = zeros(2)
    arguments: dict[str, Any] = {
        "neurons": torch.zeros(3, 4),
        "watched": torch.zeros(2, dtype=torch.int32),
        "thresholds": torch.zeros(2),
        "row_mask": torch.ones(3, dtype=torch.bool),
        "fired": fired,
        "total": total,
        "largest": largest,
    }
    check: Callable[..., None] = neuron_statistics
    check(**arguments)
    with pytest.raises(ValueError, match=f"^{name} "):
        check(**(arguments | {name: wrong}))


def test_there_are_cases_to_compile_and_to_tune() -> None:
    assert {case.name.split()[0] for case in compile_cases()} == {
        "gated_activation",
        "neuron_receipts",
        "neuron_statistics",
    }
    assert {case.op for case in tuning_cases(torch.device("cpu"))} == {"gated_activation", "neuron_statistics"}

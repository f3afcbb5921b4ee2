"""sparse_mlp: MLPs of sets of neurons, against all neurons in float64 and a mask."""

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from guards import Guarded, guard
from scratch import guarded_scratch
from torch import Tensor

from patchclamp_kernels.configs import Config
from patchclamp_kernels.runtime import reference_only
from patchclamp_kernels.sparse_mlp import (
    NeuronSets,
    quantise,
    sparse_down,
    sparse_down_reference,
    sparse_mlp,
    sparse_mlp_reference,
    sparse_up,
    sparse_up_reference,
)

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
DTYPES = list(TOLERANCE)
# Tiles so small that every loop runs several times and ends within a tile; by whether there is one row.
SMALL_UP = {True: Config({"BLOCK_J": 4, "BLOCK_D": 32, "STAGES": 1}), False: Config({"BLOCK_J": 16, "BLOCK_D": 32})}
SMALL_DOWN = {
    True: Config({"BLOCK_J": 8, "BLOCK_C": 32, "PROGRAMS": 9, "STAGES": 1}),
    False: Config({"BLOCK_J": 16, "BLOCK_C": 32, "PROGRAMS": 9}),
}


@dataclass(frozen=True, eq=False)
class Mlp:
    x: Tensor
    gate_up: Tensor
    down: Tensor

    def to(self, dtype: torch.dtype) -> "Mlp":
        return Mlp(self.x.to(dtype), self.gate_up.to(dtype), self.down.to(dtype))


def mlp(rows: int, d: int, d_ff: int, dtype: torch.dtype = torch.float32, *, gated: bool = True, seed: int = 0) -> Mlp:
    g = torch.Generator().manual_seed(seed)
    up_rows = 2 * d_ff if gated else d_ff
    gate_up = torch.randn(up_rows, d, generator=g) / d**0.5
    down = torch.randn(d_ff, d, generator=g) / d_ff**0.5
    return Mlp(torch.randn(rows, d, generator=g), gate_up, down).to(dtype)


def random_sets(d_ff: int, counts: tuple[int, ...], which: list[int], seed: int = 0) -> NeuronSets:
    """Sets of as many neurons as `counts`, in any order, with as much padding as the largest needs, anywhere."""
    g = torch.Generator().manual_seed(seed)
    index = torch.full((len(counts), max(counts, default=0)), -1, dtype=torch.int32)
    for row, count in zip(index, counts, strict=True):
        places = torch.randperm(len(row), generator=g)[:count]
        row[places] = torch.randperm(d_ff, generator=g)[:count].int()
    return NeuronSets(index, torch.tensor(which, dtype=torch.int32))


def run(m: Mlp, sets: NeuronSets, **how: Any) -> tuple[Tensor, Tensor]:
    """y and h of the kernels, with canaries around everything; rows without a set stay NaN."""
    sets = NeuronSets(guard(sets.index).tensor, guard(sets.which).tensor)
    h = Guarded((m.x.shape[0], sets.index.shape[1]), m.x.dtype)
    y = Guarded(tuple(m.x.shape), m.x.dtype)
    x, gate_up, down = (guard(t).tensor for t in (m.x, m.gate_up, m.down))
    up_how = {name: how[name] for name in ("activation", "gated") if name in how}
    small = how.get("small", True)
    one = len(x) == 1
    with guarded_scratch():
        up_config, down_config = (SMALL_UP[one], SMALL_DOWN[one]) if small else (None, None)
        sparse_up(x, gate_up, sets, bias=how.get("up_bias"), out=h.tensor, config=up_config, **up_how)
        sparse_down(h.tensor, down, sets, bias=how.get("down_bias"), out=y.tensor, config=down_config)
    h.assert_margins_intact()
    y.assert_margins_intact()
    return y.tensor, h.tensor


def truth(m: Mlp, sets: NeuronSets, **how: Any) -> tuple[Tensor, Tensor]:
    m = m.to(torch.float64)
    biases = {name: how.pop(name).double() for name in ("up_bias", "down_bias") if how.get(name) is not None}
    how.pop("small", None)
    h = sparse_up_reference(m.x, m.gate_up, sets, bias=biases.get("up_bias"), **how)
    return sparse_mlp_reference(m.x, m.gate_up, m.down, sets, **biases, **how), h


def assert_close(have: Tensor, want: Tensor, dtype: torch.dtype) -> None:
    limit = TOLERANCE[dtype] * max(1.0, want.abs().max().item() if want.numel() else 0.0)
    torch.testing.assert_close(have.double(), want, rtol=0, atol=limit)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "d", "d_ff", "kept"), [(1, 100, 72, 41), (2, 72, 100, 50), (17, 40, 72, 33)])
def test_the_neurons_of_a_set_and_their_sum_agree_with_float64(
    rows: int, d: int, d_ff: int, kept: int, dtype: torch.dtype
) -> None:
    m = mlp(rows, d, d_ff, dtype)
    sets = random_sets(d_ff, (kept, kept // 2), [b % 2 for b in range(rows)])
    for small in (True, False):
        y, h = run(m, sets, small=small)
        want_y, want_h = truth(m, sets)
        assert_close(h, want_h, dtype)
        assert_close(y, want_y, dtype)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "relu"])
def test_every_activation_gated_or_not_with_biases(activation: str, gated: bool, rows: int) -> None:
    m = mlp(rows, 40, 48, gated=gated)
    up_bias, down_bias = torch.randn(m.gate_up.shape[0]), torch.randn(40)
    sets = random_sets(48, (20, 9), [b % 2 for b in range(rows)])
    how = {"activation": activation, "gated": gated, "up_bias": up_bias, "down_bias": down_bias}
    y, h = run(m, sets, **how)
    want_y, want_h = truth(m, sets, **how)
    assert_close(h, want_h, torch.float32)
    assert_close(y, want_y, torch.float32)


@pytest.mark.parametrize("rows", [1, 5])
def test_a_set_of_all_neurons_is_the_dense_mlp(rows: int) -> None:
    m = mlp(rows, 72, 100)
    sets = NeuronSets(torch.randperm(100).int()[None], torch.zeros(rows, dtype=torch.int32))
    gate, up = F.linear(m.x.double(), m.gate_up.double()).chunk(2, dim=1)
    want = F.linear(F.silu(gate) * up, m.down.double().T)
    assert_close(run(m, sets)[0], want, torch.float32)


@pytest.mark.parametrize("rows", [1, 3])
def test_an_empty_set_gives_the_bias_alone(rows: int) -> None:
    m = mlp(rows, 40, 48)
    bias = torch.randn(40)
    nothing = NeuronSets(torch.empty(1, 0, dtype=torch.int32), torch.zeros(rows, dtype=torch.int32))
    padding = NeuronSets(torch.full((1, 20), -1, dtype=torch.int32), nothing.which)
    for sets in (nothing, padding):
        y, h = run(m, sets, down_bias=bias)
        assert torch.equal(y, bias.expand(rows, 40))
        assert torch.equal(h, torch.zeros_like(h))
        assert torch.equal(run(m, sets)[0], torch.zeros(rows, 40))


@pytest.mark.parametrize("rows", [1, 3])
def test_a_set_of_one_neuron_is_one_row_of_the_down_projection(rows: int) -> None:
    m = mlp(rows, 40, 48)
    sets = NeuronSets(torch.tensor([[47]], dtype=torch.int32), torch.zeros(rows, dtype=torch.int32))
    y, h = run(m, sets)
    want = F.silu(m.x.double() @ m.gate_up[47].double()) * (m.x.double() @ m.gate_up[95].double())
    assert_close(h[:, 0], want, torch.float32)
    assert_close(y, want[:, None] * m.down[47].double(), torch.float32)


@pytest.mark.parametrize("rows", [1, 3])
def test_padding_is_zero_whatever_the_input(rows: int) -> None:
    m = mlp(rows, 40, 48)
    m.x[0, 3] = float("nan")
    sets = random_sets(48, (9, 20), [0] * rows)
    _, h = run(m, sets)
    padding = sets.index[0] < 0
    assert torch.equal(h[:, padding], torch.zeros(rows, 11))
    assert h[0, ~padding].isnan().all()


@pytest.mark.parametrize("rows", [1, 4])
def test_what_is_no_neuron_is_padding_wherever_it_stands(rows: int) -> None:
    m = mlp(rows, 40, 48)
    plain = random_sets(48, (17,), [0] * rows)
    padded = torch.full((1, 37), -1, dtype=torch.int32)
    padded[0, 1::2][:17] = plain.index[0]
    padded[0, 0], padded[0, 36] = 48, 2**31 - 1
    y, h = run(m, NeuronSets(padded, plain.which))
    want_y, want_h = truth(m, plain)
    assert_close(y, want_y, torch.float32)
    assert_close(h[:, 1::2][:, :17], want_h, torch.float32)
    assert torch.equal(h[:, ::2], torch.zeros_like(h[:, ::2]))


def test_every_row_may_have_a_set_of_its_own() -> None:
    m = mlp(5, 40, 48)
    sets = random_sets(48, (20, 5, 0, 17, 1), [4, 1, 0, 2, 3])
    y, h = run(m, sets)
    want_y, want_h = truth(m, sets)
    assert_close(y, want_y, torch.float32)
    assert_close(h, want_h, torch.float32)


@pytest.mark.parametrize("which", [[-1], [1, -1, 0, -1], [2, 0, -7, 1]])
def test_a_row_without_a_set_is_left_alone(which: list[int]) -> None:
    m = mlp(len(which), 40, 48)
    sets = random_sets(48, (20, 5), which)
    y, h = run(m, sets)
    without = torch.tensor([not 0 <= w < 2 for w in which])
    assert y[without].isnan().all()
    assert h[without].isnan().all()
    want_y, want_h = truth(m, sets)
    assert_close(y[~without], want_y[~without], torch.float32)
    assert_close(h[~without], want_h[~without], torch.float32)


def test_a_row_without_a_set_is_zero_where_no_output_is_given() -> None:
    m = mlp(3, 40, 48)
    sets = random_sets(48, (20,), [0, -1, 0])
    y, h = sparse_mlp(m.x, m.gate_up, m.down, sets, return_neurons=True, down_bias=torch.ones(40))
    assert torch.equal(y[1], torch.zeros(40))
    assert torch.equal(h[1], torch.zeros(20))


def test_without_any_set_nothing_is_written() -> None:
    m = mlp(3, 40, 48)
    y, _ = run(m, NeuronSets(torch.empty(0, 4, dtype=torch.int32), torch.zeros(3, dtype=torch.int32)))
    assert y.isnan().all()


@pytest.mark.parametrize("rows", [1, 6])
def test_the_weights_of_inactive_neurons_are_not_used(rows: int) -> None:
    m = mlp(rows, 40, 48)
    sets = random_sets(48, (20, 11), [b % 2 for b in range(rows)])
    want = run(m, sets)
    inactive = torch.ones(48, dtype=torch.bool)
    inactive[sets.index[:1] if rows == 1 else sets.index[sets.index >= 0]] = False
    gate_up, down = m.gate_up.clone(), m.down.clone()
    gate_up[inactive.repeat(2)] = float("nan")
    down[inactive] = float("nan")
    have = run(replace(m, gate_up=gate_up, down=down), sets)
    assert all(torch.equal(a, b) for a, b in zip(have, want, strict=True))


def test_the_sets_of_other_rows_do_not_leak_into_a_row() -> None:
    m = mlp(4, 40, 48)
    index = torch.stack((torch.arange(0, 20), torch.arange(20, 40))).int()
    sets = NeuronSets(index, torch.tensor([0, 1, 0, 1], dtype=torch.int32))
    want, _ = run(m, sets)
    m.down[20:40] = float("nan")
    y, _ = run(m, sets)
    assert torch.equal(y[::2], want[::2])
    assert y[1::2].isnan().all()


def test_at_batch_one_a_neuron_that_is_exactly_zero_is_not_read() -> None:
    m = mlp(1, 40, 48, gated=False)
    sets = random_sets(48, (30,), [0])
    want, h = run(m, sets, gated=False, activation="relu")
    dead = sets.index[0][h[0] == 0].long()
    assert 5 < len(dead) < 25
    m.down[dead] = float("nan")
    assert torch.equal(run(m, sets, gated=False, activation="relu")[0], want)


@pytest.mark.parametrize("rows", [1, 5])
def test_a_neuron_that_is_nan_shows(rows: int) -> None:
    m = mlp(rows, 40, 48)
    sets = random_sets(48, (20,), [0] * rows)
    h = sparse_up(m.x, m.gate_up, sets)
    h[0, 3] = float("nan")
    y = sparse_down(h, m.down, sets)
    assert y[0].isnan().all()
    assert not y[1:].isnan().any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_alone_agrees_with_the_row_in_a_batch(dtype: torch.dtype) -> None:
    m = mlp(3, 40, 48, dtype)
    sets = random_sets(48, (20, 31), [0, 1, 1])
    y, _ = run(m, sets)
    for b in range(3):
        alone, _ = run(replace(m, x=m.x[b : b + 1]), NeuronSets(sets.index, sets.which[b : b + 1]))
        assert_close(alone[0], y[b].double(), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_bits_of_a_row_do_not_depend_on_its_neighbours(dtype: torch.dtype) -> None:
    m = mlp(20, 40, 48, dtype)
    sets = random_sets(48, (20, 31), [b % 2 for b in range(20)])
    y, h = run(m, sets)
    pair = torch.tensor([13, 4])
    few, few_h = run(replace(m, x=m.x[pair]), NeuronSets(sets.index, sets.which[pair]))
    assert torch.equal(few, y[pair])
    assert torch.equal(few_h, h[pair])


@pytest.mark.parametrize("rows", [1, 7])
def test_the_same_batch_twice_has_the_same_bits(rows: int) -> None:
    m = mlp(rows, 40, 48, torch.bfloat16)
    sets = random_sets(48, (40, 31), [b % 2 for b in range(rows)])
    first, second = run(m, sets), run(m, sets)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_an_edit_of_the_neurons_between_the_halves_counts() -> None:
    m = mlp(2, 40, 48)
    sets = random_sets(48, (20,), [0, 0])
    h = sparse_up(m.x, m.gate_up, sets)
    h[1, 7] = 3.0
    want = sparse_down_reference(h.double(), m.down.double(), sets)
    assert_close(sparse_down(h, m.down, sets), want, torch.float32)


def test_a_batch_of_no_rows_is_fine() -> None:
    m = mlp(0, 40, 48)
    y, h = run(m, random_sets(48, (20,), []))
    assert y.shape == (0, 40)
    assert h.shape == (0, 20)


def test_rows_beyond_one_tile_of_the_batch_are_computed() -> None:
    m = mlp(41, 16, 16)
    sets = random_sets(16, (9, 5), [b % 3 - 1 for b in range(41)])
    y, _ = run(m, sets)
    have_set = sets.which >= 0
    assert_close(y[have_set], truth(m, sets)[0][have_set], torch.float32)
    assert y[~have_set].isnan().all()


def test_the_reference_keeps_the_same_contract() -> None:
    m = mlp(4, 40, 48)
    sets = random_sets(48, (20, 7), [0, -1, 1, 0])
    with reference_only():
        y, h = run(m, sets)
    have_y, have_h = run(m, sets)
    torch.testing.assert_close(y, have_y, equal_nan=True, rtol=0, atol=1e-5)
    torch.testing.assert_close(h, have_h, equal_nan=True, rtol=0, atol=1e-5)


@pytest.mark.parametrize("seed", range(12))
def test_random_problems_agree_with_float64(seed: int) -> None:
    g = torch.Generator().manual_seed(seed)

    def pick(*values: Any) -> Any:
        return values[int(torch.randint(len(values), (), generator=g))]

    rows, d, d_ff = pick(1, 1, 2, 16, 19, 32), pick(8, 33, 64, 100), pick(5, 32, 72)
    dtype, gated, activation = pick(*DTYPES), pick(True, False), pick("silu", "gelu", "gelu_tanh", "relu")
    m = mlp(rows, d, d_ff, dtype, gated=gated, seed=seed)
    count = pick(1, 2, 4)
    counts = tuple(int(torch.randint(d_ff + 1, (), generator=g)) for _ in range(count))
    sets = random_sets(d_ff, counts, torch.randint(count, (rows,), generator=g).tolist(), seed)
    how: dict[str, Any] = {"gated": gated, "activation": activation, "small": pick(True, False)}
    if pick(True, False):
        how["up_bias"] = torch.randn(m.gate_up.shape[0], generator=g).to(dtype)
        how["down_bias"] = torch.randn(d, generator=g).to(dtype)
    y, h = run(m, sets, **how)
    want_y, want_h = truth(m, sets, **how)
    assert_close(h, want_h, dtype)
    assert_close(y, want_y, dtype)


BAD: dict[str, tuple[str, Any]] = {
    "x of one dimension": ("x", torch.zeros(40)),
    "x of integers": ("x", torch.zeros(2, 40, dtype=torch.int32)),
    "gate_up of another width": ("gate_up", torch.zeros(96, 41)),
    "gate_up of other neurons": ("gate_up", torch.zeros(94, 40)),
    "gate_up of another dtype": ("gate_up", torch.zeros(96, 40, dtype=torch.float16)),
    "gate_up not contiguous": ("gate_up", torch.zeros(40, 96).T),
    "down of another width": ("down", torch.zeros(48, 41)),
    "down of another dtype": ("down", torch.zeros(48, 40, dtype=torch.float16)),
    "up_bias": ("bias", torch.zeros(95)),
    "down_bias": ("bias", torch.zeros(41)),
    "out": ("out", torch.zeros(2, 41)),
    "activation": ("activation", "swish"),
    "index": ("sets.index", torch.zeros(1, 4, dtype=torch.int64)),
    "which": ("sets.which", torch.zeros(3, dtype=torch.int32)),
}


@pytest.mark.parametrize("what", list(BAD))
def test_a_wrong_argument_is_refused_by_name(what: str) -> None:
    name, value = BAD[what]
    m = mlp(2, 40, 48)
    index, which = torch.zeros(1, 4, dtype=torch.int32), torch.zeros(2, dtype=torch.int32)
    if what in ("index", "which"):
        index, which = (value, which) if what == "index" else (index, value)
    arguments: dict[str, Any] = {"x": m.x, "gate_up": m.gate_up, "down": m.down, "sets": NeuronSets(index, which)}
    if what not in ("index", "which"):
        arguments[what.split()[0]] = value
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        sparse_mlp(**arguments)


def test_a_gated_weight_of_odd_rows_is_refused() -> None:
    sets = random_sets(48, (20,), [0])
    with pytest.raises(ValueError, match="gate_up"):
        sparse_up(torch.zeros(1, 40), torch.zeros(47, 40), sets)


def test_neurons_of_another_number_of_slots_are_refused() -> None:
    sets = random_sets(48, (20,), [0])
    with pytest.raises(ValueError, match="h has shape"):
        sparse_down(torch.zeros(1, 19), torch.zeros(48, 40), sets)


def test_a_configuration_that_cuts_groups_is_refused() -> None:
    sets = random_sets(32, (20,), [0])
    weight = quantise(torch.randn(32, 64), 64)
    with pytest.raises(ValueError, match="BLOCK_C"):
        sparse_down(torch.zeros(1, 20), weight, sets, config=SMALL_DOWN[True])

"""residual_edits: every kind of entry against the definition in float64, and the bits of rows that nothing edits."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from guards import Guarded, guard
from table_builder import NEVER, Program, TableBuilder, copied
from torch import Tensor

from patchclamp_kernels.program_table import ProgramRows
from patchclamp_kernels.residual_edits import (
    NormParams,
    ProgramStep,
    edit_rows,
    residual_edits,
    residual_edits_reference,
)

# Rows of zeros have no direction, which makes numpy warn in the interpreter.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
DTYPES = list(TOLERANCE)
WRITTEN = ("opened", "receipts", "readings")


@dataclass(frozen=True, eq=False)
class Result:
    x: Tensor
    out: Tensor | None
    rows: ProgramRows | None
    latch: Tensor | None


def run(x: Tensor, *, program: ProgramStep | None = None, **how: Any) -> Result:
    """The kernel, with canaries around everything that it may write or read by row."""
    home = guard(x)
    guards = [home]
    if program is not None:
        program = copied(program)
        for tensors in (program.rows, program.table):
            for name, tensor in vars(tensors).items():
                guards.append(guard(tensor))
                object.__setattr__(tensors, name, guards[-1].tensor)
    if how.get("delta") is not None:
        guards.append(guard(how["delta"]))
        how["delta"] = guards[-1].tensor
    out = None
    if how.get("norm") is not None:
        guards.append(Guarded(tuple(x.shape), x.dtype))
        out = how["out"] = guards[-1].tensor
    assert residual_edits(home.tensor, program=program, **how) is out
    for each in guards:
        each.assert_margins_intact()
    return Result(home.tensor, out, program and program.rows, program and program.table.latch)


def truth(x: Tensor, *, program: ProgramStep | None = None, **how: Any) -> Result:
    """The definition in float64."""
    x = x.double()
    if program is not None:
        program = copied(program, torch.float64)
    if how.get("delta") is not None:
        how["delta"] = how["delta"].double()
    out = residual_edits_reference(x, program=program, **how)
    return Result(x, out, program and program.rows, program and program.table.latch)


def assert_agrees(x: Tensor, **how: Any) -> Result:
    got, want = run(x, **how), truth(x, **how)
    assert_close(got.x, want.x, x.dtype)
    if want.out is not None:
        assert_close(got.out, want.out, x.dtype)
    if want.rows is not None:
        assert got.rows.opened.tolist() == want.rows.opened.tolist()
        assert got.latch.tolist() == want.latch.tolist()
        assert torch.equal(got.rows.receipts[..., 0], want.rows.receipts[..., 0])
        assert_close(got.rows.receipts[..., 1], want.rows.receipts[..., 1], x.dtype)
        assert_close(got.rows.readings, want.rows.readings, x.dtype)
    return got


def assert_close(got: Tensor, want: Tensor, dtype: torch.dtype) -> None:
    scale = want.nan_to_num().abs().max().item() if want.numel() else 0.0
    torch.testing.assert_close(
        got.double(), want.double(), rtol=0, atol=TOLERANCE[dtype] * max(scale, 1), equal_nan=True
    )


def bits(x: Tensor | None) -> list[list[int]]:
    assert x is not None
    return x.view({2: torch.int16, 4: torch.int32}[x.element_size()]).tolist()


def unit(d: int, seed: int = 0) -> Tensor:
    v = torch.randn(d, generator=torch.Generator().manual_seed(seed))
    return v / v.norm()


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def rms(d: int, dtype: torch.dtype = torch.float32, seed: int = 2) -> NormParams:
    return NormParams(randn(d, dtype=dtype, seed=seed), None, 1e-5)


def layer(d: int, dtype: torch.dtype = torch.float32, seed: int = 3) -> NormParams:
    return NormParams(randn(d, dtype=dtype, seed=seed), randn(d, dtype=dtype, seed=seed + 1), 1e-5)


def head_dim(d: int) -> int:
    return d // 4


def latents(d: int, n: int = 5) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Encoder, decoder, bias and jump of features, some of which fire."""
    encoder, decoder = randn(n, d, seed=16) / d**0.5, randn(n, d, seed=17) / d**0.5
    return encoder, decoder, randn(n, seed=18), 0.5 * (torch.arange(n) % 2)


VECTOR_EDITS: dict[str, Callable[..., int]] = {
    "add": lambda p, d, **how: p.add(randn(d, seed=5), **how),
    "project": lambda p, d, **how: p.project(unit(d), -0.25, 0.5, **how),
    "replace": lambda p, d, **how: p.replace(randn(d, seed=6), **how),
    "rotate": lambda p, d, **how: p.rotate(unit(d), 0.4, **how),
    "low_rank": lambda p, d, **how: p.low_rank(
        randn(3, d, seed=7) / d**0.5, randn(3, d, seed=8) / d**0.5, randn(3, seed=9), **how
    ),
}
VECTOR_EDITS |= {
    "affine": lambda p, d, **how: p.affine(randn(d, d, seed=11) / d**0.5, randn(d, seed=12), **how),
    "affine_low_rank": lambda p, d, **how: p.affine_low_rank(
        randn(d, 3, seed=13) / d**0.5, randn(d, 3, seed=14), randn(d, seed=15), **how
    ),
}
VECTOR_EDITS |= {
    "patch": lambda p, d, **how: p.patch({0: randn(d, seed=16), 1: randn(d, seed=17)}, torch.ones(d), **how),
}
VECTOR_EDITS |= {
    f"features {op}": lambda p, d, numbers=numbers, **how: p.features(*latents(d), **numbers, **how)
    for op, numbers in {
        "set": {"offset": 1.5},
        "scale": {"factor": -2.0},
        "add": {"factor": 1.0, "offset": 0.7},
        "clamp": {"factor": 1.0, "low": 0.2, "high": 0.6},
    }.items()
}
UNIT_EDITS: dict[str, Callable[..., int]] = {
    "neurons": lambda p, d, **how: p.neurons([0, 3, 7, d - 1], factor=-2.0, offset=0.5, low=-1.0, high=1.5, **how),
    "heads": lambda p, d, **how: p.heads([0, 3], randn(2, head_dim(d), seed=10), factor=0.5, **how),
    "patch_units": lambda p, d, **how: p.patch(
        {position: randn(d, seed=20 + position) for position in range(5)}, units_of([2, 9], d), **how
    ),
}
EDITS = VECTOR_EDITS | UNIT_EDITS


def units_of(units: list[int], d: int) -> Tensor:
    return torch.zeros(d).index_fill_(0, torch.tensor(units), 1.0)


def one_edit(kind: str, d: int, **how: Any) -> tuple[TableBuilder, Program]:
    builder = TableBuilder(d, head_dim=head_dim(d))
    program = builder.program()
    EDITS[kind](program, d, **how)
    return builder, program


# The definition itself, against formulas that share no code with it.


@pytest.mark.parametrize("strength", [1.0, 0.3, -1.5])
@pytest.mark.parametrize("preserve_norm", [False, True])
@pytest.mark.parametrize("kind", VECTOR_EDITS)
def test_the_definition_is_what_the_contract_says(kind: str, preserve_norm: bool, strength: float) -> None:
    import oracle_formulas

    from patchclamp_server.interventions import program as messages
    from patchclamp_server.interventions.kinds.affine import Affine
    from patchclamp_server.interventions.kinds.features import FeatureEdit
    from patchclamp_server.interventions.kinds.patch import Patch

    d = 12
    h, v, u = randn(d).double(), randn(d, seed=5), unit(d)
    as_vector = messages.Vector(values=v)
    along = messages.Vector(values=u)
    low_rank = (randn(3, d, seed=7) / d**0.5, randn(3, d, seed=8) / d**0.5, randn(3, seed=9))
    op = messages.NeuronOp(kind.split()[1]) if kind.startswith("features") else messages.NeuronOp.SET
    values = {"set": (1.5,), "scale": (-2.0,), "add": (0.7,), "clamp": ()}[op.value]
    names = ("encoder", "decoder", "encoder_bias", "threshold")
    autoencoder = SimpleNamespace(
        tensors=dict(zip(names, latents(d), strict=True)) | {"decoder_bias": torch.zeros(d)},
        info=SimpleNamespace(provenance={"subtracted": "nothing", "function": "jumprelu"}),
    )
    stored: dict[str, Any] = {"sae": autoencoder}
    message = {
        "features": FeatureEdit("sae", tuple(range(5)), op, values, min=0.2, max=0.6),
        "add": messages.AddVector(as_vector),
        "project": messages.CapProjection(along, -0.25, 0.5),
        "replace": messages.ReplaceVector(messages.Vector(values=randn(d, seed=6))),
        "rotate": messages.RotateTowards(along, 0.4),
        "low_rank": messages.LowRank(*low_rank),
        "affine": Affine(randn(d, d, seed=11) / d**0.5, bias=randn(d, seed=12)),
        "affine_low_rank": Affine(
            left=randn(d, 3, seed=13) / d**0.5, right=randn(d, 3, seed=14), bias=randn(d, seed=15)
        ),
        "patch": Patch(),
    }[kind.split()[0]]
    edit = messages.Edit(kind=message, site=messages.Site.RESID_POST, layers=(0,), preserve_norm=preserve_norm)
    source = randn(d, seed=16).double() if kind == "patch" else None
    want = oracle_formulas.edited(edit, strength, h, (0,), 0, stored, 4, source)
    builder, program = one_edit(kind, d, strength=strength, preserve_norm=preserve_norm)
    x = h[None].clone()
    step = copied(builder.step([program]), torch.float64)
    residual_edits_reference(x, program=step, places=(0, 1))
    torch.testing.assert_close(x[0], want, rtol=1e-6, atol=1e-6)
    change = float((want - h).norm() / h.norm())
    assert step.rows.receipts[0, 0].tolist() == pytest.approx([1.0, change], rel=1e-5)


# Every kind.


@pytest.mark.parametrize("d", [48, 80, 100, 576])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", EDITS)
def test_an_edit_agrees_with_its_definition(kind: str, dtype: torch.dtype, d: int) -> None:
    builder, program = one_edit(kind, d, strength=0.7)
    got = assert_agrees(randn(2, d, dtype=dtype), program=builder.step([program, None], dtype), places=(0, 1))
    assert got.rows.receipts[:, 0, 0].tolist() == [1.0, 0.0]


@pytest.mark.parametrize("strength", [1.0, 0.25, -1.0, 3.0])
@pytest.mark.parametrize("kind", EDITS)
def test_a_strength_scales_the_change(kind: str, strength: float) -> None:
    builder, program = one_edit(kind, 48, strength=strength)
    assert_agrees(randn(2, 48), program=builder.step([program] * 2), places=(0, 1))


@pytest.mark.parametrize("kind", VECTOR_EDITS)
def test_a_preserved_norm_is_that_of_the_row(kind: str) -> None:
    builder, program = one_edit(kind, 80, strength=0.6, preserve_norm=True)
    x = randn(3, 80)
    got = assert_agrees(x, program=builder.step([program] * 3), places=(0, 1))
    torch.testing.assert_close(got.x.norm(dim=1), x.norm(dim=1))


@pytest.mark.parametrize("preserve_norm", [False, True])
@pytest.mark.parametrize("kind", VECTOR_EDITS)
def test_strength_0_keeps_the_bits_and_counts_a_change_of_0(kind: str, preserve_norm: bool) -> None:
    builder, program = one_edit(kind, 48, strength=0.0, preserve_norm=preserve_norm)
    x = randn(2, 48)
    x[1] = -0.0
    got = run(x, program=builder.step([program] * 2), places=(0, 1))
    assert bits(got.x) == bits(x)
    assert got.rows.receipts[:, 0].tolist() == [[1.0, 0.0]] * 2


def test_replacing_at_strength_1_gives_the_bits_of_the_vector() -> None:
    builder, program = one_edit("replace", 48)
    got = run(1e6 * randn(1, 48), program=builder.step([program]), places=(0, 1))
    assert bits(got.x[0][None]) == bits(randn(48, seed=6)[None])


@pytest.mark.parametrize("kind", UNIT_EDITS)
def test_units_that_are_not_named_keep_their_bits(kind: str) -> None:
    builder, program = one_edit(kind, 48, strength=0.7)
    x = randn(1, 48)
    got = run(x, program=builder.step([program]), places=(0, 1))
    named = {"neurons": [0, 3, 7, 47], "heads": [*range(12), *range(36, 48)], "patch_units": [2, 9]}[kind]
    changed = [i for i, (a, b) in enumerate(zip(bits(got.x)[0], bits(x)[0], strict=True)) if a != b]
    assert set(changed) <= set(named)
    assert len(changed) >= len(named) - 1


@pytest.mark.parametrize("n", [1, 2, 3, 7, 64])
def test_a_patched_row_gets_the_source_of_its_position_and_no_other(n: int) -> None:
    positions = [3 * i for i in range(n)]
    builder = TableBuilder(48)
    program = builder.program()
    sources = {position: randn(48, seed=100 + position) for position in positions}
    program.patch(sources, torch.ones(48))
    rows = [*range(3 * n + 2)]
    x = randn(len(rows), 48)
    got = assert_agrees(x, program=builder.step([program] * len(rows), position=rows), places=(0, 1))
    want = torch.stack([sources.get(position, x[position]) for position in rows])
    assert bits(got.x) == bits(want)


def test_a_list_of_neurons_may_be_longer_than_a_tile() -> None:
    builder = TableBuilder(1300)
    program = builder.program()
    program.neurons(range(0, 1300, 2), factor=3.0, strength=0.5)
    column = program.neuron_values(range(1, 1300, 2))
    got = assert_agrees(randn(2, 1300), program=builder.step([program, program]), places=(0, 1))
    assert torch.equal(got.rows.readings[:, column : column + 650], got.x[:, 1::2])


def test_a_clipped_nan_stays_nan() -> None:
    builder = TableBuilder(48)
    program = builder.program()
    program.neurons([5], low=0.0, high=1.0)
    x = randn(1, 48)
    x[0, 5] = torch.nan
    assert run(x, program=builder.step([program]), places=(0, 1)).x[0, 5].isnan()


# Corners.


@pytest.mark.parametrize("radians", [0.0, 1e-3, 0.5, 2.0, math.pi])
def test_a_rotation_stops_at_the_vector_and_leaves_rows_along_it_or_empty(radians: float) -> None:
    d, u = 80, unit(80)
    across = randn(d, seed=4)
    across = across - (across @ u) * u
    x = torch.stack([2 * u, -3 * u, torch.zeros(d), across, u + 0.1 * across, -u + 0.01 * across, 0.01 * across - u])
    builder = TableBuilder(d)
    program = builder.program()
    program.rotate(u, radians)
    got = assert_agrees(x, program=builder.step([program] * len(x)), places=(0, 1))
    assert bits(got.x[:3]) == bits(x[:3])


@pytest.mark.parametrize("kind", VECTOR_EDITS)
def test_an_empty_row_of_preserved_norm_stays_empty(kind: str) -> None:
    builder, program = one_edit(kind, 48, preserve_norm=True)
    got = assert_agrees(torch.zeros(1, 48), program=builder.step([program]), places=(0, 1))
    assert not got.x.any()


def test_nothing_rescales_a_row_that_became_empty() -> None:
    builder = TableBuilder(48)
    program = builder.program()
    program.replace(torch.zeros(48), preserve_norm=True)
    got = assert_agrees(randn(1, 48), program=builder.step([program]), places=(0, 1))
    assert not got.x.any()
    assert got.rows.receipts[0, 0].tolist() == pytest.approx([1.0, 1.0])


@pytest.mark.parametrize("bounds", [(-math.inf, 0.1), (0.1, math.inf), (0.0, 0.0), (2.5, 2.5)])
def test_a_projection_is_capped_above_below_removed_or_set(bounds: tuple[float, float]) -> None:
    builder = TableBuilder(48)
    program = builder.program()
    program.project(unit(48), *bounds)
    x = torch.stack([unit(48), -unit(48)])
    assert_agrees(x, program=builder.step([program] * 2), places=(0, 1))


def test_a_cap_that_does_not_bind_keeps_the_bits() -> None:
    builder = TableBuilder(48)
    program = builder.program()
    program.project(unit(48), -math.inf, math.inf, strength=0.5)
    x = randn(2, 48)
    x[1] = -0.0
    got = run(x, program=builder.step([program] * 2), places=(0, 1))
    assert bits(got.x) == bits(x)
    assert got.rows.receipts[:, 0].tolist() == [[1.0, 0.0]] * 2


# Residual add and norms.


@pytest.mark.parametrize("d", [48, 100, 576])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", [rms, layer])
@pytest.mark.parametrize("delta_norm", [False, True])
def test_a_sum_has_torch_s_bits_and_its_norm_agrees(
    kind: Callable[..., NormParams], dtype: torch.dtype, d: int, delta_norm: bool
) -> None:
    x, delta = randn(3, d, dtype=dtype), randn(3, d, dtype=dtype, seed=5)
    how: dict[str, Any] = {"delta": delta, "norm": kind(d, dtype)}
    if delta_norm:
        how["delta_norm"] = kind(d, dtype, seed=8)
    got = assert_agrees(x, **how)
    # To bfloat16 the interpreter cuts off, where a GPU rounds.
    if not delta_norm and dtype is not torch.bfloat16:
        assert bits(got.x) == bits(x + delta)


def test_a_row_s_mean_does_not_include_lanes_beyond_its_width() -> None:
    x = 100 + randn(2, 80)
    got = assert_agrees(x, norm=layer(80))
    want = torch.nn.functional.layer_norm(x, (80,), layer(80).weight, layer(80).bias, 1e-5)
    torch.testing.assert_close(got.out, want, rtol=1e-4, atol=1e-4)


def test_a_norm_may_have_weights_in_float32() -> None:
    assert_agrees(randn(2, 48, dtype=torch.bfloat16), norm=rms(48, torch.float32))


@pytest.mark.parametrize("edited", [False, True])
def test_the_norm_sees_the_rounded_row(edited: bool) -> None:
    builder, program = one_edit("add", 48)
    x, delta, norm = randn(1, 48).half(), randn(1, 48, seed=5).half(), rms(48, torch.float16)
    how: dict[str, Any] = {"program": builder.step([program], x.dtype), "places": (0, 1)} if edited else {}
    got = run(x, delta=delta, norm=norm, **how)
    assert bits(got.out) == bits(run(got.x, norm=norm).out)


def test_without_rows_nothing_happens() -> None:
    builder, _ = one_edit("add", 48)
    got = run(torch.empty(0, 48), delta=torch.empty(0, 48), program=builder.step([]), places=(0, 1), norm=rms(48))
    assert got.out.shape == (0, 48)


# Rows that nothing edits.


def many_programs(d: int) -> tuple[TableBuilder, list[Program]]:
    builder = TableBuilder(d, places=4, head_dim=head_dim(d))
    programs = []
    for i in range(3):
        program = builder.program()
        gate = program.condition(unit(d, i), -100.0 if i else 100.0, latched=i == 2)
        for place in range(4):
            for j, kind in enumerate(EDITS):
                gated = gate if j % 3 == 0 and place else None
                EDITS[kind](program, d, place=place, strength=0.1 * (i + j), gate=gated)
            program.projection(unit(d, 9), place=place)
            program.neuron_values([0, d - 1], place=place)
        programs.append(program)
    return builder, programs


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_without_program_or_out_of_every_scope_has_the_bits_of_no_program_at_all(dtype: torch.dtype) -> None:
    d = 100
    builder, programs = many_programs(d)
    x, delta = randn(4, d, dtype=dtype), randn(4, d, dtype=dtype, seed=5)
    x[0, :3] = -0.0
    delta[0, :3] = -0.0
    silent = [(1, item) for item in range(programs[1].items)]
    step = builder.step([None, programs[1], programs[0], None], dtype, out_of_scope=silent)
    for how in ({"delta": delta, "norm": rms(d, dtype)}, {"norm": layer(d, dtype)}, {"delta": delta}):
        edits = {"delta_places": (0, 2)} if "delta" in how else {}
        got, plain = run(x, program=step, places=(2, 4), **edits, **how), run(x, **how)
        for row in (0, 1, 3):
            assert bits(got.x[row : row + 1]) == bits(plain.x[row : row + 1])
            if got.out is not None:
                assert bits(got.out[row : row + 1]) == bits(plain.out[row : row + 1])
            assert not got.rows.receipts[row].any()
            assert got.rows.readings[row].isnan().all()
        assert bits(got.x[2:3]) != bits(plain.x[2:3])
        assert got.rows.opened[0].tolist() == [7, 7, 7]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", [rms, layer])
def test_two_calls_have_the_bits_of_the_fused_one_for_rows_without_edits(
    kind: Callable[..., NormParams], dtype: torch.dtype
) -> None:
    d = 100
    builder, programs = many_programs(d)
    x, delta = randn(3, d, dtype=dtype), randn(3, d, dtype=dtype, seed=5)
    step, norm = builder.step([None, programs[0], None], dtype), kind(d, dtype)
    fused = run(x, delta=delta, delta_norm=kind(d, dtype), program=step, delta_places=(0, 1), places=(1, 4), norm=norm)
    first = run(x, delta=delta, delta_norm=kind(d, dtype), program=step, delta_places=(0, 1), places=(1, 3))
    second = run(first.x, program=step, places=(3, 4), norm=norm)
    for row in (0, 2):
        assert bits(fused.x)[row] == bits(second.x)[row]
        assert bits(fused.out)[row] == bits(second.out)[row]


def test_a_row_alone_has_the_bits_it_has_among_others_and_every_time() -> None:
    d = 80
    builder, programs = many_programs(d)
    x, delta = randn(3, d), randn(3, d, seed=5)
    how: dict[str, Any] = {"delta_places": (0, 2), "places": (2, 4), "norm": rms(d)}
    together = run(x, delta=delta, program=builder.step(programs), **how)
    again = run(x, delta=delta, program=builder.step(programs), **how)
    assert bits(together.x) == bits(again.x)
    assert torch.equal(together.rows.receipts, again.rows.receipts)
    for t, program in enumerate(programs):
        step = builder.step([program], position=[t])
        alone = run(x[t : t + 1], delta=delta[t : t + 1], program=step, **how)
        assert bits(alone.x)[0] == bits(together.x)[t]
        assert bits(alone.out)[0] == bits(together.out)[t]
        assert torch.equal(alone.rows.receipts[0], together.rows.receipts[t])


# Scope and order.


def test_items_of_every_word_of_the_mask_are_told_apart() -> None:
    builder = TableBuilder(48)
    program = builder.program()
    items = []
    for skipped in (0, 62, 0, 0, 60):
        program.skip_items(skipped)
        items.append(program.add(randn(48, seed=len(items) + 5)))
    assert items == [0, 63, 64, 65, 126]
    out_of_scope = [(row, item) for row, item in enumerate(items)]
    step = builder.step([program] * 5, out_of_scope=out_of_scope)
    got = assert_agrees(randn(5, 48), program=step, places=(0, 1))
    for row, item in enumerate(items):
        assert [i for i in items if got.rows.receipts[row, i, 0] == 0] == [item]


def test_only_entries_of_the_given_places_run_on_delta_and_on_the_sum() -> None:
    builder = TableBuilder(48, places=4)
    program = builder.program()
    for place in range(4):
        program.add(torch.full((48,), 10.0**place), place=place)
    x, delta = torch.zeros(1, 48), torch.zeros(1, 48)
    got = run(x, delta=delta, program=builder.step([program]), delta_places=(0, 1), places=(2, 3))
    assert got.x[0, 0] == 101
    got = run(x, delta=delta, program=builder.step([program]), delta_places=(1, 3), places=(3, 3))
    assert got.x[0, 0] == 110
    assert got.rows.receipts[0, :, 0].tolist() == [0, 1, 1, 0]


def test_what_adds_to_the_stream_is_edited_before_it_is_added() -> None:
    builder = TableBuilder(48)
    program = builder.program()
    program.project(unit(48), 0.0, 0.0)
    x, delta = unit(48)[None].clone(), 5 * unit(48)[None]
    got = assert_agrees(x, delta=delta, delta_norm=rms(48), program=builder.step([program]), delta_places=(0, 1))
    assert_agrees(x, delta=delta, program=builder.step([program]), delta_places=(0, 1), norm=rms(48))
    assert got.rows.receipts[0, 0, 0] == 1


def test_neurons_of_what_is_added_are_edited_without_harm_to_the_stream() -> None:
    builder = TableBuilder(100)
    program = builder.program()
    program.neurons([3, 99], factor=0.0, offset=2.0)
    program.neuron_values([2, 3])
    x, delta = randn(2, 100), randn(2, 100, seed=5)
    got = assert_agrees(x, delta=delta, program=builder.step([program, None]), delta_places=(0, 1), norm=rms(100))
    assert got.x[0, 3] == x[0, 3] + 2.0


def test_edits_of_a_row_run_in_order() -> None:
    builder = TableBuilder(48)
    forward, backward = builder.program(), builder.program()
    for program, order in ((forward, ("replace", "add")), (backward, ("add", "replace"))):
        for kind in order:
            EDITS[kind](program, 48)
    got = assert_agrees(randn(2, 48), program=builder.step([forward, backward]), places=(0, 1))
    assert torch.equal(got.x[1], randn(48, seed=6))
    torch.testing.assert_close(got.x[0], randn(48, seed=6) + randn(48, seed=5))


# Gates.


def gated(threshold: float, d: int = 48, **how: Any) -> tuple[TableBuilder, Program]:
    builder = TableBuilder(d, places=2)
    program = builder.program()
    gate = program.condition(unit(d), threshold, **how)
    program.add(torch.full((d,), 8.0), gate=gate, place=1)
    return builder, program


@pytest.mark.parametrize("above", [True, False])
@pytest.mark.parametrize("latched", [True, False])
def test_a_gate_opens_where_its_condition_holds(above: bool, latched: bool) -> None:
    builder, program = gated(1.0, above=above, latched=latched)
    x = torch.stack([2 * unit(48), 0.5 * unit(48)])
    step = builder.step([program, program], position=[4, 2])
    if latched:
        # Two sequences: each has a latch of its own.
        builder, program = gated(1.0, above=above, latched=True)
        other = builder.program()
        gate = other.condition(unit(48), 1.0, above=above, latched=True)
        other.add(torch.full((48,), 8.0), gate=gate, place=1)
        step = builder.step([program, other], position=[4, 2])
    got = assert_agrees(x, program=step, places=(0, 2))
    edited = [bits(got.x)[t] != bits(x)[t] for t in range(2)]
    assert edited == [above, not above]
    if latched:
        assert got.latch.tolist() == ([4, NEVER] if above else [NEVER, 2])


def test_a_cosine_is_measured_against_the_row_s_length() -> None:
    builder, program = gated(0.9, cosine=True)
    across = randn(48, seed=4)
    x = torch.stack([0.01 * unit(48), 50 * unit(48) + 50 * across, torch.zeros(48)])
    got = assert_agrees(x, program=builder.step([program] * 3), places=(0, 2))
    assert got.rows.opened[:, 0].tolist() == [1, 0, 0]


@pytest.mark.parametrize("above", [True, False])
@pytest.mark.parametrize("jump", [0.0, 0.8])
def test_a_condition_may_look_at_a_feature(jump: float, above: bool) -> None:
    """Its value is 0 up to its jump, where the projection is not."""
    builder = TableBuilder(48, places=2)
    program = builder.program()
    gate = program.feature_condition(unit(48), -0.5, jump, 0.1, above=above)
    program.add(torch.full((48,), 8.0), gate=gate, place=1)
    x = torch.stack([p * unit(48) for p in (-2.0, 0.55, 0.9, 1.2, 2.0)])
    got = assert_agrees(x, program=builder.step([program] * 5), places=(0, 2))
    active = [p - 0.5 if p - 0.5 > jump else 0.0 for p in (-2.0, 0.55, 0.9, 1.2, 2.0)]
    assert got.rows.opened[:, 0].tolist() == [int(f > 0.1) if above else int(f < 0.1) for f in active]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 2, 5])
def test_features_are_read_into_their_columns(n: int, dtype: torch.dtype) -> None:
    builder = TableBuilder(48)
    program, other = builder.program(), builder.program()
    encoder, _, bias, jump = latents(48, n)
    first = program.feature_values(encoder, bias, jump)
    after = program.projection(unit(48))
    other.feature_values(encoder[:1], bias[:1] + 1, jump[:1])
    x = randn(3, 48, dtype=dtype)
    got = assert_agrees(x, program=builder.step([program, other, program], dtype), places=(0, 1))
    assert after == first + n
    assert bits(got.x) == bits(x)


def test_a_nan_shows_in_the_features_of_its_row() -> None:
    builder = TableBuilder(48)
    program = builder.program()
    encoder, decoder, bias, jump = latents(48)
    column = program.feature_values(encoder, bias, jump)
    program.features(encoder, decoder, bias, jump, factor=0.5)
    x = randn(2, 48)
    x[0, 7] = math.nan
    got = run(x, program=builder.step([program] * 2), places=(0, 1))
    assert got.rows.readings[:, column].isnan().tolist() == [True, False]
    assert got.x.isnan().all(dim=1).tolist() == [True, False]


def test_a_condition_out_of_scope_is_written_as_shut() -> None:
    builder, program = gated(-100.0)
    x = randn(2, 48)
    got = assert_agrees(x, program=builder.step([program] * 2, out_of_scope=[(1, 0)]), places=(0, 2))
    assert got.rows.opened[:, 0].tolist() == [1, 0]
    assert bits(got.x)[1] == bits(x)[1]
    assert got.rows.receipts[:, 1, 0].tolist() == [1, 0]


def test_a_condition_sees_the_edits_before_it() -> None:
    builder = TableBuilder(48, places=2)
    program = builder.program()
    program.project(unit(48), 3.0, 3.0)
    program.condition(unit(48), 2.5)
    got = assert_agrees(torch.zeros(1, 48), program=builder.step([program]), places=(0, 2))
    assert got.rows.opened.tolist() == [[1]]


def test_a_latch_keeps_the_first_position_and_is_open_from_there_on() -> None:
    builder, program = gated(1.0, latched=True)
    x = torch.stack([u * unit(48) for u in (0.0, 2.0, 0.0, 2.0)])
    step = builder.step([program] * 4, position=[6, 7, 8, 9])
    fired = run(x, program=step, places=(0, 1))
    assert fired.latch.tolist() == [7]
    step.table.latch.copy_(fired.latch)
    got = assert_agrees(x, program=step, places=(1, 2))
    assert got.rows.receipts[:, 1, 0].tolist() == [0, 1, 1, 1]
    assert bits(got.x)[0] == bits(x)[0]
    later = builder.step([program], position=[12])
    later.table.latch.copy_(fired.latch)
    assert run(x[3:], program=later, places=(0, 1)).latch.tolist() == [7]


def test_a_gate_that_stays_shut_keeps_the_bits() -> None:
    builder, program = gated(100.0)
    x = randn(2, 48, dtype=torch.bfloat16)
    how: dict[str, Any] = {"delta": randn(2, 48, dtype=torch.bfloat16, seed=5), "norm": rms(48)}
    got = run(x, program=builder.step([program] * 2, x.dtype), places=(0, 2), **how)
    plain = run(x, **how)
    assert (bits(got.x), bits(got.out)) == (bits(plain.x), bits(plain.out))
    assert not got.rows.receipts.any()


# Receipts and readings.


def test_rows_that_are_not_counted_are_edited_without_receipt() -> None:
    builder, program = one_edit("add", 48)
    got = assert_agrees(randn(2, 48), program=builder.step([program] * 2, counted=[0, 1]), places=(0, 1))
    assert got.rows.receipts[:, 0, 0].tolist() == [0, 1]


def test_receipts_add_to_what_is_there_place_after_place() -> None:
    builder = TableBuilder(48, places=3)
    program = builder.program()
    program.add(randn(48, seed=5))
    step = builder.step([program])
    step.rows.receipts.fill_(2.0)
    # One item may have entries at many places.
    step.table.entries[0] = torch.tensor([0, 1, 1, 1])
    got = run(randn(1, 48), program=step, places=(0, 3))
    assert got.rows.receipts[0, 0, 0] == 3
    want = 2 + float(randn(48, seed=5).norm() / randn(1, 48).norm())
    assert float(got.rows.receipts[0, 0, 1]) == pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize("missing", [[], [0], [0, 1]])
def test_an_edit_is_relative_to_the_row_it_was_given(missing: list[int]) -> None:
    builder = TableBuilder(48)
    program = builder.program()
    for i in range(3):
        program.add(50 * randn(48, seed=5 + i))
    x = randn(1, 48)
    step = builder.step([program], out_of_scope=[(0, item) for item in missing])
    got = assert_agrees(x, program=step, places=(0, 1))
    h = x[0].clone()
    for i in range(3):
        if i in missing:
            continue
        v = 50 * randn(48, seed=5 + i)
        assert float(got.rows.receipts[0, i, 1]) == pytest.approx(float(v.norm() / h.norm()), rel=1e-5)
        h = h + v


def test_a_change_of_an_empty_row_is_relative_to_the_smallest_number() -> None:
    builder = TableBuilder(48)
    program = builder.program()
    program.add(1e-10 * unit(48))
    got = run(torch.zeros(1, 48), program=builder.step([program]), places=(0, 1))
    assert float(got.rows.receipts[0, 0, 1]) == pytest.approx(1e-10 / torch.finfo(torch.float32).tiny, rel=1e-3)


@pytest.mark.parametrize("dtype", DTYPES)
def test_readings_see_the_row_after_its_edits_where_they_are_in_scope(dtype: torch.dtype) -> None:
    builder = TableBuilder(100)
    program = builder.program()
    program.add(randn(100, seed=5))
    columns = [program.projection(unit(100, i)) for i in range(2)]
    first = program.neuron_values([0, 50, 99])
    x = randn(2, 100, dtype=dtype)
    step = builder.step([program] * 2, dtype, out_of_scope=[(1, 2), (1, 3)])
    got = assert_agrees(x, program=step, places=(0, 1))
    assert got.rows.readings.isnan().tolist() == [[False] * 5, [False, True, True, True, True]]
    assert (columns, first) == ([0, 1], 2)
    assert torch.equal(got.rows.readings[0, 2:], got.x[0, [0, 50, 99]].float())


# All at once.


@pytest.mark.parametrize("seed", range(12))
def test_random_programs_agree_with_the_definition(seed: int) -> None:
    random = torch.Generator().manual_seed(seed)

    def pick(n: int) -> int:
        return int(torch.randint(n, (), generator=random))

    d = [48, 80, 100, 64][seed % 4]
    dtype = DTYPES[seed % 3]
    builder = TableBuilder(d, places=4, head_dim=head_dim(d))
    programs = []
    for _ in range(3):
        program = builder.program()
        program.skip_items(40 * pick(2))
        gates = [program.condition(unit(d, pick(99)), 100.0 * (pick(2) * 2 - 1), latched=bool(i)) for i in range(2)]
        for _ in range(6):
            kind = list(EDITS)[pick(len(EDITS))]
            how = {"place": 1 + pick(3), "strength": pick(9) / 8, "gate": [None, *gates][pick(3)]}
            if kind in VECTOR_EDITS and pick(2):
                how["preserve_norm"] = True
            EDITS[kind](program, d, **how)
        program.projection(unit(d, pick(99)), place=pick(4))
        program.neuron_values(sorted({pick(d) for _ in range(5)}), place=pick(4))
        programs.append(program)
    rows = [programs[0], None, programs[1], programs[2]]
    silent = [(row, item) for row in range(4) for item in range(90) if pick(4) == 0]
    step = builder.step(rows, dtype, out_of_scope=silent, counted=[1, 1, 1, pick(2)])
    norm = [rms, layer][pick(2)](d, dtype)
    x, delta = randn(4, d, dtype=dtype, seed=seed), randn(4, d, dtype=dtype, seed=seed + 50)
    assert_agrees(x, delta=delta, program=step, delta_places=(0, 2), places=(2, 4), norm=norm)
    assert_agrees(x, program=step, places=(0, 4))


# Arguments.


def test_edit_rows_edits_in_place_and_returns_nothing() -> None:
    builder, program = one_edit("heads", 48)
    x, y = randn(2, 48), randn(2, 48)
    edit_rows(x, program=builder.step([program] * 2), places=(0, 1))
    residual_edits_reference(y, program=builder.step([program] * 2), places=(0, 1))
    torch.testing.assert_close(x, y)


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("x", {"x": torch.zeros(2, 48, dtype=torch.float64)}),
        ("x", {"x": torch.zeros(48, 2).T}),
        ("delta", {"delta": torch.zeros(2, 47)}),
        ("delta", {"delta": torch.zeros(2, 48, dtype=torch.float16)}),
        ("delta_norm", {"delta_norm": rms(48)}),
        ("delta_places", {"delta_places": (0, 1)}),
        ("norm.weight", {"norm": rms(47)}),
        ("norm.bias", {"norm": NormParams(torch.ones(48), torch.ones(47), 1e-5)}),
        ("out", {"out": torch.zeros(2, 48)}),
        ("out", {"out": torch.zeros(2, 47), "norm": rms(48)}),
        ("places", {"places": (0, 3)}),
        ("places", {"places": (1, 0)}),
        ("places", {"places": (0, 1), "program": None}),
        ("program", {"x": torch.zeros(3, 48)}),
        ("program.bank", {"x": torch.zeros(2, 40)}),
        ("program.bank", {"x": torch.zeros(2, 48, dtype=torch.bfloat16)}),
    ],
)
def test_an_argument_that_does_not_fit_is_refused_by_name(name: str, how: dict[str, Any]) -> None:
    builder, program = one_edit("add", 48)
    arguments = {"x": torch.zeros(2, 48), "program": builder.step([program] * 2), **how}
    with pytest.raises(ValueError, match=f"^{name} "):
        residual_edits(arguments.pop("x"), **arguments)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("rows.mask", lambda step: {"mask": step.rows.mask.int()}),
        ("rows.position", lambda step: {"position": step.rows.position[:1]}),
        ("rows.opened", lambda step: {"opened": step.rows.opened[0]}),
        ("rows.mask", lambda step: {"receipts": torch.zeros(2, 65, 2)}),
    ],
)
def test_a_step_that_does_not_fit_is_refused_when_it_is_made(
    name: str, change: Callable[[ProgramStep], dict[str, Tensor]]
) -> None:
    builder, program = one_edit("add", 48)
    step = builder.step([program] * 2)
    rows = ProgramRows(**(vars(step.rows) | change(step)))
    with pytest.raises(ValueError, match=f"^{name} "):
        ProgramStep(step.table, rows, step.bank)

"""Rotary embedding and cache write against the reference in float64, and against the operators of the decoder."""

import random

import pytest
import torch
import torch.nn.functional as F
from guards import Guarded, guard
from torch import Tensor

from patchclamp_kernels.rope_kv_write import rope_kv_write, rope_kv_write_reference

# Of the largest value: one rounding of the normed value and one of the result.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
DTYPES = list(TOLERANCE)
CONTEXT = 50


class Case:
    """Random inputs between margins; the caches are NaN where nothing was written."""

    def __init__(
        self,
        rows: int = 5,
        n_heads: int = 4,
        n_kv: int = 2,
        dim: int = 16,
        rotary: int | None = None,
        norms: bool = False,
        dtype: torch.dtype = torch.float32,
        block_size: int = 8,
        seed: int = 0,
    ) -> None:
        make = torch.Generator().manual_seed(seed)
        self.n_heads, self.n_kv, self.dim, self.dtype = n_heads, n_kv, dim, dtype
        self.qkv = torch.randn(rows, (n_heads + 2 * n_kv) * dim, generator=make).to(dtype)
        rotary = dim if rotary is None else rotary
        self.cos = torch.randn(CONTEXT, rotary, generator=make).to(dtype) if rotary else None
        self.sin = torch.randn(CONTEXT, rotary, generator=make).to(dtype) if rotary else None
        self.q_norm = torch.randn(dim, generator=make).to(dtype) if norms else None
        self.k_norm = torch.randn(dim, generator=make).to(dtype) if norms else None
        self.positions = torch.randint(CONTEXT, (rows,), generator=make)
        n_blocks = rows // block_size + 2
        self.slots = torch.randperm(n_blocks * block_size, generator=make)[:rows]
        self.cache_shape = (n_blocks, block_size, n_kv, dim)

    def run(self) -> tuple[Tensor, Tensor, Tensor]:
        """q and the caches, from the kernel; checks that nothing beside them was written."""
        out = Guarded((len(self.qkv), self.n_heads, self.dim), self.dtype)
        keys, values = Guarded(self.cache_shape, self.dtype), Guarded(self.cache_shape, self.dtype)
        given = [None if x is None else guard(x).tensor for x in (self.qkv, self.cos, self.sin)]
        norms = [None if x is None else guard(x).tensor for x in (self.q_norm, self.k_norm)]
        q = rope_kv_write(
            *given,
            self.positions,
            self.slots,
            keys.tensor,
            values.tensor,
            n_heads=self.n_heads,
            q_norm=norms[0],
            k_norm=norms[1],
            eps=1e-6,
            out=out.tensor,
        )
        assert q is out.tensor
        for buffer in (out, keys, values):
            buffer.assert_margins_intact()
        return q, keys.tensor, values.tensor

    def truth(self) -> tuple[Tensor, Tensor, Tensor]:
        keys, values = (torch.full(self.cache_shape, float("nan"), dtype=torch.float64) for _ in range(2))
        exact = [None if x is None else x.double() for x in (self.qkv, self.cos, self.sin)]
        norms = {"q_norm": self.q_norm, "k_norm": self.k_norm}
        q = rope_kv_write_reference(
            *exact,
            self.positions,
            self.slots,
            keys,
            values,
            n_heads=self.n_heads,
            eps=1e-6,
            **{name: None if x is None else x.double() for name, x in norms.items()},
        )
        return q, keys, values

    def assert_right(self) -> None:
        for mine, true in zip(self.run(), self.truth(), strict=True):
            scale = true.nan_to_num().abs().max().item() if true.numel() else 1.0
            torch.testing.assert_close(mine.double(), true, rtol=0, atol=TOLERANCE[self.dtype] * scale, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norms", [False, True])
def test_rotates_and_writes_what_the_reference_does(dtype: torch.dtype, norms: bool) -> None:
    Case(norms=norms, dtype=dtype).assert_right()


@pytest.mark.parametrize("dim", [8, 64, 80, 96, 256])
@pytest.mark.parametrize("norms", [False, True])
def test_any_head_dim(dim: int, norms: bool) -> None:
    Case(rows=3, dim=dim, norms=norms).assert_right()


@pytest.mark.parametrize("rotary", [2, 6, 32, 46])
def test_only_the_first_dimensions_turn_where_the_table_is_narrower(rotary: int) -> None:
    case = Case(dim=48, rotary=rotary, norms=True)
    case.assert_right()


def test_without_a_table_nothing_turns() -> None:
    case = Case(rotary=0)
    q, keys, values = case.run()
    heads = case.qkv.view(5, 8, 16)
    assert torch.equal(q, heads[:, :4])
    assert torch.equal(keys.view(-1, 2, 16)[case.slots], heads[:, 4:6])
    assert torch.equal(values.view(-1, 2, 16)[case.slots], heads[:, 6:])


@pytest.mark.parametrize(("n_heads", "n_kv"), [(1, 1), (3, 1), (7, 1), (9, 3), (14, 2), (71, 1)])
def test_any_number_of_heads(n_heads: int, n_kv: int) -> None:
    Case(rows=2, n_heads=n_heads, n_kv=n_kv, norms=True).assert_right()


def test_follows_the_operators_of_the_decoder() -> None:
    """Norm, then x cos + roll(x) sin, as model/decoder.py has it."""
    case = Case(norms=True, dtype=torch.bfloat16)
    assert case.cos is not None
    assert case.sin is not None
    assert case.q_norm is not None
    normed = F.rms_norm(case.qkv.view(5, 8, 16)[:, :4], (16,), case.q_norm, 1e-6)
    cos, sin = case.cos[case.positions][:, None], case.sin[case.positions][:, None]
    expected = torch.addcmul(normed * cos, torch.roll(normed, 8, -1), sin)
    torch.testing.assert_close(case.run()[0].float(), expected.float(), rtol=0.02, atol=0.03)


def test_the_normed_value_is_rounded_before_it_is_turned() -> None:
    # In float16: to bfloat16 the interpreter cuts off, where a GPU rounds.
    case = Case(norms=True, dtype=torch.float16)
    case.qkv.fill_(1.0)
    # 1 + 2⁻¹² is 1 in float16: unrounded, the difference of the halves would not vanish.
    case.q_norm, case.k_norm = torch.ones(16), torch.ones(16)
    case.q_norm[:8] += 2**-12
    case.cos, case.sin = torch.ones(CONTEXT, 16), -torch.ones(CONTEXT, 16)
    assert (case.run()[0] == 0).all()


def test_padding_rows_leave_the_cache_alone() -> None:
    case = Case(rows=4)
    case.slots = torch.tensor([-1, 3, -7, 9])
    case.assert_right()
    _, keys, values = case.run()
    for cache in (keys, values):
        written = ~cache.view(-1, 2, 16).isnan().any(-1).any(-1)
        assert written.nonzero().flatten().tolist() == [3, 9]


def test_no_rows() -> None:
    Case(rows=0).assert_right()


def test_a_table_in_float32_serves_rows_in_bfloat16() -> None:
    case = Case(dtype=torch.bfloat16)
    assert case.cos is not None
    assert case.sin is not None
    case.cos, case.sin = case.cos.float(), case.sin.float()
    case.assert_right()


def test_repeats_its_bits_and_a_row_alone_has_those_it_has_in_a_batch() -> None:
    case = Case(rows=6, norms=True, dtype=torch.bfloat16)
    q, keys, _ = case.run()
    again = case.run()
    assert torch.equal(q, again[0])
    assert torch.equal(keys.view(torch.int16), again[1].view(torch.int16))
    case.qkv, case.positions, case.slots = case.qkv[4:5], case.positions[4:5], case.slots[4:5]
    assert torch.equal(case.run()[0], q[4:5])


def test_random_sweep() -> None:
    draw = random.Random(0)
    for seed in range(15):
        dim = draw.choice([8, 16, 40, 64, 80])
        n_kv = draw.randint(1, 3)
        Case(
            rows=draw.randint(1, 9),
            n_heads=n_kv * draw.randint(1, 5),
            n_kv=n_kv,
            dim=dim,
            rotary=draw.choice([0, dim, dim // 2]),
            norms=draw.random() < 0.5,
            dtype=draw.choice(DTYPES),
            block_size=draw.choice([8, 16]),
            seed=seed,
        ).assert_right()


def test_what_does_not_fit_is_refused_by_name() -> None:
    case = Case(norms=True)
    keys = torch.zeros(case.cache_shape)
    good = {
        "qkv": case.qkv,
        "cos": case.cos,
        "signed_sin": case.sin,
        "positions": case.positions,
        "slots": case.slots,
        "key_cache": keys,
        "value_cache": keys.clone(),
        "n_heads": 4,
        "q_norm": case.q_norm,
        "k_norm": case.k_norm,
        "eps": 1e-6,
    }
    rope_kv_write(**good)
    bad = {
        "qkv": case.qkv[:, 1:],
        "cos": torch.zeros(CONTEXT, 15),
        "signed_sin": None,
        "positions": case.positions.int(),
        "slots": case.slots[1:],
        "key_cache": keys.half(),
        "value_cache": keys[:1],
        "n_heads": 0,
        "q_norm": torch.zeros(3),
        "k_norm": None,
        "out": torch.zeros(5, 4, 15),
    }
    for name, value in bad.items():
        with pytest.raises(ValueError, match=name):
            rope_kv_write(**(good | {name: value}))

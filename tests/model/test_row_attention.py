"""Attention row by row, compiled and by torch, against one row at a time in float64; and cut into chunks anyhow."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from patchclamp_server.model.attention.batch import AttentionBatch
from patchclamp_server.model.attention.paged import paged_attention
from patchclamp_server.model.attention.peaks import Peaks
from patchclamp_server.model.attention.pools import TILED, KvPool, Pool, TiledPool
from patchclamp_server.model.attention.row_attention import write
from patchclamp_server.model.attention.spans import Span

CPU = torch.device("cpu")
# contexts of the rows, heads, key heads, head_dim, block size, window, soft cap
SHAPES = [
    ((1,), 1, 1, 1, 1, 0, 0.0),
    ((7, 1, 33), 6, 2, 5, 4, 0, 0.0),
    ((40, 3), 9, 3, 64, 16, 12, 0.0),
    ((17, 17, 16), 4, 4, 80, 8, 1, 0.0),
    ((130, 5), 8, 1, 20, 32, 0, 3.0),
    ((21,), 2, 2, 33, 16, 5, 2.0),
    # Several chunks of keys.
    ((700, 300, 257, 256), 6, 2, 64, 16, 0, 0.0),
    ((600, 20), 12, 1, 20, 8, 300, 2.0),
]


class Case:
    """Random queries, keys and values of rows whose blocks lie scattered in the pool."""

    def __init__(
        self, contexts: tuple[int, ...], heads: int, kv: int, dim: int, block: int, window: int, cap: float
    ) -> None:
        generator = torch.Generator().manual_seed(len(contexts) * 1000 + heads * dim)
        blocks = [-(-n // block) for n in contexts]
        order = (torch.randperm(sum(blocks), generator=generator) + 1).tolist()
        self.spans = []
        for row, n in enumerate(contexts):
            self.spans.append(Span(row, 1, n - 1, [order.pop() for _ in range(blocks[row])]))
        # Of each token, behind block 0, which stays zero.
        self.stored = torch.randn(2, sum(blocks) + 1, block, kv, dim, generator=generator)
        self.stored[:, 0] = 0
        self.q = 2.0 * torch.randn(len(contexts), heads, dim, generator=generator)
        self.k, self.v = torch.randn(2, len(contexts), kv, dim, generator=generator)
        self.options = {"scale": dim**-0.5, "window": window, "soft_cap": cap}
        self.block = block
        self.kv_dtype = torch.float32

    def attend(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Peaks]:
        rows, heads, _ = self.q.shape
        slots = [s.blocks[s.offset // self.block] * self.block + s.offset % self.block for s in self.spans]
        peaks = Peaks({5: np.arange(rows)}, rows, heads, CPU, off_sink=True)
        batch = AttentionBatch(self.spans, self.block, {self.options["window"]}, CPU)  # type: ignore[arg-type]
        q, k, v = (x.to(dtype) for x in (self.q, self.k, self.v))
        self.queried = dtype
        n_blocks, size, kv, dim = self.stored.shape[1:]
        shape = n_blocks, size, kv, dim
        every = torch.arange(n_blocks * size)
        pool: Pool
        if dtype == torch.float32:
            pool = TiledPool(*shape, self.kv_dtype)
            k_stored, v_stored = self.stored.flatten(1, 2)
            write(k_stored, v_stored, every, pool)
        else:
            pool = KvPool(*shape, dtype, CPU)
            pool.restore(every, list(self.stored.to(dtype).flatten(1, 2)))
        z = paged_attention(
            q,
            k,
            v,
            pool,
            torch.tensor(slots),
            batch,
            peaks=peaks.at(5),
            **self.options,  # type: ignore[arg-type]
        )
        self.written = torch.stack(pool.rows()).view(self.stored.shape)
        return z, peaks

    def exact(self, row: int, head: int) -> tuple[Tensor, int, float]:
        """z, and where the head looks, of keys that are in the pool."""
        first, weights, values = self.weights(row, head)
        return weights @ values, first + int(weights.argmax()), float(weights.max())

    def exact_off_sink(self, row: int, head: int) -> float:
        """The largest weight of a key of a position above 0; of none, 0."""
        first, weights, _ = self.weights(row, head)
        return float(weights[0 if first else 1 :].max()) if first or len(weights) > 1 else 0.0

    def weights(self, row: int, head: int) -> tuple[int, Tensor, Tensor]:
        """First visible position, and the weights and values from there on."""
        span, window, cap = self.spans[row], int(self.options["window"]), self.options["soft_cap"]
        keys, values = self.written.double()[:, span.blocks].flatten(1, 2)[:, : span.offset + 1]
        kv = head // (self.q.shape[1] // keys.shape[1])
        scores = keys[:, kv] @ self.q[row, head].to(self.queried).double() * self.options["scale"]
        if cap:
            scores = cap * torch.tanh(scores / cap)
        first = max(0, len(scores) - window) if window else 0
        weights = torch.softmax(scores[first:], dim=0)
        return first, weights, values[first:, kv]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_each_row_is_its_own_softmax_over_its_visible_keys(shape: tuple, dtype: torch.dtype) -> None:  # type: ignore[type-arg]
    assert_exact(Case(*shape), dtype)


@pytest.mark.parametrize("kv_dtype", [torch.bfloat16, torch.int8])
@pytest.mark.parametrize("shape", SHAPES)
def test_keys_in_fewer_bits_are_those_that_are_stored(shape: tuple, kv_dtype: torch.dtype) -> None:  # type: ignore[type-arg]
    case = Case(*shape)
    case.kv_dtype = kv_dtype
    assert_exact(case, torch.float32)


def assert_exact(case: Case, dtype: torch.dtype) -> None:
    z, peaks = case.attend(dtype)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for row, head in np.ndindex(case.q.shape[:2]):
        exact, position, probability = case.exact(row, head)
        own = z.view(case.q.shape)[row, head].double()
        assert (own - exact).abs().max() <= tolerance * max(1.0, float(exact.abs().max()))
        assert peaks.positions[0, row, head] == position
        assert float(peaks.probabilities[0, row, head]) == pytest.approx(probability, rel=1e-4)
        assert peaks.off_sink is not None
        off_sink = case.exact_off_sink(row, head)
        assert float(peaks.off_sink[0, row, head]) == pytest.approx(off_sink, rel=1e-4, abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_head_at_rest_on_the_first_token_is_near_0_off_the_sink(dtype: torch.dtype) -> None:
    case = Case((40, 9), 6, 2, 16, 4, 0, 0.0)
    for row, span in enumerate(case.spans):
        for kv in range(2):
            case.stored[0, span.blocks[0], 0, kv] = 3.0 * case.q[row, 3 * kv : 3 * kv + 3].sum(dim=0)
    _, peaks = case.attend(dtype)
    assert peaks.off_sink is not None
    at_rest = (peaks.positions[0] == 0) & (peaks.probabilities[0] > 0.9)
    assert at_rest.sum() >= 6
    assert (peaks.off_sink[0][at_rest] < 0.1).all()
    for row, head in at_rest.nonzero().tolist():
        expected = case.exact_off_sink(row, head)
        assert float(peaks.off_sink[0, row, head]) == pytest.approx(expected, rel=1e-3, abs=1e-12)


def test_a_row_has_the_same_bits_with_any_neighbours_and_on_any_number_of_threads() -> None:
    """1,200 keys of 8 heads of 64: enough to wake a second thread."""
    case = Case((700, 500, 3), 8, 8, 64, 16, 0, 0.0)
    z, peaks = case.attend()
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        again, same_peaks = case.attend()
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(again, z)
    assert torch.equal(same_peaks.probabilities, peaks.probabilities)
    case.spans, case.q, case.k, case.v = (
        [Span(0, 1, 499, case.spans[1].blocks)],
        *(x[1:2] for x in (case.q, case.k, case.v)),
    )
    alone, _ = case.attend()
    assert torch.equal(alone[0], z[1])


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_shows_in_its_row_and_in_no_other(value: float) -> None:
    case = Case((9, 9), 4, 2, 16, 4, 0, 0.0)
    case.stored[0, case.spans[0].blocks[1]] = value
    z, _ = case.attend()
    assert not torch.isfinite(z[0]).all()
    assert torch.isfinite(z[1]).all()


def test_scores_far_apart_neither_overflow_nor_lose_the_largest() -> None:
    case = Case((30,), 2, 1, 8, 4, 0, 0.0)
    case.q *= 1e4
    z, peaks = case.attend()
    for head in range(2):
        exact, position, _ = case.exact(0, head)
        assert (z.view(2, 8)[head] - exact).abs().max() < 1e-5
        assert peaks.positions[0, 0, head] == position
        assert float(peaks.probabilities[0, 0, head]) == pytest.approx(1.0)


@pytest.mark.parametrize("kv_dtype", TILED)
@pytest.mark.parametrize("shape", [s for s in SHAPES if s[0][0] > 12])
def test_rows_of_a_prompt_have_the_same_bits_however_it_is_cut(shape: tuple, kv_dtype: torch.dtype) -> None:  # type: ignore[type-arg]
    contexts, heads, kv, dim, block, window, cap = shape
    n = contexts[0]
    case = Case((n,), heads, kv, dim, block, window, cap)
    q, k, v = (torch.randn(n, h, dim, generator=torch.Generator().manual_seed(h)) for h in (heads, kv, kv))
    blocks = case.spans[0].blocks

    def attended(sizes: list[int]) -> Tensor:
        pool, parts, start = TiledPool(len(case.stored[0]), block, kv, dim, kv_dtype), [], 0
        for size in sizes:
            rows = slice(start, start + size)
            slots = torch.tensor([blocks[i // block] * block + i % block for i in range(start, start + size)])
            batch = AttentionBatch([Span(0, size, start, blocks)], block, {window}, CPU)
            parts.append(paged_attention(q[rows], k[rows], v[rows], pool, slots, batch, **case.options))  # type: ignore[arg-type]
            start += size
        return torch.cat(parts)

    whole = attended([n])
    assert torch.equal(attended([1] * n), whole)
    assert torch.equal(attended([5, n - 12, 7]), whole)

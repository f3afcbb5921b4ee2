"""Paged attention: the kernels against the reference in float64, and against torch's own attention."""

import random
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from guards import Guarded, guard

from patchclamp_kernels.configs import Config
from patchclamp_kernels.paged_attention import (
    Attended,
    RaggedBatch,
    Streaming,
    paged_attention,
    paged_attention_reference,
    scratch_floats,
)
from patchclamp_kernels.runtime import reference_only

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
DTYPES = list(TOLERANCE)
CPU = torch.device("cpu")
# Small tiles and splits: contexts of a hundred tokens cross many of them.
SPLITS = Config({"TILE": 16, "SPLIT": 32, "SPLITS": 4}, 4, 1)
WHOLE = Config({"TILE": 16, "SPLIT": 1024, "SPLITS": 4}, 4, 1)
ROWS = Config({"ROWS": 16, "TILE": 16}, 4, 1)
OUTPUTS = ("z", "argmax", "probability", "marked_mass", "off_sink")


class Case:
    """Random queries and a cache that is NaN wherever no token of the batch stands. `spans` are (rows, offset)."""

    def __init__(
        self,
        spans: Sequence[tuple[int, int]],
        n_heads: int = 4,
        n_kv: int = 2,
        dim: int = 16,
        block_size: int = 8,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> None:
        make = torch.Generator().manual_seed(seed)
        needed = [-(-(n + offset) // block_size) for n, offset in spans]
        self.ids = torch.randperm(sum(needed) + 3, generator=make).tolist()
        self.cache = torch.full((2, len(self.ids), block_size, n_kv, dim), float("nan"), dtype=dtype)
        listed, first = [], 0
        for (n, offset), blocks in zip(spans, needed, strict=True):
            mine = self.ids[first : first + blocks]
            listed.append((n, offset, mine))
            first += blocks
            for position in range(n + offset):
                place = (slice(None), mine[position // block_size], position % block_size)
                self.cache[place] = torch.randn(2, n_kv, dim, generator=make).to(dtype)
        self.batch = RaggedBatch.build(listed, block_size, CPU, tile_rows=32)
        self.listed = listed
        self.rows = sum(n for n, _ in spans)
        self.q = torch.randn(self.rows, n_heads, dim, generator=make).to(dtype)
        self.make = make
        self.arguments: dict = {"scale": dim**-0.5}

    def random_marks(self) -> "Case":
        self.arguments["marked"] = torch.randint(-5, 90, (self.rows, 2), generator=self.make, dtype=torch.int32)
        return self

    def run(self, config: Config = SPLITS) -> Attended:
        """Of the kernels, into guarded buffers."""
        marks = self.arguments.get("marked") is not None
        shape = tuple(self.q.shape[:2])
        buffers = {"z": Guarded((self.rows, shape[1] * self.q.shape[2]), self.q.dtype)}
        if self.arguments.get("readout"):
            buffers |= {"argmax": Guarded(shape, torch.int32), "probability": Guarded(shape, torch.float32)}
        if marks:
            buffers["marked_mass"] = Guarded(shape, torch.float32)
        if self.arguments.get("off_sink"):
            buffers["off_sink"] = Guarded(shape, torch.float32)
        floats = scratch_floats(self.q, self.cache.shape[3], self.batch, self.arguments.get("window", 0), config)
        buffers["scratch"] = Guarded((floats,), torch.float32)
        tensors = {name: buffer.tensor for name, buffer in buffers.items()}
        scratch = tensors.pop("scratch")
        result = paged_attention(
            guard(self.q).tensor,
            guard(self.cache[0]).tensor,
            guard(self.cache[1]).tensor,
            self.batch,
            **self.arguments,
            out=Attended(**tensors),
            scratch=scratch,
            config=config,
            prefill_config=ROWS,
        )
        for buffer in buffers.values():
            buffer.assert_margins_intact()
        return result

    def truth(self) -> Attended:
        exact = (x.double() for x in (self.q, *self.cache.unbind()))
        return paged_attention_reference(*exact, self.batch, **self.arguments)

    def assert_right(self, config: Config = SPLITS) -> Attended:
        mine, true = self.run(config), self.truth()
        tolerance = TOLERANCE[self.q.dtype]
        limit = tolerance * max(1.0, true.z.abs().max().item() if true.z.numel() else 1.0)
        torch.testing.assert_close(mine.z.double(), true.z, rtol=0, atol=limit)
        # Weights are computed in float32 from the inputs as they are, whatever the dtype.
        for name in ("probability", "marked_mass", "off_sink"):
            if getattr(true, name) is not None:
                torch.testing.assert_close(getattr(mine, name).double(), getattr(true, name), rtol=1e-4, atol=1e-5)
        if true.argmax is not None:
            assert torch.equal(mine.argmax, true.argmax)
        return mine


@pytest.mark.parametrize("config", [SPLITS, WHOLE], ids=["splits", "whole"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_decode_rows_are_those_of_the_reference(dtype: torch.dtype, config: Config) -> None:
    case = Case([(1, 0), (1, 40), (1, 99)], dtype=dtype).random_marks()
    case.arguments |= {"readout": True, "off_sink": True}
    case.assert_right(config)


@pytest.mark.parametrize("dtype", DTYPES)
def test_prefill_rows_are_those_of_the_reference(dtype: torch.dtype) -> None:
    case = Case([(37, 0), (5, 0)], dtype=dtype).random_marks()
    case.arguments |= {"readout": True, "off_sink": True}
    case.assert_right()


def test_off_the_sink_is_the_largest_weight_but_that_of_the_first_key() -> None:
    """Of rows that look at the first key, at another, and that see no other."""
    case = Case([(1, 40), (1, 99), (1, 0), (20, 0)], n_heads=2, n_kv=1)
    for n, (_, offset, blocks) in enumerate(case.listed):
        case.cache[0, blocks[0], 0] = 0.0 if n == 1 else 8.0 * case.q[n].sum(dim=0)
        assert offset >= 0
    case.arguments |= {"readout": True, "off_sink": True}
    for config in (SPLITS, WHOLE):
        seen = case.assert_right(config)
        assert seen.off_sink is not None
        assert seen.probability is not None
        sink = seen.argmax == 0
        assert torch.equal(seen.off_sink[~sink], seen.probability[~sink])
        assert (seen.off_sink[sink] < seen.probability[sink]).all()
        assert seen.off_sink[2].tolist() == [0.0, 0.0]


def test_decode_and_prefill_of_one_call() -> None:
    case = Case([(1, 12), (1, 70), (33, 0), (18, 21), (1, 0), (2, 50)], n_heads=2, n_kv=1).random_marks()
    case.arguments |= {"readout": True, "off_sink": True}
    assert case.batch.n_single == 2
    case.assert_right()


@pytest.mark.parametrize("context", [1, 7, 8, 9, 15, 16, 17, 31, 32, 33, 127, 128, 129, 200])
def test_a_context_may_end_anywhere_in_blocks_tiles_and_splits(context: int) -> None:
    case = Case([(1, context - 1)], n_heads=2, n_kv=1).random_marks()
    case.arguments |= {"readout": True, "off_sink": True}
    case.assert_right()


@pytest.mark.parametrize("offset", [0, 1, 15, 16, 17, 40])
@pytest.mark.parametrize("rows", [2, 16, 17, 33])
def test_a_chunk_may_begin_and_end_anywhere(offset: int, rows: int) -> None:
    Case([(rows, offset)], n_heads=2, n_kv=1).assert_right()


@pytest.mark.parametrize(("n_heads", "n_kv"), [(1, 1), (3, 3), (3, 1), (8, 2), (14, 2), (8, 1), (20, 1)])
def test_any_number_of_query_heads_a_key_head(n_heads: int, n_kv: int) -> None:
    case = Case([(1, 45), (2, 3)], n_heads=n_heads, n_kv=n_kv)
    case.arguments |= {"readout": True, "off_sink": True}
    case.assert_right()


@pytest.mark.parametrize("dim", [8, 64, 80, 96, 128, 256])
def test_any_head_dim(dim: int) -> None:
    Case([(1, 40), (3, 4)], n_heads=2, n_kv=1, dim=dim).assert_right()


@pytest.mark.parametrize("block_size", [8, 16, 32, 64])
def test_blocks_may_be_smaller_or_larger_than_tiles(block_size: int) -> None:
    Case([(1, 90), (1, 3), (20, 30)], block_size=block_size).assert_right()


@pytest.mark.parametrize("window", [1, 5, 16, 33, 1000])
@pytest.mark.parametrize("config", [SPLITS, WHOLE], ids=["splits", "whole"])
def test_a_window_hides_older_keys(window: int, config: Config) -> None:
    case = Case([(1, 3), (1, 99), (20, 45)], n_heads=2, n_kv=1).random_marks()
    case.arguments |= {"window": window, "readout": True}
    case.assert_right(config)


def test_a_soft_cap_bends_scores_and_a_window_hides_keys() -> None:
    case = Case([(1, 60), (20, 45)])
    case.q *= 10  # scores far above the cap
    case.arguments |= {"soft_cap": 3.0, "window": 21, "readout": True}
    case.random_marks().assert_right()


@pytest.mark.parametrize("flags", [[1, 1, 0, 1], [0, 0, 0, 0]])
@pytest.mark.parametrize(("sink", "recent"), [(4, 20), (0, 1), (17, 16), (90, 40)])
def test_streaming_heads_see_the_first_and_the_last_keys(flags: list[int], sink: int, recent: int) -> None:
    case = Case([(1, 4), (1, 99), (3, 50)])
    case.arguments |= {"streaming": Streaming(torch.tensor(flags).bool(), sink, recent), "readout": True}
    case.assert_right()


@pytest.mark.parametrize("window", [10, 60])
def test_a_streaming_head_may_have_a_window_too(window: int) -> None:
    case = Case([(1, 4), (1, 50), (1, 99), (3, 50)])
    flags = torch.tensor([1, 1, 0, 1], dtype=torch.int32)
    case.arguments |= {"streaming": Streaming(flags, 17, 20), "window": window, "readout": True}
    case.assert_right()


def test_evicted_keys_may_be_gone() -> None:
    """What no head can see any more is not read, and entries of the table may point anywhere in the cache."""
    for arguments in (
        {"window": 20},
        {"streaming": Streaming(torch.ones(4, dtype=torch.bool), 8, 12)},
    ):
        case = Case([(1, 99), (10, 90)])
        case.arguments |= {**arguments, "readout": True}
        true = case.truth()
        for _, _, ids in case.listed:
            case.cache[:, ids[2:8]] = float("nan")
        case.batch.block_tables[:, 2:5] = case.ids[-1]
        mine = case.run()
        torch.testing.assert_close(mine.z.double(), true.z, rtol=0, atol=1e-5)
        assert torch.equal(mine.argmax, true.argmax)


def test_a_head_is_scaled_and_a_head_scaled_by_zero_is_zero() -> None:
    case = Case([(1, 60), (1, 5), (4, 0)])
    plain = case.run().z.view(-1, 4, 16)
    factors = torch.randn(case.rows, 4, generator=case.make)
    factors[:, 1], factors[:, 2] = 0.0, 1.0
    case.arguments["head_scale"] = factors
    for config in (SPLITS, WHOLE):
        z = case.assert_right(config).z.view(-1, 4, 16)
        assert (z[:, 1] == 0).all()
    torch.testing.assert_close(z[:, 2], plain[:, 2], rtol=1e-5, atol=1e-6)


def test_marks_that_are_empty_or_outside_weigh_nothing_and_all_weighs_one() -> None:
    case = Case([(1, 60), (2, 59)], n_heads=1, n_kv=1)
    for low, high, expected in ((7, 7, 0.0), (9, 3, 0.0), (200, 300, 0.0), (-9, 0, 0.0), (-3, 1000, 1.0), (0, 61, 1.0)):
        case.arguments["marked"] = torch.tensor([[low, high]] * case.rows, dtype=torch.int32)
        mass = case.assert_right().marked_mass
        torch.testing.assert_close(mass, torch.full_like(mass, expected), rtol=0, atol=1e-6)


def test_of_equal_weights_the_first_is_named() -> None:
    """Equal keys at positions within a tile, in two tiles, and in two splits."""
    for places in ((3, 5), (3, 20), (33, 34, 70)):
        case = Case([(1, 99), (16, 72)], n_heads=2, n_kv=1)
        case.q[:] = case.q[0, 0]
        for _, _, ids in case.listed:
            for place in places:
                case.cache[0, ids[place // 8], place % 8] = case.q[0, 0] * 2
        case.arguments |= {"readout": True, "off_sink": True}
        for config in (SPLITS, WHOLE):
            mine = case.run(config).argmax
            assert (mine == places[0]).all()


def test_all_keys_equal_name_the_first_visible_one() -> None:
    case = Case([(1, 99), (20, 50)])
    case.cache[0] = torch.where(case.cache[0].isnan(), case.cache[0], 1.0)
    case.arguments |= {"readout": True, "window": 18}
    positions = torch.tensor([99, *range(50, 70)], dtype=torch.int32)
    mine = case.run()
    assert torch.equal(mine.argmax, (positions - 17)[:, None].expand(-1, 4))
    torch.testing.assert_close(mine.probability, torch.full((21, 4), 1 / 18), rtol=1e-5, atol=0)


def test_scores_far_apart_do_not_overflow() -> None:
    case = Case([(1, 70), (20, 30)])
    case.q *= 1e4
    case.arguments |= {"readout": True, "off_sink": True}
    mine = case.run()
    torch.testing.assert_close(mine.probability, torch.ones_like(mine.probability))
    assert mine.z.isfinite().all()


@pytest.mark.parametrize("config", [SPLITS, WHOLE], ids=["splits", "whole"])
def test_padding_sequences_give_zeros_and_no_key(config: Config) -> None:
    case = Case([(1, 40), (1, 7), (1, 99), (20, 0), (3, 0)]).random_marks()
    case.arguments |= {"readout": True, "off_sink": True}
    case.batch.context_lengths[torch.tensor([1, 4])] = 0
    case.batch.block_tables[1] = case.batch.block_tables[4] = case.ids[-1]
    mine = case.assert_right(config)
    for row in (1, case.rows - 1):
        assert (mine.z[row] == 0).all()
        assert (mine.argmax[row] == -1).all()
        assert (mine.probability[row] == 0).all()
        assert (mine.marked_mass[row] == 0).all()


def test_a_bound_on_the_context_larger_than_any_context_is_right() -> None:
    """As in a CUDA graph: the splits beyond a context are empty, and are treated as absent."""
    case = Case([(1, 0), (1, 20), (1, 99)]).random_marks()
    case.arguments |= {"readout": True, "off_sink": True}
    case.batch = replace(case.batch, max_context=5000)
    case.assert_right()


def test_a_context_may_have_more_splits_than_are_combined_at_a_time() -> None:
    case = Case([(1, 20), (1, 299), (1, 639)], n_heads=2, n_kv=1).random_marks()
    case.arguments |= {"readout": True, "off_sink": True}
    case.assert_right(Config({"TILE": 16, "SPLIT": 16, "SPLITS": 64}, 4, 1))


def test_no_rows() -> None:
    case = Case([])
    case.arguments |= {"readout": True, "off_sink": True}
    assert case.run().z.shape == (0, 64)
    case = Case([(0, 5), (1, 9), (0, 0), (4, 0)])
    case.assert_right()


def test_agrees_with_the_attention_of_torch() -> None:
    case = Case([(30, 0)], n_heads=6, n_kv=2)
    ids = case.listed[0][2]
    keys, values = (cache[ids].flatten(0, 1)[:30].repeat_interleave(3, 1).transpose(0, 1) for cache in case.cache)
    expected = F.scaled_dot_product_attention(case.q.transpose(0, 1), keys, values, is_causal=True)
    torch.testing.assert_close(case.run().z, expected.transpose(0, 1).reshape(30, -1), rtol=1e-5, atol=1e-5)


def test_a_chunk_row_is_the_decode_row_at_its_position() -> None:
    """Two kernels, one sequence: the last row of a prompt, and the same token decoded."""
    case = Case([(20, 30)])
    case.arguments |= {"readout": True, "off_sink": True}
    chunk = case.run()
    case.batch = RaggedBatch.build([(1, 49, case.listed[0][2])], 8, CPU)
    case.q, case.rows = case.q[-1:], 1
    single = case.run()
    torch.testing.assert_close(single.z, chunk.z[-1:], rtol=1e-5, atol=1e-5)
    assert torch.equal(single.argmax, chunk.argmax[-1:])


def test_repeats_its_bits() -> None:
    case = Case([(1, 99), (5, 30)], dtype=torch.bfloat16).random_marks()
    case.arguments |= {"readout": True, "off_sink": True}
    first, again = case.run(), case.run()
    for name in OUTPUTS:
        assert torch.equal(getattr(first, name), getattr(again, name))


def test_a_row_alone_has_the_bits_it_has_in_a_batch() -> None:
    case = Case([(1, 99), (1, 40), (3, 30)])
    whole = case.run()
    case.batch = RaggedBatch.build(case.listed[1:2], 8, CPU)
    case.q, case.rows = case.q[1:2], 1
    assert torch.equal(case.run().z, whole.z[1:2])


def test_the_default_configuration_and_the_reference_path_give_the_same() -> None:
    case = Case([(1, 300), (1, 20), (40, 30)], n_heads=2, n_kv=1).random_marks()
    case.arguments |= {"readout": True, "off_sink": True}
    mine = paged_attention(case.q, case.cache[0], case.cache[1], case.batch, **case.arguments)
    with reference_only():
        plain = paged_attention(case.q, case.cache[0], case.cache[1], case.batch, **case.arguments)
    for name in OUTPUTS:
        torch.testing.assert_close(getattr(mine, name), getattr(plain, name), rtol=1e-5, atol=1e-5)


def test_random_sweep() -> None:
    draw = random.Random(0)
    for seed in range(12):
        singles = [(1, draw.randint(0, 120)) for _ in range(draw.randint(0, 3))]
        chunks = [(draw.randint(2, 20), draw.randint(0, 30)) for _ in range(draw.randint(0, 2))]
        n_kv = draw.randint(1, 2)
        n_heads = n_kv * draw.choice([1, 2, 3])
        case = Case(
            singles + chunks,
            n_heads=n_heads,
            n_kv=n_kv,
            dim=draw.choice([8, 16, 24, 40]),
            block_size=draw.choice([8, 16, 32]),
            dtype=draw.choice(DTYPES),
            seed=seed,
        )
        case.arguments["readout"] = draw.random() < 0.5
        case.arguments["off_sink"] = draw.random() < 0.5
        if draw.random() < 0.4:
            case.arguments["window"] = draw.randint(1, 60)
        if draw.random() < 0.4:
            case.arguments["soft_cap"] = draw.uniform(1.0, 20.0)
        if draw.random() < 0.4:
            flags = torch.tensor([draw.random() < 0.6 for _ in range(n_heads)])
            case.arguments["streaming"] = Streaming(flags, draw.randint(0, 20), draw.randint(1, 50))
        if draw.random() < 0.4:
            case.arguments["head_scale"] = torch.randn(case.rows, n_heads, generator=case.make)
        if draw.random() < 0.5:
            case.random_marks()
        splits = Config({"TILE": 16, "SPLIT": 16 * draw.randint(1, 3), "SPLITS": draw.randint(1, 5)}, 4, 1)
        case.assert_right(splits)


def test_build_lists_tables_tiles_and_lengths() -> None:
    batch = RaggedBatch.build([(1, 16, [4, 2, 9]), (1, 0, [5]), (40, 0, [6, 7, 8]), (1, 3, [1])], 16, CPU, tile_rows=32)
    assert batch.block_tables.tolist() == [[4, 2, 0], [5, 0, 0], [6, 7, 8], [1, 0, 0]]
    assert batch.query_starts.tolist() == [0, 1, 2, 42, 43]
    assert batch.context_lengths.tolist() == [17, 1, 40, 4]
    assert batch.n_single == 2
    assert batch.tiles.tolist() == [[2, 0], [2, 32], [3, 0]]
    assert batch.max_context == 40
    with pytest.raises(ValueError, match=r"spans\[1\] has 17 tokens in 1 blocks"):
        RaggedBatch.build([(1, 0, [0]), (1, 16, [1])], 16, CPU)


def test_what_does_not_fit_is_refused_by_name() -> None:
    case = Case([(1, 40), (3, 9)])
    good = {
        "q": case.q,
        "key_cache": case.cache[0],
        "value_cache": case.cache[1],
        "batch": case.batch,
        "scale": 0.25,
        "config": SPLITS,
    }
    heads = torch.ones(4, dtype=torch.bool)
    bad: list[tuple[str, dict[str, object]]] = [
        ("q", {"q": case.q[:, :3]}),
        ("q", {"q": case.q.double()}),
        ("q", {"q": case.q.transpose(1, 2).contiguous().transpose(1, 2)}),
        ("key_cache", {"key_cache": case.cache[0].half()}),
        ("key_cache", {"key_cache": case.cache[0, :, :4].contiguous()}),
        ("value_cache", {"value_cache": case.cache[1, 1:]}),
        ("batch.n_single", {"batch": replace(case.batch, n_single=5)}),
        ("batch.query_starts", {"batch": replace(case.batch, query_starts=case.batch.query_starts[1:])}),
        ("batch.block_tables", {"batch": replace(case.batch, block_tables=case.batch.block_tables.long())}),
        ("batch.tile_rows", {"batch": replace(case.batch, tile_rows=24)}),
        ("window", {"window": -1}),
        ("soft_cap", {"soft_cap": -1.0}),
        ("head_scale", {"head_scale": torch.ones(4, 3)}),
        ("marked", {"marked": torch.zeros(4, 2)}),
        ("streaming.heads", {"streaming": Streaming(heads[1:], 1, 1)}),
        ("streaming.sink", {"streaming": Streaming(heads, -1, 1)}),
        ("streaming.recent", {"streaming": Streaming(heads, 1, 0)}),
        ("out.z", {"out": Attended(z=torch.zeros(4, 63))}),
        ("out.argmax", {"out": Attended(z=torch.zeros(4, 64)), "readout": True}),
        ("out.marked_mass", {"out": Attended(z=torch.zeros(4, 64), marked_mass=torch.zeros(4, 4))}),
        ("out.off_sink", {"out": Attended(z=torch.zeros(4, 64)), "off_sink": True}),
        ("scratch", {"scratch": torch.zeros(3)}),
    ]
    paged_attention(**good)
    for name, change in bad:
        with pytest.raises(ValueError, match=name):
            paged_attention(**(good | change))

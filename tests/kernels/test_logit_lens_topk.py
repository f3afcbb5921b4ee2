"""The logit lens: the right tokens in the right order, log-probabilities against float64, no reads or writes astray."""

from typing import Any

import pytest
import torch
from guards import Guarded, guard
from scratch import guarded_scratch
from torch import Tensor

from patchclamp_kernels.configs import Config
from patchclamp_kernels.logit_lens_topk import (
    NOT_FINITE,
    LensTopK,
    compile_cases,
    logit_lens_topk,
    logit_lens_topk_reference,
    normalised_reference,
    tuning_cases,
)

# Rows without a distribution make numpy warn in the interpreter.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

DTYPES = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
# Several tiles in every direction at small shapes.
SMALL = Config({"BLOCK_T": 16, "BLOCK_V": 32, "BLOCK_D": 32}, num_warps=4, num_stages=2)


def make(rows: int, vocabulary: int, d: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {
        "x": torch.randn(rows, d, generator=g).to(dtype),
        "unembedding": (3 * torch.randn(vocabulary, d, generator=g) / d**0.5).to(dtype),
        "norm_weight": (1 + 0.2 * torch.randn(d, generator=g)).to(dtype),
        "norm_bias": (0.2 * torch.randn(d, generator=g)).to(dtype),
    }


def plain(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensors[name] for name in ("x", "unembedding")}


def rms(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensors[name] for name in ("x", "unembedding", "norm_weight")}


def run(tensors: dict[str, Tensor], k: int, **options: Any) -> LensTopK:
    options.setdefault("config", SMALL)
    rows = len(tensors["x"])
    inputs = {name: guard(tensor) for name, tensor in tensors.items()}
    outputs = {
        "out_values": Guarded((rows, k), torch.float32),
        "out_ids": Guarded((rows, k), torch.int64),
        "out_log_total": Guarded((rows,), torch.float32),
    }
    given = {name: buffer.tensor for name, buffer in (inputs | outputs).items()}
    with guarded_scratch():
        found = logit_lens_topk(given.pop("x"), given.pop("unembedding"), k=k, **given, **options)
    for buffer in (*inputs.values(), *outputs.values()):
        buffer.assert_margins_intact()
    return found


def truth_of(tensors: dict[str, Tensor], soft_cap: float = 0.0) -> tuple[Tensor, Tensor]:
    """Log-probabilities of all tokens and log_total in float64, of rows rounded as the decoder rounds them."""
    wide = {name: tensor.double() for name, tensor in tensors.items()}
    h = normalised_reference(wide["x"], wide.get("norm_weight"), wide.get("norm_bias"), 1e-6)
    logits = h.to(tensors["x"].dtype).double() @ wide["unembedding"].T
    if soft_cap:
        logits = torch.tanh(logits / soft_cap) * soft_cap
    return logits.log_softmax(dim=-1), logits.logsumexp(dim=-1)


def assert_right(found: LensTopK, tensors: dict[str, Tensor], k: int, soft_cap: float = 0.0) -> None:
    truth, log_total = truth_of(tensors, soft_cap)
    # Rows normalised in float32 and in float64 may round to neighbours in the dtype of x.
    tolerance = DTYPES[tensors["x"].dtype] if "norm_weight" in tensors else 1e-5
    torch.testing.assert_close(found.log_total.double(), log_total, atol=tolerance, rtol=tolerance)
    best = truth.sort(dim=-1, descending=True).values[:, :k]
    torch.testing.assert_close(found.values.double(), best, atol=tolerance, rtol=tolerance)
    # The ids are those of the values, whichever of two near ties comes first, and each only once.
    torch.testing.assert_close(found.values.double(), truth.gather(-1, found.ids), atol=tolerance, rtol=tolerance)
    assert all(len(set(row)) == k for row in found.ids.tolist())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "vocabulary", "d", "k"), [(1, 1, 16, 1), (3, 33, 37, 33), (18, 70, 48, 3), (1, 64, 33, 64), (5, 31, 7, 3)]
)
def test_top_tokens_agree_with_float64_at_odd_shapes(
    rows: int, vocabulary: int, d: int, k: int, dtype: torch.dtype
) -> None:
    tensors = rms(make(rows, vocabulary, d, dtype))
    assert_right(run(tensors, k), tensors, k)


@pytest.mark.parametrize("dtype", DTYPES)
def test_layer_norm_is_taken_where_there_is_a_bias(dtype: torch.dtype) -> None:
    tensors = make(4, 70, 37, dtype)
    tensors["x"] += 2
    assert_right(run(tensors, 4), tensors, 4)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_without_a_norm_weight_are_taken_as_they_are(dtype: torch.dtype) -> None:
    tensors = plain(make(4, 70, 37, dtype))
    assert_right(run(tensors, 4), tensors, 4)


def test_the_norm_is_that_of_torch() -> None:
    tensors = make(3, 50, 40, torch.bfloat16)
    normed = torch.nn.functional.layer_norm(tensors["x"], (40,), tensors["norm_weight"], tensors["norm_bias"], 1e-5)
    inside = run(tensors, 6, eps=1e-5)
    outside = run({"x": normed, "unembedding": tensors["unembedding"]}, 6)
    torch.testing.assert_close(inside.values, outside.values, atol=1.6e-2, rtol=1.6e-2)
    small = rms(make(3, 50, 40))
    small["x"] *= 1e-3
    normed = torch.nn.functional.rms_norm(small["x"], (40,), small["norm_weight"], 1e-5)
    inside = run(small, 6, eps=1e-5)
    outside = run({"x": normed, "unembedding": small["unembedding"]}, 6)
    assert torch.equal(inside.ids, outside.ids)
    torch.testing.assert_close(inside.values, outside.values, atol=1e-5, rtol=1e-5)


def test_weights_of_the_norm_may_be_float32() -> None:
    tensors = make(3, 50, 40, torch.bfloat16)
    for name in ("norm_weight", "norm_bias"):
        tensors[name] = tensors[name].float() * 1.001
    assert_right(run(tensors, 6), tensors, 6)


@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_logits_are_capped_softly(scale: float) -> None:
    tensors = plain(make(3, 70, 32))
    tensors["x"] *= scale
    found = run(tensors, 5, soft_cap=7.5)
    truth, log_total = truth_of(tensors, 7.5)
    torch.testing.assert_close(found.log_total.double(), log_total, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.values.double(), truth.topk(5).values, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [3, 20])
def test_the_default_configurations_agree_too(rows: int, dtype: torch.dtype) -> None:
    tensors = rms(make(rows, 300, 72, dtype))
    assert_right(run(tensors, 3, config=None), tensors, 3)


@pytest.mark.parametrize("seed", range(10))
def test_a_random_case_agrees_with_float64(seed: int) -> None:
    g = torch.Generator().manual_seed(300 + seed)
    rows, vocabulary, d = (int(torch.randint(1, high, (), generator=g)) for high in (20, 120, 80))
    k = int(torch.randint(1, min(8, vocabulary) + 1, (), generator=g))
    tensors = make(rows, vocabulary, d, list(DTYPES)[seed % 3], seed)
    tensors = (plain, rms, dict)[seed % 4 % 3](tensors)
    soft_cap = 30.0 if seed % 5 == 0 else 0.0
    assert_right(run(tensors, k, soft_cap=soft_cap), tensors, k, soft_cap)


@pytest.mark.parametrize(
    ("k", "dtype"), [(1, torch.float16), (7, torch.bfloat16), (40, torch.float32), (64, torch.bfloat16)]
)
def test_among_equals_the_lowest_id_comes_first(k: int, dtype: torch.dtype) -> None:
    # Small integers: every sum is exact in every dtype, and most logits are tied with many.
    g = torch.Generator().manual_seed(k)
    x = torch.randint(-1, 2, (2, 20), generator=g).to(dtype)
    unembedding = torch.randint(-1, 2, (100, 20), generator=g).to(dtype)
    found = run({"x": x, "unembedding": unembedding}, k)
    wanted = logit_lens_topk_reference(x.double(), unembedding.double(), k=k)
    assert torch.equal(found.ids, wanted.ids)
    torch.testing.assert_close(found.values.double(), wanted.values, atol=1e-5, rtol=1e-5)


def test_all_of_the_top_tokens_may_lie_in_one_tile() -> None:
    unembedding = torch.zeros(130, 16)
    unembedding[96:128, 0] = torch.arange(32, 0, -1).float()
    found = run({"x": torch.eye(1, 16), "unembedding": unembedding}, 34)
    assert found.ids.tolist() == [[*range(96, 128), 0, 1]]


def test_the_last_token_of_a_tile_and_of_the_vocabulary_are_found() -> None:
    unembedding = torch.zeros(69, 33)
    # Only the last column of x and of the unembedding says anything.
    unembedding[:, 32] = -torch.ones(69)
    unembedding[[31, 32, 63, 64, 68], 32] = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    x = torch.zeros(17, 33)
    x[:, 32] = 1.0
    found = run({"x": x, "unembedding": unembedding}, 5)
    assert found.ids.tolist() == [[68, 64, 63, 32, 31]] * 17


def test_negative_logits_are_not_beaten_by_what_is_beyond_the_vocabulary() -> None:
    found = run({"x": torch.ones(1, 16), "unembedding": -torch.ones(35, 16)}, 35)
    assert found.ids.tolist() == [list(range(35))]
    assert found.log_total.item() == pytest.approx(-16 + 3.5553480, abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_row_of_nan_or_infinity_has_no_tokens_and_its_neighbours_keep_theirs(bad: float, dtype: torch.dtype) -> None:
    tensors = rms(make(4, 100, 32, dtype))
    clean = run(tensors, 6)
    tensors["x"][2, 7] = bad
    found = run(tensors, 6)
    assert found.ids[2].tolist() == [NOT_FINITE] * 6
    assert found.values[2].isnan().all()
    assert found.log_total[2].isnan()
    others = torch.tensor([0, 1, 3])
    assert torch.equal(found.ids[others], clean.ids[others])
    assert torch.equal(found.values[others], clean.values[others])
    assert torch.equal(found.log_total[others], clean.log_total[others])


@pytest.mark.parametrize("place", [0, 31, 32, 99])
def test_one_infinite_logit_is_enough(place: int) -> None:
    tensors = plain(make(2, 100, 32))
    tensors["x"] = tensors["x"].abs()
    tensors["unembedding"][place, 3] = torch.inf
    found = run(tensors, 3)
    assert (found.ids == NOT_FINITE).all()
    assert found.log_total.isnan().all()


def test_logits_of_minus_infinity_come_last_with_no_probability() -> None:
    unembedding = torch.zeros(70, 16)
    unembedding[:, 0] = -torch.inf
    unembedding[[40, 66], 0] = torch.tensor([1.0, 2.0])
    x = torch.zeros(2, 16)
    x[:, 0] = 1.0
    found = run({"x": x, "unembedding": unembedding}, 4)
    assert found.ids.tolist() == [[66, 40, 0, 1]] * 2
    assert found.values[:, 2:].eq(-torch.inf).all()
    torch.testing.assert_close(found.values[0, :2], torch.log_softmax(torch.tensor([2.0, 1.0]), 0))
    unembedding[:, 0] = -torch.inf
    nothing = run({"x": x, "unembedding": unembedding}, 4)
    assert (nothing.ids == NOT_FINITE).all()


def test_the_same_batch_twice_gives_the_same_bits_and_a_row_alone_too() -> None:
    tensors = make(18, 70, 40, torch.bfloat16)
    first, second = run(tensors, 5), run(tensors, 5)
    alone = run({**tensors, "x": tensors["x"][17:18].clone()}, 5)
    for name in ("values", "ids", "log_total"):
        assert torch.equal(getattr(first, name), getattr(second, name))
        assert torch.equal(getattr(alone, name), getattr(first, name)[17:18])


def test_scratch_is_a_small_part_of_the_logits() -> None:
    tensors = plain(make(16, 1024, 16))
    with guarded_scratch() as made:
        logit_lens_topk(
            **tensors,
            k=4,
            out_values=torch.zeros(16, 4),
            out_ids=torch.zeros(16, 4, dtype=torch.int64),
            out_log_total=torch.zeros(16),
            config=Config({"BLOCK_T": 16, "BLOCK_V": 128, "BLOCK_D": 16}),
        )
    assert sum(buffer.tensor.nbytes for buffer in made) < 16 * 1024 * 4 / 10


def test_no_rows_give_empty_results() -> None:
    lens = logit_lens_topk(torch.empty(0, 16), torch.empty(40, 16), k=3)
    assert (lens.values.shape, lens.ids.shape, lens.log_total.shape) == ((0, 3), (0, 3), (0,))
    assert (lens.values.dtype, lens.ids.dtype) == (torch.float32, torch.int64)


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("x", torch.zeros(2, 16, dtype=torch.float64)),
        ("x", torch.zeros(16)),
        ("x", torch.zeros(16, 2).T),
        ("unembedding", torch.zeros(40, 15)),
        ("unembedding", torch.zeros(40, 16, dtype=torch.bfloat16)),
        ("k", 0),
        ("k", 41),
        ("k", 65),
        ("soft_cap", -1.0),
        ("norm_weight", torch.zeros(15)),
        ("norm_weight", None),
        ("norm_bias", torch.zeros(16, dtype=torch.float16)),
        ("out_values", torch.zeros(2, 4)),
        ("out_ids", torch.zeros(2, 3, dtype=torch.int32)),
        ("out_log_total", torch.zeros(2, 1)),
    ],
)
def test_a_bad_argument_is_refused_by_its_name(name: str, bad: object) -> None:
    arguments: dict[str, Any] = {**make(2, 40, 16), "k": 3, name: bad}
    with pytest.raises(ValueError, match=name):
        logit_lens_topk(arguments.pop("x"), arguments.pop("unembedding"), **arguments)


def test_the_launcher_is_told_of_variants_in_use() -> None:
    assert len({case.name for case in compile_cases()}) == len(compile_cases())
    assert all(case.op == "logit_lens_topk" for case in tuning_cases(torch.device("meta")))

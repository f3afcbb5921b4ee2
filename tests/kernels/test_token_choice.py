"""The greedy choice and log-probabilities of given tokens, against float64 and the engine's sampler."""

import pytest
import torch
from guards import Guarded, guard
from scratch import guarded_scratch
from torch import Tensor

from patchclamp_kernels.configs import Config
from patchclamp_kernels.token_choice import (
    NOT_FINITE,
    compile_cases,
    greedy_choice,
    greedy_choice_reference,
    token_logprobs,
    token_logprobs_reference,
    tuning_cases,
)
from patchclamp_server.engine.request import SamplingParams
from patchclamp_server.engine.sampler import SamplingRow, sample

# Rows without a distribution make numpy warn in the interpreter.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SMALL = Config({"BLOCK_V": 64}, num_warps=4, num_stages=1)


def make(rows: int, vocabulary: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return (4 * torch.randn(rows, vocabulary, generator=g)).to(dtype)


def greedy(logits: Tensor, config: Config | None = SMALL) -> tuple[Tensor, Tensor]:
    given = guard(logits)
    ids, scores = Guarded((len(logits),), torch.int64), Guarded((len(logits),), torch.float32)
    with guarded_scratch():
        greedy_choice(given.tensor, out_ids=ids.tensor, out_logprobs=scores.tensor, config=config)
    for buffer in (given, ids, scores):
        buffer.assert_margins_intact()
    return ids.tensor, scores.tensor


def logprobs(logits: Tensor, ids: Tensor, config: Config | None = SMALL) -> Tensor:
    given, tokens = guard(logits), guard(ids)
    out = Guarded(tuple(ids.shape), torch.float32)
    with guarded_scratch():
        token_logprobs(given.tensor, tokens.tensor, out=out.tensor, config=config)
    for buffer in (given, tokens, out):
        buffer.assert_margins_intact()
    return out.tensor


def assert_greedy_is_right(logits: Tensor, config: Config | None = SMALL) -> None:
    ids, scores = greedy(logits, config)
    wanted, truth = greedy_choice_reference(logits.double())
    assert torch.equal(ids, wanted)
    torch.testing.assert_close(scores.double(), truth, atol=1e-5, rtol=1e-5, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "vocabulary"), [(1, 1), (3, 63), (2, 64), (5, 65), (4, 1000)])
def test_greedy_agrees_with_float64_at_odd_shapes(rows: int, vocabulary: int, dtype: torch.dtype) -> None:
    assert_greedy_is_right(make(rows, vocabulary, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "vocabulary", "n"), [(1, 1, 1), (3, 63, 2), (2, 129, 200), (4, 1000, 5)])
def test_logprobs_agree_with_float64_at_odd_shapes(rows: int, vocabulary: int, n: int, dtype: torch.dtype) -> None:
    logits = make(rows, vocabulary, dtype)
    ids = torch.randint(0, vocabulary, (rows, n), generator=torch.Generator().manual_seed(1))
    truth = torch.log_softmax(logits.double(), dim=-1).gather(-1, ids)
    torch.testing.assert_close(logprobs(logits, ids).double(), truth, atol=1e-5, rtol=1e-5)


def test_the_default_configuration_agrees_too() -> None:
    logits = make(2, 9001)
    assert_greedy_is_right(logits, config=None)
    ids = torch.tensor([[0, 9000, 4095], [4096, 8191, 8192]])
    truth = token_logprobs_reference(logits.double(), ids)
    torch.testing.assert_close(logprobs(logits, ids, config=None).double(), truth, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("seed", range(10))
def test_a_random_case_agrees_with_float64(seed: int) -> None:
    g = torch.Generator().manual_seed(200 + seed)
    rows, vocabulary, n = (int(torch.randint(1, high, (), generator=g)) for high in (6, 700, 9))
    logits = make(rows, vocabulary, DTYPES[seed % 3], seed)
    assert_greedy_is_right(logits)
    ids = torch.randint(-2, vocabulary + 2, (rows, n), generator=g)
    truth = token_logprobs_reference(logits.double(), ids)
    torch.testing.assert_close(logprobs(logits, ids).double(), truth, atol=1e-5, rtol=1e-5, equal_nan=True)


@pytest.mark.parametrize("places", [(7, 9), (63, 64), (64, 127, 128, 199), (0, 199), (199,), tuple(range(200))])
def test_the_lowest_id_among_equals_is_chosen_within_tiles_and_across(places: tuple[int, ...]) -> None:
    logits = torch.full((1, 200), -3.0)
    logits[0, list(places)] = 2.5
    assert greedy(logits)[0].item() == min(places)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("place", [0, 63, 64, 199])
def test_a_row_with_nan_or_infinity_has_no_choice_and_its_neighbours_keep_theirs(bad: float, place: int) -> None:
    logits = make(3, 200)
    clean_ids, clean_scores = greedy(logits)
    logits[1, place] = bad
    ids, scores = greedy(logits)
    assert ids[1] == NOT_FINITE
    assert scores[1].isnan()
    for row in (0, 2):
        assert ids[row] == clean_ids[row]
        assert scores[row] == clean_scores[row]
    found = logprobs(logits, torch.tensor([[0, 5], [0, 5], [0, 5]]))
    assert found.isnan().tolist() == [[False] * 2, [True] * 2, [False] * 2]


def test_a_row_of_nothing_but_minus_infinity_has_no_choice() -> None:
    logits = make(2, 150)
    logits[0] = -torch.inf
    ids, scores = greedy(logits)
    assert ids[0] == NOT_FINITE
    assert scores[0].isnan()
    assert ids[1] == logits[1].argmax()
    assert logprobs(logits, torch.tensor([[3], [3]])).isnan().tolist() == [[True], [False]]


def test_tiles_of_nothing_but_minus_infinity_are_no_obstacle() -> None:
    logits = torch.full((1, 200), -torch.inf)
    logits[0, 130], logits[0, 140] = -5.0, -5.0
    ids, scores = greedy(logits)
    assert ids.item() == 130
    assert scores.item() == pytest.approx(-0.6931472, abs=1e-6)
    assert logprobs(logits, torch.tensor([[0, 140]])).tolist() == [[-torch.inf, scores.item()]]


def test_an_id_outside_of_the_vocabulary_is_not_read() -> None:
    found = logprobs(make(1, 100), torch.tensor([[-1, 0, 99, 100, 2**40, -(2**40)]]))
    assert found.isnan().tolist() == [[True, False, False, True, True, True]]


def test_large_logits_lose_no_precision() -> None:
    logits = make(2, 300)
    shifted = logits.double() + 4096
    _, scores = greedy(shifted.float())
    _, truth = greedy_choice_reference(shifted.float().double())
    torch.testing.assert_close(scores.double(), truth, atol=1e-5, rtol=1e-5)


def test_greedy_chooses_as_the_engine_samples_at_temperature_0() -> None:
    logits = make(6, 333)
    logits[1, 40] = torch.nan
    logits[2, 50] = torch.inf
    logits[3] = -torch.inf
    logits[4, [20, 100, 300]] = 50.0
    row = SamplingRow(SamplingParams(temperature=0.0), 0, [], [])
    assert greedy(logits)[0].tolist() == [sampled.id for sampled in sample(logits, [row] * 6)]


def test_the_same_batch_twice_gives_the_same_bits_and_a_row_alone_too() -> None:
    logits = make(5, 500, torch.bfloat16)
    ids = torch.arange(25).view(5, 5)
    once, again = greedy(logits), greedy(logits)
    assert torch.equal(once[0], again[0])
    assert torch.equal(once[1], again[1])
    assert torch.equal(greedy(logits[3:4])[1], once[1][3:4])
    assert torch.equal(logprobs(logits, ids), logprobs(logits, ids))
    assert torch.equal(logprobs(logits[3:4], ids[3:4]), logprobs(logits, ids)[3:4])


def test_the_score_of_the_choice_is_its_logprob() -> None:
    logits = make(4, 300)
    ids, scores = greedy(logits)
    torch.testing.assert_close(logprobs(logits, ids[:, None]).squeeze(-1), scores, atol=1e-6, rtol=1e-6)


def test_no_rows_and_no_ids_give_empty_results() -> None:
    ids, scores = greedy_choice(torch.empty(0, 50))
    assert (ids.shape, ids.dtype, scores.shape) == ((0,), torch.int64, (0,))
    assert token_logprobs(torch.zeros(3, 50), torch.empty(3, 0, dtype=torch.int64)).shape == (3, 0)


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("logits", torch.zeros(3)),
        ("logits", torch.zeros(3, 0)),
        ("logits", torch.zeros(3, 8, dtype=torch.float64)),
        ("logits", torch.zeros(8, 3).T),
        ("out_ids", torch.zeros(3, dtype=torch.int32)),
        ("out_logprobs", torch.zeros(2)),
    ],
)
def test_a_bad_argument_of_greedy_choice_is_refused_by_its_name(name: str, bad: Tensor) -> None:
    arguments = {"logits": torch.zeros(3, 8), name: bad}
    with pytest.raises(ValueError, match=name):
        greedy_choice(**arguments)


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("ids", torch.zeros(2, 2, dtype=torch.int64)),
        ("ids", torch.zeros(3, dtype=torch.int64)),
        ("ids", torch.zeros(3, 2, dtype=torch.int32)),
        ("out", torch.zeros(3, 1)),
        ("logits", torch.zeros(3, 8, dtype=torch.int64)),
    ],
)
def test_a_bad_argument_of_token_logprobs_is_refused_by_its_name(name: str, bad: Tensor) -> None:
    arguments = {"logits": torch.zeros(3, 8), "ids": torch.zeros(3, 2, dtype=torch.int64), name: bad}
    with pytest.raises(ValueError, match=name):
        token_logprobs(**arguments)


def test_the_launcher_is_told_of_variants_in_use() -> None:
    assert len({case.name for case in compile_cases()}) == len(compile_cases())
    assert all(case.op == "token_choice" for case in tuning_cases(torch.device("meta")))

"""Statistics of projections: what is counted, what is not, and that counting twice gives the same bits."""

from dataclasses import dataclass

import pytest
import torch
from guards import Guarded, guard
from scratch import guarded_scratch
from torch import Tensor

from patchclamp_kernels.configs import Config
from patchclamp_kernels.probe_statistics import (
    compile_cases,
    probe_statistics,
    probe_statistics_reference,
    tuning_cases,
)

# NaN and infinity make numpy warn in the interpreter.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

DTYPES = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
# Several tiles in every direction at small shapes.
SMALL = Config({"BLOCK_T": 16, "BLOCK_P": 16, "BLOCK_D": 32}, num_warps=4, num_stages=2)
NAMES = ("histogram", "count", "not_finite", "fired", "total", "total_squares", "largest")


@dataclass
class Case:
    x: Tensor
    probes: Tensor
    offsets: Tensor
    low: Tensor
    high: Tensor
    thresholds: Tensor
    row_mask: Tensor


def make(rows: int, number: int, d: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Case:
    g = torch.Generator().manual_seed(seed)
    return Case(
        x=torch.randn(rows, d, generator=g).to(dtype),
        probes=(torch.randn(number, d, generator=g) / d**0.5).to(dtype),
        offsets=torch.randn(number, generator=g),
        low=-1 - torch.rand(number, generator=g),
        high=1 + torch.rand(number, generator=g),
        thresholds=torch.rand(number, generator=g) - 0.3,
        row_mask=torch.randint(0, 2, (rows,), generator=g, dtype=torch.int32),
    )


def empty_statistics(number: int, bins: int, sums: torch.dtype = torch.float64) -> dict[str, Tensor]:
    counts = {name: torch.zeros(number, dtype=torch.int64) for name in NAMES[1:4]}
    return {
        "histogram": torch.zeros(number, bins + 2, dtype=torch.int64),
        **counts,
        "total": torch.zeros(number, dtype=sums),
        "total_squares": torch.zeros(number, dtype=sums),
        "largest": torch.full((number,), -torch.inf),
    }


def run(
    case: Case,
    *,
    bins: int = 7,
    options: tuple[str, ...] = ("offsets", "row_mask", "thresholds"),
    start: dict[str, Tensor] | None = None,
    config: Config | None = SMALL,
    sums: torch.dtype = torch.float64,
    values: bool = True,
) -> tuple[dict[str, Tensor], Tensor | None]:
    """Statistics and values by the kernel, with every buffer between margins."""
    rows, number = len(case.x), len(case.probes)
    start = empty_statistics(number, bins, sums) if start is None else start
    kept = {name: guard(tensor) for name, tensor in start.items()}
    inputs = {name: guard(getattr(case, name)) for name in ("x", "probes", "low", "high", *options)}
    given = {name: g.tensor for name, g in (inputs | kept).items()}
    if "thresholds" not in options:
        del given["fired"]
    out = Guarded((rows, number), torch.float32) if values else None
    into = None if out is None else out.tensor
    with guarded_scratch():
        returned = probe_statistics(given.pop("x"), given.pop("probes"), **given, out_values=into, config=config)
    for buffer in (*kept.values(), *inputs.values(), *([] if out is None else [out])):
        buffer.assert_margins_intact()
    assert (returned is None) == (out is None)
    return {name: g.tensor for name, g in kept.items()}, returned


def reference(
    case: Case, *, bins: int = 7, options: tuple[str, ...] = ("offsets", "row_mask", "thresholds")
) -> tuple[dict[str, Tensor], Tensor]:
    """The float64 truth. Counts of values at an edge are not to be compared with it: see `counts_of`."""
    statistics = empty_statistics(len(case.probes), bins)
    given = {name: getattr(case, name) for name in options}
    kept = statistics if "thresholds" in options else {k: v for k, v in statistics.items() if k != "fired"}
    values = probe_statistics_reference(
        case.x.double(), case.probes.double(), low=case.low, high=case.high, **given, **kept
    )
    return statistics, values


def counts_of(values: Tensor, case: Case, bins: int, options: tuple[str, ...]) -> dict[str, Tensor]:
    """What a plain loop counts of these very values: no rounding stands between it and the kernel."""
    statistics = empty_statistics(values.shape[1], bins)
    for t in range(values.shape[0]):
        if "row_mask" in options and not case.row_mask[t]:
            continue
        for p in range(values.shape[1]):
            v, low, high = values[t, p], case.low[p], case.high[p]
            if not v.isfinite():
                statistics["not_finite"][p] += 1
                continue
            width = torch.tensor(float(bins)) / (high - low)
            inside = 1 + min(max(int(((v - low) * width).floor().clamp(-1, bins)), 0), bins - 1)
            slot = 0 if v < low else bins + 1 if v >= high else inside
            statistics["histogram"][p, slot] += 1
            statistics["count"][p] += 1
            if "thresholds" in options:
                statistics["fired"][p] += int(v > case.thresholds[p])
    return {name: statistics[name] for name in ("histogram", "count", "not_finite", "fired")}


def assert_right(case: Case, *, bins: int = 7, options: tuple[str, ...], config: Config | None = SMALL) -> None:
    found, values = run(case, bins=bins, options=options, config=config)
    wanted, truth = reference(case, bins=bins, options=options)
    tolerance = DTYPES[case.x.dtype]
    assert values is not None
    torch.testing.assert_close(values.double(), truth, atol=tolerance, rtol=tolerance)
    for name, counts in counts_of(values, case, bins, options).items():
        assert torch.equal(found[name], counts), name
    atol = tolerance * max(1, len(case.x)) ** 0.5
    for name in ("total", "total_squares"):
        torch.testing.assert_close(found[name], wanted[name], atol=atol, rtol=tolerance)
    torch.testing.assert_close(found["largest"].double(), wanted["largest"].double(), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "number", "d"), [(1, 1, 16), (5, 3, 37), (33, 17, 100), (16, 16, 32)])
def test_statistics_agree_with_float64_at_odd_shapes(rows: int, number: int, d: int, dtype: torch.dtype) -> None:
    assert_right(make(rows, number, d, dtype), options=("offsets", "row_mask", "thresholds"))


@pytest.mark.parametrize(
    "options", [(), ("offsets",), ("row_mask",), ("thresholds",), ("offsets", "row_mask", "thresholds")]
)
def test_each_option_alone_and_all_together(options: tuple[str, ...]) -> None:
    assert_right(make(21, 5, 48), options=options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [3, 70])
def test_the_default_configurations_agree_too(rows: int, dtype: torch.dtype) -> None:
    assert_right(make(rows, 19, 72, dtype), options=("offsets", "row_mask"), config=None)


@pytest.mark.parametrize("seed", range(10))
def test_a_random_case_agrees_with_float64(seed: int) -> None:
    g = torch.Generator().manual_seed(100 + seed)
    rows, number, d, bins = (int(torch.randint(1, high, (), generator=g)) for high in (40, 30, 70, 12))
    dtype = list(DTYPES)[seed % 3]
    names = ("offsets", "row_mask", "thresholds")
    options = tuple(name for name in names if torch.rand((), generator=g) < 0.6)
    assert_right(make(rows, number, d, dtype, seed), bins=bins, options=options)


@pytest.mark.parametrize("rows", [9, 40])
def test_a_row_of_nan_or_infinity_is_counted_apart_and_poisons_nothing(rows: int) -> None:
    case = make(rows, 6, 24)
    options = ("offsets", "thresholds")
    case.x[2, 5] = torch.nan
    case.x[4] = torch.inf
    whole, _ = run(case, options=options)
    assert whole["not_finite"].tolist() == [2] * 6
    assert whole["count"].tolist() == [rows - 2] * 6
    case.x[2], case.x[4] = 0.0, 0.0
    case.row_mask[:] = 1
    case.row_mask[2], case.row_mask[4] = 0, 0
    without, _ = run(case, options=("offsets", "thresholds", "row_mask"))
    for name in NAMES:
        if name != "not_finite":
            assert torch.equal(whole[name], without[name]), name


def test_a_probe_of_nan_spoils_no_other_probe() -> None:
    case = make(20, 6, 24)
    clean, _ = run(case, options=())
    case.probes[3] = torch.nan
    found, _ = run(case, options=())
    assert found["not_finite"].tolist() == [0, 0, 0, 20, 0, 0]
    others = torch.tensor([0, 1, 2, 4, 5])
    for name in NAMES:
        assert torch.equal(found[name][others], clean[name][others]), name


def test_every_tile_of_a_long_prompt_is_added() -> None:
    # One row more than the tiles that the second pass reads at once.
    assert_right(make(16 * 16 + 1, 2, 16), options=("offsets",))


@pytest.mark.parametrize("values", [False, True])
@pytest.mark.parametrize("rows", [4, 36])
def test_rows_all_masked_change_nothing_even_where_they_are_nan(rows: int, values: bool) -> None:
    case = make(rows, 5, 24)
    case.row_mask.zero_()
    case.x[1] = torch.nan
    found, _ = run(case, values=values)
    for name, before in empty_statistics(5, 7).items():
        assert torch.equal(found[name], before), name


def test_values_are_given_for_masked_rows_too() -> None:
    case = make(20, 5, 24)
    case.row_mask.zero_()
    _, values = run(case)
    _, all_counted = run(case, options=("offsets",))
    assert values is not None
    assert all_counted is not None
    assert torch.equal(values, all_counted)


def test_statistics_do_not_depend_on_whether_values_are_asked_for() -> None:
    case = make(37, 5, 40)
    case.row_mask[:16] = 0
    with_values, _ = run(case, values=True)
    without, _ = run(case, values=False)
    assert all(torch.equal(with_values[name], without[name]) for name in NAMES)


def test_values_on_the_edges_of_bins_belong_to_the_bin_above() -> None:
    # Range [-2, 2) in 4 bins, values that float32 holds exactly.
    edges = torch.tensor([-3.0, -2.0, -1.0, -0.5, 0.0, 1.0, 1.999, 2.0, 5.0])
    x = torch.zeros(9, 16)
    x[:, 3] = edges
    case = make(9, 1, 16)
    case.x, case.probes = x, torch.nn.functional.one_hot(torch.tensor([3]), 16).float()
    case.low, case.high, case.thresholds = torch.tensor([-2.0]), torch.tensor([2.0]), torch.tensor([1.0])
    found, _ = run(case, bins=4, options=("thresholds",))
    assert found["histogram"].tolist() == [[1, 1, 2, 1, 2, 2]]
    assert found["fired"].item() == 3
    assert found["largest"].item() == 5.0


def test_an_empty_range_leaves_the_outer_slots() -> None:
    case = make(11, 3, 16)
    case.high = case.low.clone()
    found, _ = run(case, options=())
    assert found["histogram"][:, 1:-1].sum() == 0
    assert found["histogram"].sum(-1).tolist() == [11] * 3


@pytest.mark.parametrize("rows", [7, 50])
def test_batches_add_up(rows: int) -> None:
    case = make(rows, 4, 32)
    once, _ = run(case)
    twice, _ = run(case, start={name: tensor.clone() for name, tensor in once.items()})
    for name in NAMES:
        wanted = once[name] if name == "largest" else 2 * once[name]
        torch.testing.assert_close(twice[name], wanted, rtol=1e-12, atol=0)


def test_the_largest_of_earlier_batches_is_kept() -> None:
    case = make(40, 3, 32)
    start = empty_statistics(3, 7)
    start["largest"][:] = torch.tensor([100.0, -100.0, 7.0])
    found, values = run(case, start=start, options=())
    assert values is not None
    assert torch.equal(found["largest"], torch.maximum(torch.tensor([100.0, -100.0, 7.0]), values.amax(0)))


@pytest.mark.parametrize("sums", [torch.float32, torch.float64])
@pytest.mark.parametrize("rows", [12, 45])
def test_the_same_batch_twice_gives_the_same_bits(rows: int, sums: torch.dtype) -> None:
    case = make(rows, 6, 40, torch.bfloat16)
    (first, values), (second, again) = run(case, sums=sums), run(case, sums=sums)
    assert all(torch.equal(first[name], second[name]) for name in NAMES)
    assert values is not None
    assert again is not None
    assert torch.equal(values, again)


def test_the_value_of_a_row_does_not_depend_on_its_batch() -> None:
    case = make(40, 6, 40, torch.bfloat16)
    _, whole = run(case, options=("offsets",))
    alone = make(40, 6, 40, torch.bfloat16)
    alone.x = case.x[33:34].clone()
    _, value = run(alone, options=("offsets",))
    assert whole is not None
    assert value is not None
    assert torch.equal(whole[33:34], value)


def test_large_float64_sums_keep_small_additions() -> None:
    case = make(3, 2, 16)
    start = empty_statistics(2, 7)
    start["total"].fill_(1e12)
    found, values = run(case, start=start, options=())
    assert values is not None
    torch.testing.assert_close(found["total"] - 1e12, values.double().sum(0), atol=1e-3, rtol=0)


@pytest.mark.parametrize(("rows", "number"), [(0, 4), (4, 0)])
def test_no_rows_or_no_probes_change_nothing(rows: int, number: int) -> None:
    case = make(rows, number, 16)
    found, values = run(case)
    assert values is not None
    assert values.shape == (rows, number)
    assert all(torch.equal(found[name], before) for name, before in empty_statistics(number, 7).items())


def test_values_are_returned_where_asked_for() -> None:
    case = make(4, 3, 16)
    statistics = empty_statistics(3, 7)
    del statistics["fired"]
    plain = {"low": case.low, "high": case.high, **statistics}
    assert probe_statistics(case.x, case.probes, **plain) is None
    values = probe_statistics(case.x, case.probes, **plain, return_values=True)
    assert values is not None
    torch.testing.assert_close(values, case.x @ case.probes.T, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("x", torch.zeros(4, 16, dtype=torch.float64)),
        ("x", torch.zeros(4)),
        ("probes", torch.zeros(3, 15)),
        ("probes", torch.zeros(3, 16, dtype=torch.bfloat16)),
        ("low", torch.zeros(2)),
        ("high", torch.zeros(3, dtype=torch.float64)),
        ("offsets", torch.zeros(4)),
        ("thresholds", None),
        ("row_mask", torch.zeros(4, dtype=torch.bool)),
        ("row_mask", torch.zeros(3, dtype=torch.int32)),
        ("histogram", torch.zeros(3, 2, dtype=torch.int64)),
        ("histogram", torch.zeros(3, 9, dtype=torch.int32)),
        ("histogram", torch.zeros(9, 3, dtype=torch.int64).T),
        ("count", torch.zeros(3, dtype=torch.int32)),
        ("not_finite", torch.zeros(4, dtype=torch.int64)),
        ("fired", torch.zeros(3)),
        ("total", torch.zeros(3, dtype=torch.float16)),
        ("total_squares", torch.zeros(3)),
        ("largest", torch.zeros(3, dtype=torch.float64)),
        ("out_values", torch.zeros(4, 2)),
    ],
)
def test_a_bad_argument_is_refused_by_its_name(name: str, bad: Tensor | None) -> None:
    case = make(4, 3, 16)
    arguments = {**vars(case), **empty_statistics(3, 7), name: bad}
    with pytest.raises(ValueError, match=name):
        probe_statistics(arguments.pop("x"), arguments.pop("probes"), **arguments)


def test_the_launcher_is_told_of_variants_in_use() -> None:
    assert len({case.name for case in compile_cases()}) == len(compile_cases())
    assert all(case.op == "probe_statistics" for case in tuning_cases(torch.device("meta")))

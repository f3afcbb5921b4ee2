"""Latents of a sparse autoencoder set and scaled by the exact change of the residual stream."""

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from guards import Guarded, guard
from torch import Tensor

from patchclamp_kernels.configs import Config
from patchclamp_kernels.feature_clamp import compile_cases, feature_clamp, feature_clamp_reference, tuning_cases
from patchclamp_kernels.runtime import reference_only

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
# Several blocks of latents at few of them.
SMALL = Config({"BLOCK_FEATURES": 2}, num_warps=4, num_stages=1)
LATENTS = 30


@dataclass
class Case:
    x: Tensor
    encoder: Tensor
    encoder_bias: Tensor
    decoder: Tensor
    decoder_bias: Tensor | None
    starts: Tensor
    features: Tensor
    targets: Tensor
    scales: Tensor
    strength: Tensor
    activation: str = "relu"
    threshold: Tensor | None = None
    apply_decoder_bias_to_input: bool = False

    def wide(self) -> "Case":
        """In float64, each number on its own."""
        parts = {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in vars(self).items()}
        return Case(**parts)

    def copy(self) -> "Case":
        return Case(**{k: v.clone() if isinstance(v, Tensor) else v for k, v in vars(self).items()})


def make(
    counts: list[int],
    d: int = 40,
    dtype: torch.dtype = torch.float32,
    *,
    weights: torch.dtype | None = None,
    jump: bool = False,
    centred: bool = False,
    seed: int = 0,
) -> Case:
    """Rows with `counts` latents each; half of them are set, half scaled."""
    g = torch.Generator().manual_seed(seed)
    n, kept = sum(counts), weights or dtype

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    chosen = [torch.randperm(LATENTS, generator=g)[:k] for k in counts]
    is_set = torch.arange(n) % 2 == 0
    numbers = normal(n)
    return Case(
        x=normal(len(counts), d).to(dtype),
        encoder=(normal(LATENTS, d) / d**0.5).to(kept),
        encoder_bias=(0.5 + normal(LATENTS)).to(kept),
        decoder=(normal(LATENTS, d) / d**0.5).to(kept),
        decoder_bias=normal(d).to(kept) if centred else None,
        starts=torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()], dtype=torch.int32),
        features=torch.cat([*chosen, torch.empty(0, dtype=torch.int64)]).int(),
        targets=torch.where(is_set, 3 * numbers, 0.0),
        scales=torch.where(is_set, 0.0, numbers),
        strength=torch.tensor([1.0, 1.0, 0.4, -0.7]).repeat(n)[:n],
        activation="jumprelu" if jump else "relu",
        threshold=(0.3 + 0.5 * torch.rand(LATENTS, generator=g)).to(kept) if jump else None,
        apply_decoder_bias_to_input=centred,
    )


def run(case: Case, config: Config | None = SMALL) -> tuple[Tensor, Tensor]:
    """x and f by the kernel, with margins around everything."""
    guarded = {name: guard(part) for name, part in vars(case).items() if isinstance(part, Tensor)}
    out = Guarded((len(case.features),), torch.float32)
    given = vars(case) | {name: g.tensor for name, g in guarded.items()}
    values = feature_clamp(given.pop("x"), **given, out=out.tensor, config=config)
    assert values.data_ptr() == out.tensor.data_ptr()
    for name, g in guarded.items():
        g.assert_margins_intact()
        assert name == "x" or torch.equal(g.tensor, getattr(case, name))
    out.assert_margins_intact()
    return guarded["x"].tensor, out.tensor


def truth(case: Case) -> tuple[Tensor, Tensor]:
    """By the reference in float64."""
    wide = case.wide().copy()
    given = vars(wide)
    x = given.pop("x")
    values = feature_clamp_reference(x, **given)
    return x, values


def one_by_one(case: Case) -> tuple[Tensor, Tensor]:
    """The same in another way, in float64: a loop over latents, each seeing only the original row."""
    c = case.wide()
    edited, values = c.x.clone(), torch.zeros(len(c.features), dtype=torch.float64)
    for t in range(len(c.x)):
        for i in range(int(c.starts[t]), int(c.starts[t + 1])):
            j = int(c.features[i])
            h = c.x[t] - c.decoder_bias if c.apply_decoder_bias_to_input and c.decoder_bias is not None else c.x[t]
            f = max(float(h @ c.encoder[j] + c.encoder_bias[j]), 0.0)
            if c.threshold is not None and f <= c.threshold[j]:
                f = 0.0
            values[i] = f
            edited[t] += c.strength[i] * (c.scales[i] * f + c.targets[i] - f) * c.decoder[j]
    return edited, values


def assert_close(got: Tensor, wanted: Tensor, dtype: torch.dtype = torch.float32) -> None:
    scale = max(1.0, float(wanted.abs().max())) if wanted.numel() else 1.0
    torch.testing.assert_close(got.double(), wanted, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * scale)


def assert_agrees(case: Case, config: Config | None = SMALL) -> None:
    (x, values), (wanted_x, wanted_values) = run(case, config), truth(case)
    assert_close(x, wanted_x, case.x.dtype)
    # f is made in fp32 of the very inputs, whatever their dtype.
    assert_close(values, wanted_values)


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("jump", [False, True])
def test_the_reference_is_the_formula_taken_one_latent_at_a_time(jump: bool, centred: bool) -> None:
    case = make([3, 0, 5], jump=jump, centred=centred)
    for got, wanted in zip(truth(case), one_by_one(case), strict=True):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("jump", [False, True])
def test_rows_become_those_of_the_reference(jump: bool, centred: bool, dtype: torch.dtype) -> None:
    assert_agrees(make([3, 0, 1, 7], dtype=dtype, jump=jump, centred=centred))


@pytest.mark.parametrize("d", [1, 16, 33, 64, 100])
def test_any_width_is_edited_whole(d: int) -> None:
    assert_agrees(make([3, 2], d))


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
def test_any_number_of_latents_fills_its_blocks(count: int) -> None:
    assert_agrees(make([count, 2]))


@pytest.mark.parametrize("weights", TOLERANCE)
def test_the_autoencoder_may_have_another_dtype_than_the_model(weights: torch.dtype) -> None:
    assert_agrees(make([3, 4], dtype=torch.float16, weights=weights, jump=True, centred=True))


def test_the_default_configuration_agrees_too() -> None:
    assert_agrees(make([9, 20, 0], jump=True, centred=True), None)


def test_a_latent_that_is_set_has_the_value_afterwards() -> None:
    # Rows of the decoder are orthonormal and equal the encoder's, so that latents do not disturb each other.
    basis = torch.linalg.qr(torch.randn(40, LATENTS, generator=torch.Generator().manual_seed(2))).Q.T.contiguous()
    case = make([4])
    case = replace(case, encoder=basis, decoder=basis, encoder_bias=torch.zeros(LATENTS))
    case = replace(case, targets=torch.tensor([1.0, 2.0, 3.0, 0.0]), scales=torch.zeros(4), strength=torch.ones(4))
    # Only latents that were active can be read off a projection.
    x = case.x + (5 * basis[case.features.long()]).sum(0)
    edited, _ = run(replace(case, x=x))
    projections = edited[0] @ basis[case.features.long()].T
    torch.testing.assert_close(projections, case.targets, atol=1e-4, rtol=0)


def test_what_the_autoencoder_cannot_express_stays_in_the_row() -> None:
    case = make([2])
    case = replace(case, scales=torch.ones(2), targets=torch.zeros(2), encoder_bias=torch.full((LATENTS,), 5.0))
    x, values = run(case)
    assert values.any()
    assert torch.equal(x, case.x)


def test_rows_without_latents_keep_their_bits() -> None:
    case = make([0, 3, 0], dtype=torch.bfloat16)
    x, _ = run(case)
    assert torch.equal(x[[0, 2]].view(torch.int16), case.x[[0, 2]].view(torch.int16))
    assert not torch.equal(x[1], case.x[1])


def test_a_strength_of_zero_leaves_the_row_alone() -> None:
    case = make([3, 4], dtype=torch.float16)
    x, values = run(replace(case, strength=torch.zeros(7)))
    assert torch.equal(x, case.x)
    assert_close(values, truth(case)[1])


def test_the_order_of_latents_does_not_matter() -> None:
    case = make([6])
    turned = torch.tensor([3, 5, 0, 1, 4, 2])
    numbers = {name: getattr(case, name)[turned] for name in ("features", "targets", "scales", "strength")}
    (x, values), (other_x, other_values) = run(case), run(replace(case, **numbers))
    torch.testing.assert_close(other_x, x)
    torch.testing.assert_close(other_values, values[turned])


def test_a_value_at_the_threshold_of_jumprelu_is_closed() -> None:
    case = make([2], jump=True)
    case = replace(case, encoder=torch.zeros(LATENTS, 40), encoder_bias=torch.full((LATENTS,), 0.5))
    threshold = torch.full((LATENTS,), 0.5)
    threshold[case.features[1]] = 0.4999
    assert run(replace(case, threshold=threshold))[1].tolist() == [0.0, 0.5]


def test_a_negative_latent_is_zero_also_where_its_threshold_is_negative() -> None:
    case = make([1], jump=True)
    case = replace(case, encoder=torch.zeros(LATENTS, 40), encoder_bias=torch.full((LATENTS,), -0.5))
    assert run(replace(case, threshold=torch.full((LATENTS,), -1.0)))[1].tolist() == [0.0]


def test_a_nan_in_the_row_is_not_hidden() -> None:
    case = make([2, 2])
    case.x[0, 3] = float("nan")
    x, values = run(case)
    assert values.isnan().tolist() == [True, True, False, False]
    assert x[0].isnan().all()
    assert not x[1].isnan().any()


def test_room_for_more_latents_than_there_are_is_left_alone() -> None:
    case = make([3, 2])
    more = {name: torch.cat((getattr(case, name), torch.full((4,), 1e9))) for name in ("targets", "scales", "strength")}
    features = torch.cat((case.features, torch.full((4,), 2**30, dtype=torch.int32)))
    x, values = run(replace(case, features=features, **more))
    wanted_x, wanted_values = run(case)
    assert torch.equal(x, wanted_x)
    assert torch.equal(values[:5], wanted_values)
    assert values[5:].isnan().all()


@pytest.mark.parametrize("counts", [[], [0], [0, 0]])
def test_no_rows_and_no_latents_change_nothing(counts: list[int]) -> None:
    case = make(counts)
    x, values = run(case)
    assert torch.equal(x, case.x)
    assert values.shape == (0,)


def test_a_row_alone_has_the_bits_of_the_row_in_a_batch() -> None:
    case = make([3, 5, 2], dtype=torch.float16)
    own = slice(3, 8)
    numbers = {name: getattr(case, name)[own].clone() for name in ("features", "targets", "scales", "strength")}
    alone = replace(case, x=case.x[1:2].clone(), starts=torch.tensor([0, 5], dtype=torch.int32), **numbers)
    (x, values), (alone_x, alone_values) = run(case), run(alone)
    assert torch.equal(x[1:2], alone_x)
    assert torch.equal(values[own], alone_values)


def test_the_same_batch_twice_gives_the_same_bits() -> None:
    case = make([3, 5, 2], dtype=torch.bfloat16)
    for first, second in zip(run(case), run(case), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("seed", range(12))
def test_random_cases_agree_with_float64(seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    counts = torch.randint(0, 9, (1 + seed % 4,), generator=g).tolist()
    dtype = list(TOLERANCE)[seed % 3]
    case = make(counts, 1 + 13 * seed, dtype, jump=seed % 2 == 0, centred=seed % 4 < 2, seed=seed)
    assert_agrees(case, replace(SMALL, blocks={"BLOCK_FEATURES": 1 << seed % 4}))


def test_the_reference_takes_the_same_arguments() -> None:
    case = make([3, 0, 4], jump=True, centred=True)
    x, values = run(case)
    with reference_only():
        wanted_x, wanted_values = run(case)
    torch.testing.assert_close(x, wanted_x)
    torch.testing.assert_close(values, wanted_values)


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("x", {"x": torch.zeros(2, 40, dtype=torch.float64)}),
        ("x", {"x": torch.zeros(40, 2).T}),
        ("x", {"x": torch.zeros(2, 16385)}),
        ("encoder", {"encoder": torch.zeros(LATENTS, 41)}),
        ("encoder_bias", {"encoder_bias": torch.zeros(LATENTS - 1)}),
        ("decoder", {"decoder": torch.zeros(LATENTS + 1, 40)}),
        ("decoder", {"decoder": torch.zeros(LATENTS, 40, dtype=torch.float16)}),
        ("decoder_bias", {"decoder_bias": torch.zeros(LATENTS)}),
        ("apply_decoder_bias_to_input", {"apply_decoder_bias_to_input": True}),
        ("activation", {"activation": "topk"}),
        ("threshold", {"activation": "jumprelu"}),
        ("threshold", {"threshold": torch.zeros(LATENTS)}),
        ("threshold", {"activation": "jumprelu", "threshold": torch.zeros(1)}),
        ("starts", {"starts": torch.zeros(2, dtype=torch.int32)}),
        ("starts", {"starts": torch.zeros(3)}),
        ("features", {"features": torch.zeros(5)}),
        ("targets", {"targets": torch.zeros(4)}),
        ("scales", {"scales": torch.zeros(5, dtype=torch.float64)}),
        ("strength", {"strength": torch.zeros(1, 5)}),
        ("out", {"out": torch.zeros(4)}),
    ],
)
def test_wrong_arguments_are_refused_by_name(name: str, changed: dict[str, Any]) -> None:
    arguments = vars(make([3, 2])) | changed
    with pytest.raises(ValueError, match=f"^{name} "):
        feature_clamp(arguments.pop("x"), **arguments)


def test_there_are_cases_to_compile_and_to_tune() -> None:
    assert len({case.name for case in compile_cases()}) == len(compile_cases()) == 8
    assert {case.bucket for case in tuning_cases(torch.device("cpu"))} == {"d=4096", "d=2048"}

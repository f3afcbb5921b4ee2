"""Gradients of activations equal autograd through plain transformers, for every family, target and site."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from engine_runs import loaded
from gradient_oracle import oracle_gradient
from tiny_models import FAMILIES, LAYERS, tiny_model
from torch import Tensor

from patchclamp_server.analysis.neurons.gradients import (
    OverTokens,
    gradient_times_activation,
    site_gradients,
    without_controls,
)
from patchclamp_server.analysis.neurons.targets import Example, LogitDifference, LogProbability, Projection, Target
from patchclamp_server.engine.exclusive import at_once, events_of
from patchclamp_server.errors import InvalidArgument
from patchclamp_server.model.sites import Site
from patchclamp_server.model.weights import decoder_from_transformers

TOLERANCE = 1e-4
# Longer than the windows of the families that have one.
LONG = 20


def prompt(n: int, first: int = 5) -> tuple[int, ...]:
    return tuple(range(first, first + n))


def direction(width: int = 80) -> Tensor:
    return torch.randn(width, generator=torch.Generator().manual_seed(0))


TARGETS: dict[str, Callable[[], Target]] = {
    "log p of an answer": lambda: LogProbability((40, 41)),
    "logit": lambda: LogitDifference(40),
    "logit difference": lambda: LogitDifference(40, 9),
    "projection": lambda: Projection(Site.MLP_POST, LAYERS - 1, direction(), position=-2),
}


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    assert float((ours - theirs).abs().max()) <= TOLERANCE * float(theirs.abs().max())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS.keys())
def test_gradients_of_neurons_equal_autograd_through_transformers(family: str, target: Callable[[], Target]) -> None:
    example = Example(prompt(LONG), target())
    found = at_once(site_gradients(loaded(family).decoder, example))
    assert found.layers == tuple(range(LAYERS))
    for layer in found.layers:
        value, activation, gradient = oracle_gradient(tiny_model(family), example, Site.MLP_POST, layer)
        assert abs(found.value - value) <= TOLERANCE * abs(value)
        assert_close(found.activations[layer], activation)
        assert_close(found.gradients[layer], gradient)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_of_a_prompt_of_one_token_equal_autograd(family: str) -> None:
    example = Example((7,), LogProbability((40,)))
    found = at_once(site_gradients(loaded(family).decoder, example))
    for layer in found.layers:
        assert_close(found.gradients[layer], oracle_gradient(tiny_model(family), example, Site.MLP_POST, layer)[2])


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_neox"])
def test_gradients_at_every_site_equal_autograd(family: str) -> None:
    example, decoder = Example(prompt(6), LogitDifference(40, 9)), loaded(family).decoder
    for site in decoder.spec.sites:
        found = at_once(site_gradients(decoder, example, site=site))
        for layer in found.layers:
            _, activation, gradient = oracle_gradient(tiny_model(family), example, site, layer)
            assert_close(found.activations[layer], activation)
            assert_close(found.gradients[layer], gradient)


def test_what_lies_behind_a_projection_in_its_block_has_no_gradient() -> None:
    example = Example(prompt(5), Projection(Site.RESID_PRE, 1, direction(48)))
    found = at_once(site_gradients(loaded("llama").decoder, example))
    assert found.layers == (0, 1)
    assert_close(found.gradients[0], oracle_gradient(tiny_model("llama"), example, Site.MLP_POST, 0)[2])
    assert not found.gradients[1].any()


def test_chosen_layers_alone_are_kept() -> None:
    example, decoder = Example(prompt(5), LogitDifference(40)), loaded("llama").decoder
    every, some = (at_once(site_gradients(decoder, example, layers=layers)) for layers in (None, (2, 0)))
    assert some.layers == (0, 2)
    assert torch.equal(some.gradients, every.gradients[[0, 2]])


EXAMPLES = [
    Example(prompt(9), LogProbability((40, 41))),
    Example((3,), LogProbability((8,))),
    Example(prompt(60, 30), LogitDifference(12, 13)),
    Example(prompt(5, 90), LogProbability((7,))),
    Example(prompt(90, 3), LogitDifference(3)),
    Example(prompt(4, 70), Projection(Site.MLP_OUT, 2, direction(48))),
]
REDUCTIONS = {
    OverTokens.SUM: lambda products, example: products.sum(0),
    OverTokens.MAX: lambda products, example: products.max(0),
    OverTokens.LAST: lambda products, example: products[len(example.prompt) - 1],
}


@pytest.mark.parametrize("over", OverTokens)
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_scores_of_examples_in_batches_equal_a_loop_over_them(family: str, over: OverTokens) -> None:
    decoder = loaded(family).decoder
    found = at_once(gradient_times_activation(decoder, EXAMPLES, over_tokens=over))
    expected = np.zeros((LAYERS, 80))
    for example in EXAMPLES:
        for layer in range(LAYERS):
            _, activation, gradient = oracle_gradient(tiny_model(family), example, Site.MLP_POST, layer)
            products = activation.double().numpy() * gradient.double().numpy()
            expected[layer] += REDUCTIONS[over](products, example) / len(EXAMPLES)
    assert_close(found.scores.double(), torch.from_numpy(expected))
    assert found.tokens == sum(len(example.tokens) for example in EXAMPLES)
    alone = [at_once(site_gradients(decoder, example)).value for example in EXAMPLES]
    assert found.values == pytest.approx(alone, rel=1e-4)


def test_progress_is_told_in_examples() -> None:
    told = list(events_of(gradient_times_activation(loaded("llama").decoder, EXAMPLES)))
    assert [step.done for step in told] == sorted({step.done for step in told})
    assert (told[-1].done, told[-1].total) == (len(EXAMPLES), len(EXAMPLES))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_in_16_bits_has_gradients_of_float32_near_those_of_its_weights(family: str) -> None:
    narrow = decoder_from_transformers(tiny_model(family), dtype=torch.bfloat16, device="cpu")
    example = Example(prompt(LONG), LogitDifference(40))
    wide, found = (at_once(site_gradients(d, example)) for d in (loaded(family).decoder, narrow))
    assert found.gradients.dtype == torch.float32
    similarity = torch.cosine_similarity(found.gradients.flatten(), wide.gradients.flatten(), dim=0)
    assert similarity > 0.98


def planted(layers: int = 2, width: int = 100) -> Tensor:
    return torch.arange(layers * width, dtype=torch.float32).view(layers, width)


def test_neurons_that_stand_out_are_the_top_fraction() -> None:
    found = without_controls(planted(), fraction=0.02)
    assert found.nonzero().tolist() == [[1, 96], [1, 97], [1, 98], [1, 99]]


def test_scores_of_control_data_are_subtracted() -> None:
    control = torch.zeros(2, 100)
    control[1, 99] = 1000
    assert without_controls(planted(), control, fraction=0.01).nonzero().tolist() == [[1, 97], [1, 98]]


def test_neurons_that_other_controls_select_too_are_left_out() -> None:
    other = torch.zeros(2, 100)
    other[1, 98], other[0, 3] = 5, 4
    found = without_controls(planted(), excluded=[other], fraction=0.01, excluded_fraction=0.01)
    assert found.nonzero().tolist() == [[1, 99]]


REFUSED = {
    "examples": ([], {}),
    "examples[1].prompt": ([EXAMPLES[0], Example((), LogitDifference(3))], {}),
    "examples[0].target.answer": ([Example((3,), LogProbability(()))], {}),
    "examples[0].target.target": ([Example((3,), LogitDifference(999))], {}),
    "examples[0].target.contrast": ([Example((3,), LogitDifference(5, 5))], {}),
    "examples[0].target.layer": ([Example((3,), Projection(Site.MLP_OUT, 3, direction(48)))], {}),
    "examples[0].target.vector": ([Example((3,), Projection(Site.MLP_OUT, 2, direction(80)))], {}),
    "examples[0].target.position": ([Example((3,), Projection(Site.MLP_OUT, 2, direction(48), 1))], {}),
    "layers": ([EXAMPLES[0]], {"layers": (0, 3)}),
    "site": ([EXAMPLES[0]], {"site": Site.ATTN_Q}),
}


@pytest.mark.parametrize("field", REFUSED)
def test_what_cannot_run_is_refused_by_field_path_before_anything_is_computed(field: str) -> None:
    examples, options = REFUSED[field]
    with pytest.raises(InvalidArgument) as refused:
        next(gradient_times_activation(loaded("llama").decoder, examples, **options))  # type: ignore[arg-type]
    assert refused.value.field == field
    assert "accepted" in refused.value.message

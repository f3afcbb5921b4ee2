"""Integrated gradients of a layer's neurons: complete, and equal to a plain loop of autograd along the path."""

import numpy as np
import pytest
import torch
from engine_runs import loaded
from gradient_oracle import OraclePass, oracle_gradient
from tiny_models import FAMILIES, LAYERS, tiny_model
from torch import Tensor

from patchclamp_server.analysis.neurons.integrated import IntegratedGradients, integrated_gradients
from patchclamp_server.analysis.neurons.targets import Example, LogitDifference, LogProbability, Projection
from patchclamp_server.engine.exclusive import at_once
from patchclamp_server.errors import InvalidArgument
from patchclamp_server.model.sites import Site
from patchclamp_server.model.weights import decoder_from_transformers

WIDTH, TOKENS = 80, 10
EXAMPLE = Example(tuple(range(5, 5 + TOKENS)), LogitDifference(40, 9))
ANSWER = Example(tuple(range(5, 5 + TOKENS)), LogProbability((40, 41)))


def direction(width: int) -> Tensor:
    return torch.randn(width, generator=torch.Generator().manual_seed(0))


def along_the_path(family: str, example: Example, layer: int, start: Tensor, change: Tensor) -> tuple[Tensor, Tensor]:
    """The integral by plain transformers, [tokens, width] float64, and F at both ends."""
    total = torch.zeros(change.shape, dtype=torch.float64)
    nodes, weights = np.polynomial.legendre.leggauss(12)
    pieces = 16
    for piece in range(pieces):
        for node, weight in zip(nodes, weights, strict=True):
            s = (piece + (node + 1) / 2) / pieces
            values = (start + s * change).float().requires_grad_()
            value = OraclePass(tiny_model(family), example, {(Site.MLP_POST, layer): values}).value()
            (gradient,) = torch.autograd.grad(value, values)
            total += gradient.double() * (weight / 2 / pieces)
    ends = [
        OraclePass(tiny_model(family), example, {(Site.MLP_POST, layer): start + s * change}).value() for s in (0, 1)
    ]
    return total * change, torch.stack(ends).detach()


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_attributions_equal_a_plain_loop_along_the_path(family: str) -> None:
    _, activations, _ = oracle_gradient(tiny_model(family), EXAMPLE, Site.MLP_POST, 1)
    expected, (low, high) = along_the_path(family, EXAMPLE, 1, torch.zeros_like(activations), activations)
    found = at_once(integrated_gradients(loaded(family).decoder, EXAMPLE, 1, tolerance=1e-4))
    assert found.baseline_value == pytest.approx(float(low), rel=1e-4)
    assert found.value == pytest.approx(float(high), rel=1e-4)
    of_neurons = expected.sum(0)
    assert float((found.attributions - of_neurons).abs().max()) <= 2e-3 * float(of_neurons.abs().max())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layer", range(LAYERS))
def test_attributions_sum_to_what_the_layer_changes_within_one_percent(family: str, layer: int) -> None:
    found = at_once(integrated_gradients(loaded(family).decoder, ANSWER, layer))
    assert found.complete
    assert found.gap <= 0.01
    change = found.value - found.baseline_value
    assert float(found.attributions.sum()) == pytest.approx(change, rel=0.01)


def test_a_model_in_16_bits_is_complete_too() -> None:
    decoder = decoder_from_transformers(tiny_model("qwen3"), dtype=torch.bfloat16, device="cpu")
    found = at_once(integrated_gradients(decoder, ANSWER, 1, tolerance=1e-3))
    assert found.gap <= 1e-3


def test_of_a_projection_on_the_neurons_themselves_they_are_the_parts_of_the_product() -> None:
    vector = direction(WIDTH)
    example = Example(EXAMPLE.prompt, Projection(Site.MLP_POST, 1, vector))
    _, activations, _ = oracle_gradient(tiny_model("llama"), example, Site.MLP_POST, 1)
    found = at_once(integrated_gradients(loaded("llama").decoder, example, 1))
    torch.testing.assert_close(found.attributions, activations[-1] * vector / vector.norm())
    assert found.steps == 7


def test_the_path_begins_at_a_baseline_that_is_given() -> None:
    mean = direction(WIDTH) * 0.1
    _, activations, _ = oracle_gradient(tiny_model("llama"), EXAMPLE, Site.MLP_POST, 2)
    expected, (low, _) = along_the_path("llama", EXAMPLE, 2, mean.expand_as(activations), activations - mean)
    found = at_once(integrated_gradients(loaded("llama").decoder, EXAMPLE, 2, baseline=mean, tolerance=1e-4))
    assert found.baseline_value == pytest.approx(float(low), rel=1e-4)
    assert float((found.attributions - expected.sum(0)).abs().max()) <= 2e-3 * float(expected.sum(0).abs().max())


def test_tokens_that_do_not_move_keep_their_activations() -> None:
    _, activations, _ = oracle_gradient(tiny_model("llama"), EXAMPLE, Site.MLP_POST, 1)
    change = torch.zeros_like(activations)
    change[-1] = activations[-1]
    expected, (low, _) = along_the_path("llama", EXAMPLE, 1, activations - change, change)
    found = at_once(integrated_gradients(loaded("llama").decoder, EXAMPLE, 1, positions=[-1], tolerance=1e-4))
    assert found.baseline_value == pytest.approx(float(low), rel=1e-4)
    assert float((found.attributions - expected.sum(0)).abs().max()) <= 2e-3 * float(expected.sum(0).abs().max())


@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("family", ["llama", "opt", "gpt_neox"])
def test_paths_at_every_site_are_complete(family: str, tokens: int) -> None:
    decoder, example = loaded(family).decoder, Example(EXAMPLE.prompt[:tokens], LogitDifference(40, 9))
    for site in decoder.spec.sites:
        baseline = 0.5 * direction(decoder.spec.sites[site])
        found = at_once(integrated_gradients(decoder, example, 1, site=site, baseline=baseline))
        assert found.complete, site
        assert found.value != found.baseline_value


def test_a_path_that_runs_out_of_steps_says_that_it_is_not_complete() -> None:
    few, enough = (at_once(integrated_gradients(loaded("opt").decoder, ANSWER, 0, max_steps=n)) for n in (7, 1024))
    assert (few.complete, few.steps) == (False, 7)
    assert few.gap > few.tolerance
    assert enough.complete
    assert 7 < enough.steps <= 1024


def test_a_change_of_nothing_is_complete_without_attributions() -> None:
    none = IntegratedGradients(torch.zeros(4), 2.0, 2.0, 7, 0.01)
    assert (none.gap, none.complete) == (0.0, True)


REFUSED = {
    "site": {"site": Site.ATTN_Q},
    "layer": {"layer": LAYERS},
    "baseline": {"baseline": torch.zeros(3)},
    "positions": {"positions": [TOKENS]},
    "tolerance": {"tolerance": 0.0},
    "max_steps": {"max_steps": 6},
}


@pytest.mark.parametrize("field", REFUSED)
def test_what_cannot_be_integrated_is_refused_by_field_path(field: str) -> None:
    options = {"layer": 1, **REFUSED[field]}
    with pytest.raises(InvalidArgument, match="accepted") as refused:
        next(integrated_gradients(loaded("llama").decoder, EXAMPLE, **options))  # type: ignore[arg-type]
    assert refused.value.field == field

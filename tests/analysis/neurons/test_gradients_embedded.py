"""Gradients of the embedded model, whose weights are 4-bit codes: they equal those of its float32 weights."""

from pathlib import Path

import pytest
import torch
from gradient_oracle import OraclePass
from torch import Tensor

from patchclamp_server.analysis.neurons.backward import Replaced, activations_at, run_forward
from patchclamp_server.analysis.neurons.batches import Batch
from patchclamp_server.analysis.neurons.gradients import gradient_times_activation, site_gradients
from patchclamp_server.analysis.neurons.integrated import integrated_gradients
from patchclamp_server.analysis.neurons.products import DifferentiableModel
from patchclamp_server.analysis.neurons.targets import Example, LogProbability
from patchclamp_server.engine.exclusive import at_once
from patchclamp_server.model.load import LoadedModel, load_model, load_pretrained
from patchclamp_server.model.sites import Site

FACTS = {"The capital of France is": " Paris", "The opposite of hot is": " cold"}
# Late ones take one rule, early ones many: the first layers decide what all others do with a token.
LAYERS = (5, 20, 29)


@pytest.fixture(scope="module")
def embedded() -> LoadedModel:
    return load_model("embedded")


def example(model: LoadedModel, prompt: str) -> Example:
    answer = LogProbability(tuple(model.tokenizer(FACTS[prompt]).input_ids))
    return Example(tuple(model.tokenizer(prompt).input_ids), answer)


def test_the_embedded_model_is_kept_as_codes(embedded: LoadedModel) -> None:
    linear = embedded.decoder.blocks[0].mlp_input
    assert linear.weight is None
    assert linear.matrix is not None


def test_gradients_through_codes_equal_autograd_through_transformers(embedded: LoadedModel, embedded_dir: Path) -> None:
    fact = example(embedded, "The capital of France is")
    found = at_once(site_gradients(embedded.decoder, fact))
    model, _ = load_pretrained(embedded_dir)
    run = OraclePass(model, fact)
    value = run.value()
    seen = [run.seen[Site.MLP_POST, layer] for layer in found.layers]
    expected = torch.stack(torch.autograd.grad(value, seen)).view(found.gradients.shape)
    assert found.value == pytest.approx(float(value.detach()), abs=1e-4)
    for ours, theirs in zip(found.gradients, expected, strict=True):
        assert float((ours - theirs).abs().max()) <= 1e-3 * float(theirs.abs().max())


@pytest.mark.parametrize("prompt", FACTS)
@pytest.mark.parametrize("layer", LAYERS)
def test_integrated_gradients_of_facts_are_complete_within_one_percent(
    embedded: LoadedModel, prompt: str, layer: int
) -> None:
    found = at_once(integrated_gradients(embedded.decoder, example(embedded, prompt), layer))
    assert found.gap <= 0.01
    assert abs(found.value - found.baseline_value) > 0.01


def test_the_first_layer_is_complete_where_the_last_token_moves(embedded: LoadedModel) -> None:
    """Of all tokens together it takes two thousand steps."""
    found = at_once(
        integrated_gradients(embedded.decoder, example(embedded, "The capital of France is"), 0, positions=[-1])
    )
    assert found.gap <= 0.01


def test_neurons_of_the_highest_scores_cost_the_answer_more_than_random_ones(embedded: LoadedModel) -> None:
    fact, layer, n = example(embedded, "The capital of France is"), 9, 20
    scores = at_once(gradient_times_activation(embedded.decoder, [fact], layers=[layer])).scores[0]
    model, batch = DifferentiableModel.of(embedded.decoder), Batch.of([fact])
    x, activations = at_once(activations_at(model, batch, layer, Site.MLP_POST))

    def value_without(neurons: Tensor) -> float:
        values = activations.clone()
        values[:, neurons] = 0
        return float(at_once(run_forward(model, batch, Replaced(layer, Site.MLP_POST, x, values))).values[0])

    generator = torch.Generator().manual_seed(0)
    others = [value_without(torch.randperm(len(scores), generator=generator)[:n]) for _ in range(10)]
    assert value_without(scores.topk(n).indices) < min(others)

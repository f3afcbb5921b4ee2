"""A circuit that is known: a tiny model in which one head alone carries what earlier tokens say to the last one."""

import copy

import pytest
import torch
from circuit_oracle import last_logits, random_pair
from tiny_models import tiny_model
from transformers import PreTrainedModel

from patchclamp_server.analysis.heads.circuits.circuit import CircuitSearch, FoundCircuit, search
from patchclamp_server.analysis.heads.circuits.methods import CIRCUIT_METHODS
from patchclamp_server.analysis.heads.circuits.runs import CleanCorruptPair
from patchclamp_server.errors import InvalidArgument
from patchclamp_server.model.weights import decoder_from_transformers

PLANTED = (1, 2)


def only_head(planted: tuple[int, int] | None) -> PreTrainedModel:
    """Attention of every other head is computed, and not added to the residual stream."""
    model = copy.deepcopy(tiny_model("llama"))
    layers = model.get_submodule("model.layers")
    width = model.config.head_dim
    with torch.no_grad():
        for layer, block in enumerate(layers.children()):
            weight = block.get_submodule("self_attn.o_proj").weight
            for head in range(model.config.num_attention_heads):
                if (layer, head) != planted:
                    weight[:, head * width : (head + 1) * width] = 0  # type: ignore[index]
    return model


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return only_head(PLANTED)


def found(model: PreTrainedModel, job: CircuitSearch) -> FoundCircuit:
    *_, last = search(decoder_from_transformers(model, dtype=torch.float32, device="cpu"), job)
    assert isinstance(last, FoundCircuit)
    return last


@pytest.mark.parametrize("method", CIRCUIT_METHODS)
def test_the_planted_head_is_first_and_the_others_have_no_effect(method: str, model: PreTrainedModel) -> None:
    pairs = (random_pair(model, 15, seed=1), random_pair(model, 15, seed=2))
    first, *others = found(model, CircuitSearch(method, pairs)).effects
    assert (first.layer, first.head) == PLANTED
    # Most of it goes through the MLPs that follow, which path patching leaves out.
    assert abs(first.effect) > 0.02
    assert max(abs(e.effect) for e in others) < 1e-5


def test_its_clean_output_turns_the_corrupt_run_into_the_clean_one(model: PreTrainedModel) -> None:
    pairs = (random_pair(model, 15, seed=1), random_pair(model, 9, seed=2))
    first, *_ = found(model, CircuitSearch("activation_patching", pairs)).effects
    assert first.effect == pytest.approx(1.0, abs=1e-4)


def test_its_corrupt_output_turns_the_clean_run_into_the_corrupt_one(model: PreTrainedModel) -> None:
    # The mean over one corrupt prompt is its own output.
    first, *_ = found(model, CircuitSearch("mean_ablation", (random_pair(model, 15, seed=1),))).effects
    assert first.effect == pytest.approx(-1.0, abs=1e-4)


def test_it_alone_is_a_faithful_circuit_and_random_heads_are_one_when_they_have_it(model: PreTrainedModel) -> None:
    pairs = (random_pair(model, 15, seed=1), random_pair(model, 15, seed=2))
    measured = found(model, CircuitSearch("mean_ablation", pairs, circuit_size=1, random_sets=40)).faithfulness
    assert measured.circuit == pytest.approx(1.0, abs=1e-4)
    assert {round(value, 3) for value in measured.random} == {0.0, 1.0}
    # One head in twelve.
    assert measured.random_mean < 0.3


def test_prompts_that_no_head_tells_apart_have_no_faithful_circuit_and_are_refused() -> None:
    model = only_head(None)
    clean, corrupt = (7, 8, 9), (7, 8, 10)
    told = last_logits(model, clean) - last_logits(model, corrupt)
    pair = CleanCorruptPair(clean, corrupt, int(told.argmax()), int(told.argmin()))
    with pytest.raises(InvalidArgument, match="send pairs that heads decide") as refused:
        found(model, CircuitSearch("mean_ablation", (pair,)))
    assert refused.value.field == "pairs"

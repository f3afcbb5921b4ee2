"""Neurons read by their weights: equal to explicit products with the weights that transformers holds."""

from functools import cache

import pytest
import torch
from tiny_models import FAMILIES, LAYERS, tiny_model
from torch import Tensor

from patchclamp_server.analysis.neurons.decode import DecodedNeuron, Decoding, decode
from patchclamp_server.analysis.neurons.find import Finding, Found, find
from patchclamp_server.analysis.neurons.weights import NeuronWeights, Vocabulary, weights_of
from patchclamp_server.analysis.progress import Progress
from patchclamp_server.artifacts.neuron_sets import Neuron
from patchclamp_server.engine.exclusive import events_of
from patchclamp_server.model.decoder import Decoder
from patchclamp_server.model.weights import decoder_from_transformers

LAYER, NEURON = 1, 7
# Family -> names of the block, the norm before the MLP, its input and output matrices, a norm after it, the final norm.
GATED = ("model.layers.1", "post_attention_layernorm", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "")
NAMES = {
    "llama": (*GATED, "model.norm"),
    "qwen3": (*GATED, "model.norm"),
    "gemma2": (
        *("model.layers.1", "pre_feedforward_layernorm", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
        *("post_feedforward_layernorm", "model.norm"),
    ),
    "gpt2": ("transformer.h.1", "ln_2", "", "mlp.c_fc", "mlp.c_proj", "", "transformer.ln_f"),
    "opt": ("model.decoder.layers.1", "final_layer_norm", "", "fc1", "fc2", "", "model.decoder.final_layer_norm"),
}


@cache
def decoder(family: str) -> Decoder:
    return decoder_from_transformers(tiny_model(family), dtype=torch.float32, device="cpu")


def decoded(family: str, **fields: object) -> list[DecodedNeuron]:
    spec = decoder(family).spec
    job = Decoding(**{"layers": tuple(range(LAYERS)), "weights": weights_of(spec), "top_k": 5, **fields})  # type: ignore[arg-type]
    return [neuron for event in events_of(decode(decoder(family), job)) if isinstance(event, list) for neuron in event]


def explicit_products(family: str) -> dict[NeuronWeights, Tensor]:
    """p [vocab] of neuron NEURON of layer LAYER, from the modules of transformers."""
    model = tiny_model(family)
    block, before, gate, up, down, after, final = NAMES[family]
    # gemma adds one to the weights of its norms; Conv1D of gpt2 keeps its matrices transposed.
    one = 1.0 if family == "gemma2" else 0.0
    is_layer_norm = family in ("gpt2", "opt")

    def scale(name: str) -> Tensor:
        return model.get_parameter(f"{name}.weight").detach() + one

    def row(name: str, *, column: bool) -> Tensor:
        weight = model.get_parameter(f"{block}.{name}.weight").detach()
        return weight[:, NEURON] if column != (family == "gpt2") else weight[NEURON]

    def centred(w: Tensor) -> Tensor:
        return w - w.mean() if is_layer_norm else w

    reads = {NeuronWeights.UP: row(up, column=False)}
    if gate:
        reads[NeuronWeights.GATE] = row(gate, column=False)
    found = {weights: centred(w * scale(f"{block}.{before}")) for weights, w in reads.items()}
    written = row(down, column=True)
    found[NeuronWeights.DOWN] = written * scale(f"{block}.{after}") if after else written
    unembedding = model.get_output_embeddings().weight.detach()
    return {weights: unembedding @ (centred(w) * scale(final)) for weights, w in found.items()}


@pytest.mark.parametrize("family", NAMES)
def test_tokens_and_effects_are_those_of_an_explicit_product(family: str) -> None:
    (neuron,) = decoded(family, neurons=(Neuron(LAYER, NEURON),))
    products = explicit_products(family)
    assert {row.weights for row in neuron.rows} == set(products)
    for row in neuron.rows:
        p = products[row.weights]
        top, bottom = p.topk(5), p.topk(5, largest=False)
        assert [token.id for token in row.top] == top.indices.tolist()
        assert [token.id for token in row.bottom] == bottom.indices.tolist()
        assert [token.product for token in row.top] == pytest.approx(top.values.tolist(), rel=1e-4)
        assert [token.product for token in row.bottom] == pytest.approx(bottom.values.tolist(), rel=1e-4)
        for token in (*row.top, *row.bottom):
            assert token.effect == pytest.approx(float(products[NeuronWeights.DOWN][token.id]), rel=1e-4, abs=1e-5)
        deviation = float(p.std(correction=0))
        assert row.top_z == pytest.approx(float(top.values[0] - p.mean()) / deviation, rel=1e-3)
        assert row.bottom_z == pytest.approx(float(bottom.values[0] - p.mean()) / deviation, rel=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_effect_is_what_the_neuron_adds_to_logits_where_the_final_norm_holds_its_scale(family: str) -> None:
    """A neuron of the last layer, by a small step of its value in the model's own final norm and unembedding."""
    own = decoder(family)
    layer, spec = own.spec.n_layers - 1, own.spec
    (neuron,) = decoded(family, neurons=(Neuron(layer, NEURON),), weights=(NeuronWeights.DOWN,))
    block = own.blocks[layer]
    column = torch.zeros(1, spec.d_ff)
    column[0, NEURON] = 1.0
    bias = 0.0 if block.mlp_output.bias is None else block.mlp_output.bias
    written = (block.mlp_output(column) - bias)[0]
    if block.post_mlp_norm is not None:
        written = written * block.post_mlp_norm.weight
    r = torch.randn(spec.d_model, generator=torch.Generator().manual_seed(1))
    norm = own.final_norm
    shift = (written - written.mean()) if norm.bias is not None else written
    spread = r.var(correction=0) if norm.bias is not None else r.square().mean()
    logits = own.unembedding(((shift * norm.weight) * (spread + norm.eps).rsqrt())[None])[0]
    if own.unembedding.bias is not None:
        logits = logits - own.unembedding.bias
    expected = logits / (spread + norm.eps).rsqrt()
    for token in neuron.rows[0].top:
        assert token.effect == pytest.approx(float(expected[token.id]), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_all_neurons_of_the_layers_come_once_each(family: str) -> None:
    d_ff = decoder(family).spec.d_ff
    found = decoded(family, layers=(0, 2), top_k=1)
    assert [neuron.neuron for neuron in found] == [Neuron(layer, i) for layer in (0, 2) for i in range(d_ff)]


def test_progress_counts_neurons() -> None:
    events = list(events_of(decode(decoder("llama"), Decoding((0,), weights_of(decoder("llama").spec), top_k=1))))
    last = [event for event in events if isinstance(event, Progress)][-1]
    assert last.done == last.total == decoder("llama").spec.d_ff


def searched(family: str, job: Finding) -> Found:
    (found,) = [event for event in events_of(find(decoder(family), job)) if isinstance(event, Found)]
    return found


@pytest.mark.parametrize("family", NAMES)
def test_the_effect_of_words_is_z_of_an_explicit_product(family: str) -> None:
    found = searched(family, Finding((LAYER,), tokens=(5, 9), words=("a", "b"), top_k=3))
    p = explicit_products(family)[NeuronWeights.DOWN]
    expected = float(((p[[5, 9]] - p.mean()) / p.std(correction=0)).mean())
    assert float(found.effects[0, NEURON]) == pytest.approx(expected, rel=1e-3)


def test_the_best_have_the_largest_effects_of_either_sign_and_values_have_their_signs() -> None:
    found = searched("llama", Finding((0, 2), tokens=(5,), words=("a",), top_k=4, value=12.0))
    flat = found.effects.flatten()
    places = flat.abs().topk(4).indices
    d_ff = decoder("llama").spec.d_ff
    assert found.neurons.neurons == tuple(Neuron((0, 2)[i // d_ff], i % d_ff) for i in places.tolist())
    assert found.neurons.values is not None
    assert found.neurons.values.tolist() == (flat[places].sign() * 12.0).tolist()


def test_a_vector_finds_the_neuron_that_writes_it() -> None:
    own = decoder("llama")
    written = own.blocks[2].mlp_output(torch.eye(own.spec.d_ff)[NEURON : NEURON + 1])[0]
    if own.blocks[2].mlp_output.bias is not None:
        written = written - own.blocks[2].mlp_output.bias
    found = searched("llama", Finding((0, 1, 2), vector=-3.0 * written, top_k=1, value=5.0))
    assert found.neurons.neurons == (Neuron(2, NEURON),)
    assert found.neurons.scores is not None
    assert float(found.neurons.scores[0]) == pytest.approx(1.0, abs=1e-5)
    assert found.neurons.values is not None
    assert found.neurons.values.tolist() == [-5.0]
    assert found.evidence()["share_of_random_that_reach_the_best"] == 0.0


def test_the_spread_over_the_vocabulary_is_that_of_all_products() -> None:
    vocabulary = Vocabulary.of(decoder("gpt2"))
    w = torch.randn(3, decoder("gpt2").spec.d_model, generator=torch.Generator().manual_seed(0))
    mean, deviation = vocabulary.spread(w)
    p = vocabulary.products(w)
    assert torch.allclose(mean, p.mean(1), atol=1e-4)
    assert torch.allclose(deviation, p.std(1, correction=0), rtol=1e-3)

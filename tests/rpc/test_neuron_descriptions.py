"""DescribeNeurons through a real channel, against transformers with hooks on the input of the down projection."""

from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import grpc
import pytest
import torch
from live import LiveServer
from statuses import failure
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from patchclamp.v1 import generation_pb2, program_pb2
from patchclamp.v1 import neuron_pb2 as pb
from patchclamp.v1.generation_pb2_grpc import GenerationServiceStub
from patchclamp.v1.neuron_pb2_grpc import NeuronServiceStub
from patchclamp_server.analysis.neurons.description_scores import INTRODUCTION, NEUTRAL, QUESTION

# A token is a byte, and there is no special one before a text.
TEXTS = ["Nobody came that day, and it rained.", "The key is of red glass.", "Two and two are four, she said. " * 3]
NEURONS = [(1, 5), (0, 3)]
DESCRIPTIONS = ["rain", "numbers"]
WINDOW = 32


@pytest.fixture
def stub(channel: grpc.Channel) -> NeuronServiceStub:
    return NeuronServiceStub(channel)


@pytest.fixture(scope="module")
def model(tiny_llama_dir: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(tiny_llama_dir, dtype=torch.float32).eval()


def listed(neurons: list[tuple[int, int]]) -> pb.NeuronSelection:
    ids = [pb.NeuronId(layer=layer, neuron=neuron) for layer, neuron in neurons]
    return pb.NeuronSelection(neurons=pb.NeuronIds(neurons=ids))


def source(**fields: Any) -> pb.TextSource:
    prompts = [generation_pb2.Prompt(text=text) for text in TEXTS]
    groups = [pb.LabelledTexts(label="first", prompts=prompts[:1]), pb.LabelledTexts(label="rest", prompts=prompts[1:])]
    return pb.TextSource(**{"groups": groups, "window_tokens": WINDOW, **fields})


def describing(**fields: Any) -> pb.DescribeNeuronsRequest:
    given = {"neurons": listed(NEURONS), "texts": source(), "contexts": 2, "context_tokens": 4, **fields}
    return pb.DescribeNeuronsRequest(**given)


def run(stub: NeuronServiceStub, **fields: Any) -> list[pb.NeuronDescription]:
    responses = list(stub.DescribeNeurons(describing(**fields)))
    progress = [response.progress for response in responses if response.HasField("progress")]
    assert progress[-1].done == progress[-1].total
    return [response.description for response in responses if response.HasField("description")]


@torch.no_grad()
def activations(model: PreTrainedModel, ids: list[int], layer: int) -> Tensor:
    """The neurons [T, d_ff] of a layer."""
    kept: list[Tensor] = []
    projection = model.get_submodule(f"model.layers.{layer}.mlp.down_proj")
    hook = projection.register_forward_pre_hook(lambda _, args: kept.append(args[0][0]))
    model(torch.tensor([ids]))
    hook.remove()
    return kept[0]


@torch.no_grad()
def logprob(model: PreTrainedModel, prompt: list[int], words: list[int], clamp: tuple[int, int, float] | None) -> float:
    """Mean log-probability of the words after the prompt."""
    hooks = []
    if clamp is not None:
        layer, neuron, value = clamp

        def set_neuron(_: Any, args: tuple[Tensor, ...]) -> tuple[Tensor]:
            x = args[0].clone()
            x[..., neuron] = value
            return (x,)

        hooks.append(model.get_submodule(f"model.layers.{layer}.mlp.down_proj").register_forward_pre_hook(set_neuron))
    predicted = model(torch.tensor([prompt + words])).logits[0, :-1].double().log_softmax(-1)
    for hook in hooks:
        hook.remove()
    return float(predicted[len(prompt) - 1 :].gather(1, torch.tensor(words)[:, None]).mean())


def encode(live_server: LiveServer, text: str) -> list[int]:
    return list(live_server.model.tokenizer.encode(text, add_special_tokens=False))


def windows(live_server: LiveServer) -> list[tuple[int, int, list[int]]]:
    """Index of the text, first token of the window in it, tokens."""
    each = [(index, encode(live_server, text)) for index, text in enumerate(TEXTS)]
    return [(index, at, ids[at : at + WINDOW]) for index, ids in each for at in range(0, len(ids), WINDOW)]


def test_contexts_and_activity_are_those_of_hooks(
    live_server: LiveServer, stub: NeuronServiceStub, model: PreTrainedModel
) -> None:
    descriptions = run(stub)
    assert [(d.neuron.layer, d.neuron.neuron) for d in descriptions] == NEURONS
    for found, (layer, neuron) in zip(descriptions, NEURONS, strict=True):
        columns = [(i, at, ids, activations(model, ids, layer)[:, neuron]) for i, at, ids in windows(live_server)]
        counted = torch.cat([column[1:] for *_, column in columns])
        assert found.tokens_seen == len(counted)
        assert found.rate == pytest.approx(float((counted > 0).double().mean()))
        assert found.mean == pytest.approx(float(counted.mean()), abs=1e-5)
        assert found.max == pytest.approx(float(counted.max()), abs=1e-5)
        best = sorted(columns, key=lambda each: -float(each[3][1:].max()))[:2]
        for context, (index, at, ids, column) in zip(found.contexts, best, strict=True):
            peak = 1 + int(column[1:].argmax())
            assert (context.text_index, context.position) == (index, at + peak)
            assert context.value == pytest.approx(float(column[peak]), abs=1e-5)
            around = slice(max(0, peak - 4), peak + 5)
            assert [token.id for token in context.tokens] == ids[around]
            assert [token.value for token in context.tokens] == pytest.approx(column[around].tolist(), abs=1e-5)
            assert "".join(token.text for token in context.tokens) == live_server.model.tokenizer.decode(ids[around])


def test_pmi_is_the_gain_of_the_log_probability_by_the_contexts(
    live_server: LiveServer, stub: NeuronServiceStub, model: PreTrainedModel
) -> None:
    for found in run(stub, descriptions=DESCRIPTIONS):
        lines = ""
        for context in found.contexts:
            pieces = [token.text for token in context.tokens]
            peak = next(i for i, token in enumerate(context.tokens) if token.value == context.value)
            word = pieces[peak]
            pieces[peak] = f"[{word}]" if word.strip() else f"{word}[]"
            lines += f"- {' '.join(''.join(pieces).split())}\n"
        given, without = (encode(live_server, INTRODUCTION + part + QUESTION) for part in (lines, ""))
        assert [score.description for score in found.scores] == DESCRIPTIONS
        for score in found.scores:
            words = encode(live_server, " " + score.description)
            expected = logprob(model, given, words, None) - logprob(model, without, words, None)
            assert score.pmi == pytest.approx(expected, abs=1e-4)
            assert not score.HasField("causal")
            assert not score.HasField("causal_z")


def test_the_causal_score_is_that_of_a_clamp_beside_random_neurons(
    live_server: LiveServer, stub: NeuronServiceStub, model: PreTrainedModel
) -> None:
    # All others of the layer are drawn, so that the draw is known.
    d_ff = live_server.model.info.d_ff
    (found,) = run(stub, neurons=listed([(1, 5)]), descriptions=["rain"], causal=True, random_neurons=d_ff - 1)
    rows = torch.cat([activations(model, ids, 1)[1:] for *_, ids in windows(live_server)])
    words = encode(live_server, " rain")

    def causal(neuron: int) -> float:
        clamp = (1, neuron, float(rows[:, neuron].max()))
        prompts = [encode(live_server, text) for text in NEUTRAL]
        return fmean(logprob(model, p, words, clamp) - logprob(model, p, words, None) for p in prompts)

    (score,) = found.scores
    assert score.causal == pytest.approx(causal(5), abs=1e-5)
    random = [causal(neuron) for neuron in range(d_ff) if neuron != 5]
    assert score.causal_z == pytest.approx((causal(5) - fmean(random)) / stdev(random), abs=0.02)


def test_the_seed_draws_the_random_neurons(stub: NeuronServiceStub) -> None:
    def z(seed: int) -> float:
        one = listed([(1, 5)])
        (found,) = run(stub, neurons=one, descriptions=["rain"], causal=True, random_neurons=3, seed=seed)
        return found.scores[0].causal_z

    assert z(1) == z(1)
    assert z(1) != z(2)


def test_the_largest_value_clamps_the_neuron_in_the_next_call(stub: NeuronServiceStub, channel: grpc.Channel) -> None:
    (found,) = run(stub, neurons=listed([(1, 5)]))
    clamp = program_pb2.Edit(
        site="SITE_MLP_POST", layers=[1], neurons={"neurons": [found.neuron.neuron], "set": {"values": [found.max]}}
    )
    request = generation_pb2.GenerateRequest(
        prompt={"text": "It was"}, stop={"max_tokens": 2}, program=program_pb2.Program(edits=[clamp])
    )
    responses = list(GenerationServiceStub(channel).Generate(request))
    assert responses[-1].finished.receipt.edits[0].rows > 0


@pytest.mark.parametrize(
    ("fields", "status", "field"),
    [
        ({"neurons": None}, "INVALID_ARGUMENT", "neurons"),
        ({"neurons": listed([(9, 1)])}, "INVALID_ARGUMENT", "neurons.neurons.neurons[0].layer"),
        ({"texts": None}, "INVALID_ARGUMENT", "texts"),
        ({"texts": source(window_tokens=1)}, "INVALID_ARGUMENT", "texts.window_tokens"),
        ({"site": program_pb2.SITE_RESID_POST}, "INVALID_ARGUMENT", "site"),
        ({"contexts": 101}, "INVALID_ARGUMENT", "contexts"),
        ({"context_tokens": 257}, "INVALID_ARGUMENT", "context_tokens"),
        ({"descriptions": ["rain", " "]}, "INVALID_ARGUMENT", "descriptions[1]"),
        ({"descriptions": ["rain", "rain"]}, "INVALID_ARGUMENT", "descriptions[1]"),
        ({"descriptions": ["a" * 250]}, "INVALID_ARGUMENT", "descriptions[0]"),
        ({"descriptions": [str(i) for i in range(65)]}, "INVALID_ARGUMENT", "descriptions"),
        ({"causal": True}, "INVALID_ARGUMENT", "descriptions"),
        ({"descriptions": ["a"], "causal": True, "random_neurons": 1}, "INVALID_ARGUMENT", "random_neurons"),
        ({"descriptions": ["a"], "causal": True, "random_neurons": 64}, "INVALID_ARGUMENT", "random_neurons"),
        (
            {"descriptions": ["a" * 150], "context_tokens": 30, "texts": source(window_tokens=64)},
            "INVALID_ARGUMENT",
            "context_tokens",
        ),
    ],
)
def test_what_cannot_be_described_is_refused_by_its_field(
    stub: NeuronServiceStub, fields: dict[str, Any], status: str, field: str
) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        list(stub.DescribeNeurons(describing(**fields)))
    refused = failure(caught.value)
    assert refused.code.name == status
    assert refused.message.startswith(f"{field}: ")


def test_a_cancelled_description_leaves_nothing_in_the_engine(live_server: LiveServer, stub: NeuronServiceStub) -> None:
    call = stub.DescribeNeurons(describing(descriptions=DESCRIPTIONS, causal=True))
    for response in call:
        if response.progress.stage == "scores":
            break
    call.cancel()
    with pytest.raises(grpc.RpcError):
        list(call)
    stats = live_server.server.engine.stats()
    while stats.running or stats.waiting:
        stats = live_server.server.engine.stats()
    assert stats.kv_blocks_free == stats.kv_blocks_total

"""EvaluateNeuronEdit through a real channel, against transformers with hooks on the input of the down projection."""

import math
from collections.abc import Iterator
from pathlib import Path
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
from patchclamp.v1.neuron_pb2_grpc import NeuronServiceStub
from patchclamp_server.artifacts.store import ArtifactStore
from patchclamp_server.artifacts.types import ArtifactKind
from patchclamp_server.model.load import load_model
from patchclamp_server.model.sites import Site

# Of the tiny llama, by layer. A token is a byte.
SET = [(0, 3), (1, 5), (1, 60), (0, 17)]
VALUES = {(0, 3): 4.0, (1, 5): -4.0, (1, 60): 2.0, (0, 17): 1.0}
FACTS = [("The sky is", " blue"), ("Two and two are", " four"), ("It was", " rain"), ("She has a", " dog")]
TEXTS = ["Nobody came that day, and it rained.", "The key is of red glass."]


@pytest.fixture(scope="module")
def server(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    with LiveServer(load_model(str(tiny_llama_dir)), tmp_path_factory.mktemp("artifacts")) as server:
        store = ArtifactStore(server.server.config.artifacts_url)
        info = server.model.info
        tensors: dict[str, Tensor] = {}
        for layer in (0, 1):
            own = [neuron for neuron in SET if neuron[0] == layer]
            tensors[f"layer.{layer}.neurons"] = torch.tensor([index for _, index in own])
            tensors[f"layer.{layer}.scores"] = torch.tensor([float(len(SET) - SET.index(neuron)) for neuron in own])
            tensors[f"layer.{layer}.values"] = torch.tensor([VALUES[neuron] for neuron in own])
        store.put(ArtifactKind.NEURON_SET, tensors, model_fingerprint=info.fingerprint, tags=["set"])
        vector = {"layer.1": torch.ones(info.d_model)}
        evidence = {"layers": [{"layer": 1, "midpoint": -1e6}]}
        store.put(
            ArtifactKind.VECTOR,
            vector,
            model_fingerprint=info.fingerprint,
            site=Site.RESID_POST,
            evidence=evidence,
            tags=["probe"],
        )
        yield server


@pytest.fixture(scope="module")
def stub(server: LiveServer) -> Iterator[NeuronServiceStub]:
    with grpc.insecure_channel(server.address) as channel:
        yield NeuronServiceStub(channel)


@pytest.fixture(scope="module")
def model(tiny_llama_dir: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(tiny_llama_dir, dtype=torch.float32).eval()


def facts_test(name: str = "facts", facts: list[tuple[str, str]] = FACTS) -> pb.NeuronTest:
    listed = [pb.Fact(prompt=generation_pb2.Prompt(text=prompt), answer=answer) for prompt, answer in facts]
    return pb.NeuronTest(name=name, facts=pb.FactsTest(facts=listed))


def generation_test(prompt: str = "It was", max_tokens: int = 4) -> pb.NeuronTest:
    prompts = [generation_pb2.Prompt(text=prompt)]
    return pb.NeuronTest(name="g", generation=pb.GenerationTest(prompts=prompts, max_tokens=max_tokens, words=["word"]))


def evaluation(**fields: Any) -> pb.EvaluateNeuronEditRequest:
    given = {
        "neurons": pb.NeuronSelection(neuron_set="set"),
        "mode": pb.NEURON_EDIT_MODE_CLAMP,
        "targets": [facts_test()],
        "fractions": [0.5, 1.0],
        "random_sets": 2,
        **fields,
    }
    return pb.EvaluateNeuronEditRequest(**given)


def run(stub: NeuronServiceStub, **fields: Any) -> pb.NeuronEditEffect:
    responses = list(stub.EvaluateNeuronEdit(evaluation(**fields)))
    points = [response.point for response in responses if response.HasField("point")]
    effect = responses[-1].result
    assert list(effect.points) == points
    progress = [response.progress for response in responses if response.HasField("progress")]
    assert progress[-1].done == progress[-1].total
    return effect


@torch.no_grad()
def logprobs(model: PreTrainedModel, ids: list[int], edits: dict[tuple[int, int], float]) -> Tensor:
    """Log-probabilities [T - 1] of the tokens after the first, with neurons set to values."""

    def hook_of(layer: int) -> Any:
        def hook(_: Any, args: tuple[Tensor, ...]) -> tuple[Tensor]:
            x = args[0].clone()
            for (at, index), value in edits.items():
                if at == layer:
                    x[..., index] = value
            return (x,)

        return hook

    hooks = [
        model.get_submodule(f"model.layers.{layer}.mlp.down_proj").register_forward_pre_hook(hook_of(layer))
        for layer in (0, 1)
    ]
    try:
        predicted = model(torch.tensor([ids])).logits[0, :-1].double().log_softmax(-1)
    finally:
        for hook in hooks:
            hook.remove()
    return predicted.gather(1, torch.tensor(ids[1:])[:, None])[:, 0]


def answer_logprob(
    server: LiveServer, model: PreTrainedModel, prompt: str, answer: str, edits: dict[tuple[int, int], float]
) -> float:
    tokenizer = server.model.tokenizer
    start = tokenizer.encode(prompt)
    ids = start + tokenizer.encode(answer, add_special_tokens=False)
    return float(logprobs(model, ids, edits)[len(start) - 1 :].sum())


def measurement(point: pb.NeuronEditPoint, metric: int, test: str = "facts") -> pb.NeuronMeasurement:
    (found,) = [m for m in point.measurements if m.metric == metric and m.test == test]
    return found


def test_facts_are_scored_as_by_hooks_with_the_best_neurons_first(
    server: LiveServer, stub: NeuronServiceStub, model: PreTrainedModel
) -> None:
    effect = run(stub)
    assert [(n.layer, n.neuron) for n in effect.neurons] == SET
    assert [(point.fraction, point.neurons) for point in effect.points] == [(0.5, 2), (1.0, 4)]
    for point in effect.points:
        edits = {neuron: VALUES[neuron] for neuron in SET[: point.neurons]}
        found = measurement(point, pb.NEURON_METRIC_LOG_PROBABILITY)
        for expected, given in ((found.unedited, {}), (found.edited, edits)):
            direct = [answer_logprob(server, model, prompt, answer, given) for prompt, answer in FACTS]
            assert expected == pytest.approx(sum(direct) / len(direct), abs=1e-3)
        assert found.change == pytest.approx(found.edited - found.unedited)
        assert len(found.random) == 2
        accuracy = measurement(point, pb.NEURON_METRIC_ACCURACY)
        right = [
            all(
                answer_logprob(server, model, prompt, answer, edits)
                > answer_logprob(server, model, prompt, other, edits)
                for _, other in FACTS
                if other != answer
            )
            for prompt, answer in FACTS
        ]
        assert accuracy.edited == pytest.approx(sum(right) / len(right))


def test_texts_have_perplexity_and_divergence_as_by_hooks(
    server: LiveServer, stub: NeuronServiceStub, model: PreTrainedModel
) -> None:
    side = pb.NeuronTest(name="texts", texts=pb.TextsTest(texts=TEXTS))
    (point,) = run(stub, sides=[side], fractions=[1.0]).points
    windows = [server.model.tokenizer.encode(text) for text in TEXTS]
    found = measurement(point, pb.NEURON_METRIC_PERPLEXITY, "texts")
    assert found.side
    for expected, edits in ((found.unedited, {}), (found.edited, VALUES)):
        direct = torch.cat([logprobs(model, ids, edits) for ids in windows])
        assert expected == pytest.approx(math.exp(-float(direct.mean())), rel=1e-4)
    divergence = measurement(point, pb.NEURON_METRIC_DIVERGENCE, "texts")
    assert divergence.unedited == 0.0
    assert divergence.edited > 0.0
    assert all(value > 0.0 for value in divergence.random)


@pytest.mark.parametrize(
    ("mode", "value", "expected"),
    [
        (pb.NEURON_EDIT_MODE_ZERO, None, 0.0),
        (pb.NEURON_EDIT_MODE_CLAMP, 3.0, 3.0),
    ],
)
def test_a_mode_sets_what_it_says(
    server: LiveServer, stub: NeuronServiceStub, model: PreTrainedModel, mode: Any, value: float | None, expected: float
) -> None:
    (point,) = run(stub, mode=mode, value=value, fractions=[1.0]).points
    found = measurement(point, pb.NEURON_METRIC_LOG_PROBABILITY)
    edits = dict.fromkeys(SET, expected)
    direct = [answer_logprob(server, model, prompt, answer, edits) for prompt, answer in FACTS]
    assert found.edited == pytest.approx(sum(direct) / len(direct), abs=1e-3)


def test_the_mean_is_that_of_the_texts_and_scale_one_changes_nothing(stub: NeuronServiceStub) -> None:
    (point,) = run(stub, mode=pb.NEURON_EDIT_MODE_MEAN, mean_texts=TEXTS, fractions=[1.0]).points
    assert measurement(point, pb.NEURON_METRIC_LOG_PROBABILITY).change != 0.0
    (point,) = run(stub, mode=pb.NEURON_EDIT_MODE_SCALE, value=1.0, fractions=[1.0]).points
    assert measurement(point, pb.NEURON_METRIC_LOG_PROBABILITY).change == pytest.approx(0.0, abs=1e-6)


def test_generated_text_is_judged_by_words_and_by_a_probe(stub: NeuronServiceStub) -> None:
    prompts = [generation_pb2.Prompt(text=text) for text in ("It was", "She has")]
    every_letter = [chr(i) for i in range(33, 127)]
    test = pb.GenerationTest(prompts=prompts, max_tokens=8, words=every_letter, probe="probe", probe_layer=1)
    (point,) = run(stub, targets=[pb.NeuronTest(name="text", generation=test)], fractions=[1.0]).points
    # Its midpoint is below whatever a state projects on.
    assert measurement(point, pb.NEURON_METRIC_PROBE, "text").edited == 1.0
    assert 0.0 <= measurement(point, pb.NEURON_METRIC_WORDS, "text").edited <= 1.0
    none = pb.GenerationTest(prompts=prompts, max_tokens=8, words=["no such word is ever said"])
    (point,) = run(stub, targets=[pb.NeuronTest(name="text", generation=none)], fractions=[1.0]).points
    assert measurement(point, pb.NEURON_METRIC_WORDS, "text").edited == 0.0


def test_the_same_seed_draws_the_same_random_sets(stub: NeuronServiceStub) -> None:
    first, again, other = (
        measurement(run(stub, fractions=[1.0], seed=seed).points[0], pb.NEURON_METRIC_LOG_PROBABILITY).random
        for seed in (1, 1, 2)
    )
    assert list(first) == list(again)
    assert list(first) != list(other)


def test_only_tokens_in_scope_are_edited(stub: NeuronServiceStub) -> None:
    nothing = program_pb2.Scope(include=[program_pb2.TokenSelector(token_ids=[1])])
    (point,) = run(stub, scope=nothing, fractions=[1.0]).points
    assert measurement(point, pb.NEURON_METRIC_LOG_PROBABILITY).change == 0.0


def test_listed_neurons_are_taken_in_a_seeded_order(stub: NeuronServiceStub) -> None:
    listed = pb.NeuronIds(neurons=[pb.NeuronId(layer=layer, neuron=neuron) for layer, neuron in SET])
    selection = pb.NeuronSelection(neurons=listed)
    effect = run(stub, neurons=selection, value=1.0, fractions=[1.0], seed=3)
    order = [(n.layer, n.neuron) for n in effect.neurons]
    assert sorted(order) == sorted(SET)
    assert order == [
        (n.layer, n.neuron) for n in run(stub, neurons=selection, value=1.0, fractions=[1.0], seed=3).neurons
    ]


LISTED = pb.NeuronSelection(neurons=pb.NeuronIds(neurons=[pb.NeuronId(layer=0, neuron=1)]))
EMPTY_FACT = pb.NeuronTest(name="f", facts=pb.FactsTest(facts=[pb.Fact(prompt=generation_pb2.Prompt(text="a"))]))


@pytest.mark.parametrize(
    ("fields", "status", "field"),
    [
        ({"neurons": None}, "INVALID_ARGUMENT", "neurons"),
        ({"neurons": pb.NeuronSelection(neuron_set="nothing")}, "NOT_FOUND", ""),
        ({"mode": 0}, "INVALID_ARGUMENT", "mode"),
        ({"neurons": LISTED}, "INVALID_ARGUMENT", "value"),
        ({"mode": pb.NEURON_EDIT_MODE_SCALE}, "INVALID_ARGUMENT", "value"),
        ({"mode": pb.NEURON_EDIT_MODE_ZERO, "value": 1.0}, "INVALID_ARGUMENT", "value"),
        ({"value": math.nan}, "INVALID_ARGUMENT", "value"),
        ({"fractions": [0.0]}, "INVALID_ARGUMENT", "fractions[0]"),
        ({"fractions": [0.5, 0.5]}, "INVALID_ARGUMENT", "fractions[1]"),
        ({"random_sets": 101}, "INVALID_ARGUMENT", "random_sets"),
        ({"targets": []}, "INVALID_ARGUMENT", "targets"),
        ({"targets": [facts_test("")]}, "INVALID_ARGUMENT", "targets[0].name"),
        ({"sides": [facts_test()]}, "INVALID_ARGUMENT", "sides[0].name"),
        ({"targets": [pb.NeuronTest(name="x")]}, "INVALID_ARGUMENT", "targets[0].kind"),
        ({"targets": [facts_test(facts=[])]}, "INVALID_ARGUMENT", "targets[0].facts.facts"),
        ({"targets": [EMPTY_FACT]}, "INVALID_ARGUMENT", "targets[0].facts.facts[0].answer"),
        ({"mode": pb.NEURON_EDIT_MODE_MEAN, "mean_texts": ["a text", ""]}, "INVALID_ARGUMENT", "mean_texts[1]"),
        ({"mode": pb.NEURON_EDIT_MODE_MEAN, "mean_texts": ["a " * 50_000]}, "INVALID_ARGUMENT", "mean_texts"),
        ({"mode": pb.NEURON_EDIT_MODE_ZERO, "mean_texts": ["a text"]}, "INVALID_ARGUMENT", "mean_texts"),
        ({"targets": [generation_test(max_tokens=256)]}, "INVALID_ARGUMENT", "targets[0].generation.max_tokens"),
        ({"targets": [generation_test("a" * 200, 60)]}, "INVALID_ARGUMENT", "targets[0].generation.prompts[0]"),
        (
            {"targets": [pb.NeuronTest(name="t", texts=pb.TextsTest(texts=[""]))]},
            "INVALID_ARGUMENT",
            "targets[0].texts.texts[0]",
        ),
        (
            {"targets": [pb.NeuronTest(name="g", generation=pb.GenerationTest())]},
            "INVALID_ARGUMENT",
            "targets[0].generation.prompts",
        ),
        (
            {"scope": program_pb2.Scope(include=[program_pb2.TokenSelector(role="user")])},
            "INVALID_ARGUMENT",
            "scope.include[0].role",
        ),
    ],
)
def test_what_cannot_be_evaluated_is_refused_by_its_field(
    stub: NeuronServiceStub, fields: dict[str, Any], status: str, field: str
) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        list(stub.EvaluateNeuronEdit(evaluation(**fields)))
    refused = failure(caught.value)
    assert refused.code.name == status
    if field:
        assert refused.message.startswith(f"{field}: ")


def test_a_cancelled_evaluation_leaves_nothing_in_the_engine(server: LiveServer, stub: NeuronServiceStub) -> None:
    call = stub.EvaluateNeuronEdit(evaluation(random_sets=100))
    next(call)
    call.cancel()
    with pytest.raises(grpc.RpcError):
        list(call)
    stats = server.server.engine.stats()
    while stats.running or stats.waiting:
        stats = server.server.engine.stats()
    assert stats.kv_blocks_free == stats.kv_blocks_total

"""LocalizeNeurons through a real channel, against transformers with hooks on the same texts and split."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import torch
from gradient_oracle import oracle_gradient
from live import LiveServer
from oracle_sites import attach
from planted_neurons import TOKEN, save_planted_neurons
from scipy.stats import ttest_ind
from secured import until
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, f1_score
from statuses import failure
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from patchclamp.v1 import generation_pb2, monitoring_pb2, program_pb2, sparse_policy_pb2
from patchclamp.v1 import neuron_pb2 as pb
from patchclamp.v1.generation_pb2_grpc import GenerationServiceStub
from patchclamp.v1.monitoring_pb2_grpc import MonitoringServiceStub
from patchclamp.v1.neuron_pb2_grpc import NeuronServiceStub
from patchclamp_server.analysis.neurons.localize.contrast_set import dealt_out
from patchclamp_server.analysis.neurons.localize.holdout import held_out
from patchclamp_server.analysis.neurons.random_sets import random_sets
from patchclamp_server.analysis.neurons.targets import Example, LogProbability
from patchclamp_server.artifacts.corpora import UNLABELLED, CorpusBuilder
from patchclamp_server.artifacts.neuron_sets import Neuron, NeuronSet, stored
from patchclamp_server.artifacts.store import ArtifactStore
from patchclamp_server.artifacts.types import ArtifactKind
from patchclamp_server.interventions.pooling import ordinary_tokens
from patchclamp_server.model.load import load_model
from patchclamp_server.model.sites import Site

LAYERS, NEURONS = 2, 64
UNITS = LAYERS * NEURONS
GROUPS = {
    "rain": [f"It rained {'and rained ' * (i % 3)}in town {i}" for i in range(12)],
    "key": [f"The key {i} is of {'red ' * (i % 4)}glass" for i in range(8)],
    "sum": [f"{i} + {i * i} = {i + i * i}" for i in range(9)],
}
LABELS = list(GROUPS)
TEXTS = [(text, label) for label, texts in GROUPS.items() for text in texts]
SEED = 2**64 - 1
FACTS = [("The sky is", " blue"), ("Two and two are", " four"), ("It was", " rain")]


def text_source(groups: dict[str, list[str]] = GROUPS, **fields: Any) -> pb.TextSource:
    listed = [
        pb.LabelledTexts(label=label, prompts=[generation_pb2.Prompt(text=text) for text in texts])
        for label, texts in groups.items()
    ]
    return pb.TextSource(groups=listed, **fields)


def facts(listed: Sequence[tuple[str, str]] = FACTS) -> list[pb.Fact]:
    return [pb.Fact(prompt=generation_pb2.Prompt(text=prompt), answer=answer) for prompt, answer in listed]


SOURCE = text_source()


@pytest.fixture(scope="module")
def server(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    with LiveServer(load_model(str(tiny_llama_dir)), tmp_path_factory.mktemp("artifacts")) as server:
        yield server


@pytest.fixture(scope="module")
def store(server: LiveServer) -> ArtifactStore:
    return ArtifactStore(server.server.config.artifacts_url)


@pytest.fixture(scope="module")
def channel(server: LiveServer) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(server.address) as channel:
        yield channel


@pytest.fixture(scope="module")
def stub(channel: grpc.Channel) -> NeuronServiceStub:
    return NeuronServiceStub(channel)


@pytest.fixture(scope="module")
def model(tiny_llama_dir: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(tiny_llama_dir, dtype=torch.float32).eval()


def localized(stub: NeuronServiceStub, **fields: Any) -> pb.LocalizedNeurons:
    given = {"seed": SEED, "random_sets": 3, **fields}
    responses = list(stub.LocalizeNeurons(pb.LocalizeNeuronsRequest(**given)))
    assert all(response.HasField("progress") for response in responses[:-1])
    assert responses[-2].progress.done == responses[-2].progress.total
    result: pb.LocalizedNeurons = responses[-1].result
    return result


@torch.no_grad()
def states(server: LiveServer, model: PreTrainedModel, text: str, site: Site = Site.MLP_POST) -> Tensor:
    """[layers, tokens, d_ff] of a text."""
    seen: dict[int, Tensor] = {}

    def visit(at: Site, layer: int, x: Tensor) -> Tensor:
        if at is site:
            seen[layer] = x.reshape(-1, NEURONS).clone()
        return x

    hooks = attach(model, visit)
    try:
        model(torch.tensor([server.model.tokenizer.encode(text)]), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack([seen[layer] for layer in range(LAYERS)])


def pooled(server: LiveServer, model: PreTrainedModel, pooling: int, site: Site = Site.MLP_POST) -> Tensor:
    """[texts, units]."""
    rows = []
    for text, _ in TEXTS:
        found = states(server, model, text, site)
        layers = []
        for layer, usual in zip(found, ordinary_tokens(found), strict=True):
            own = layer[usual]
            layers.append(
                {
                    pb.NEURON_POOLING_LAST_TOKEN: own[-1],
                    pb.NEURON_POOLING_MEAN: own.mean(0),
                    pb.NEURON_POOLING_MAX: layer[1:].amax(0),
                }[pooling]
            )
        rows.append(torch.cat(layers))
    return torch.stack(rows)


def split(fraction: float = 0.25, contrast: str | None = None, target: str = "key") -> tuple[Tensor, Tensor]:
    """Numbers of the texts that are searched and of those that are held out."""
    own = np.array([LABELS.index(label) for _, label in TEXTS])
    wanted = [i for i, (_, label) in enumerate(TEXTS) if contrast is None or label in (target, contrast)]
    heldout = held_out(own[wanted], fraction, SEED)
    places = torch.tensor(wanted)
    return places[torch.from_numpy(~heldout)], places[torch.from_numpy(heldout)]


IS_KEY = torch.tensor([label == "key" for _, label in TEXTS])


def check_set(found: pb.LocalizedSet, scores: Tensor, judged: Tensor, values: Tensor | None, size: int) -> None:
    """A stored set against what hooks give: scores, judged and values [units] of all neurons."""
    best = found.stored.best
    assert found.stored.neurons == len(best) == size
    units = [each.neuron.layer * NEURONS + each.neuron.neuron for each in best]
    # Those at the end may be other ones, where scores are equal but for rounding.
    expected = scores.sort(descending=True).values[:size]
    torch.testing.assert_close(torch.tensor([each.score for each in best]), expected.float(), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(scores[units].float(), expected.float(), rtol=1e-3, atol=1e-5)
    if values is not None:
        torch.testing.assert_close(torch.tensor([each.value for each in best]), values[units], rtol=1e-3, atol=1e-5)
    else:
        assert not any(each.HasField("value") for each in best)
    assert found.heldout == pytest.approx(float(judged[units].mean()), rel=1e-3, abs=1e-5)
    neurons = NeuronSet(tuple(Neuron(unit // NEURONS, unit % NEURONS) for unit in units))
    random = [
        float(judged[[n.layer * NEURONS + n.neuron for n in drawn]].mean())
        for drawn in random_sets(neurons, NEURONS, 3, SEED)
    ]
    assert list(found.random) == pytest.approx(random, rel=1e-3, abs=1e-5)
    assert found.random_mean == pytest.approx(sum(random) / 3, rel=1e-3, abs=1e-5)
    by_layer = [row[row != -torch.inf] for row in scores.view(LAYERS, NEURONS)]
    means = [float(row.mean()) if len(row) else 0.0 for row in by_layer]
    assert list(found.layer_mean) == pytest.approx(means, rel=1e-3, abs=1e-5)
    largest = [float(row.max()) if len(row) else 0.0 for row in by_layer]
    assert list(found.layer_max) == pytest.approx(largest, rel=1e-3, abs=1e-5)


def precisions(x: Tensor, places: Tensor) -> Tensor:
    own, y = x[places], IS_KEY[places].numpy()
    found = [
        max(average_precision_score(y, own[:, unit]), average_precision_score(y, -own[:, unit]))
        for unit in range(UNITS)
    ]
    return torch.tensor(found)


@pytest.mark.parametrize("pooling", [pb.NEURON_POOLING_LAST_TOKEN, pb.NEURON_POOLING_MEAN, pb.NEURON_POOLING_MAX])
def test_average_precision_is_that_of_hooks(
    server: LiveServer, stub: NeuronServiceStub, model: PreTrainedModel, pooling: "pb.NeuronPooling.ValueType"
) -> None:
    method = pb.AveragePrecisionMethod(texts=SOURCE, target="key", pooling=pooling)
    result = localized(stub, average_precision=method, top_k=5)
    x, (search, heldout) = pooled(server, model, pooling), split()
    (found,) = result.sets
    assert (found.label, found.measure, result.texts) == ("key", "average precision", len(TEXTS))
    values = x[search][IS_KEY[search]].mean(0)
    check_set(found, precisions(x, search), precisions(x, heldout), values, 5)


def welch(x: Tensor, places: Tensor) -> Tensor:
    own, y = x[places].double(), IS_KEY[places]
    return torch.tensor(ttest_ind(own[y], own[~y], equal_var=False).statistic)


def test_welch_t_is_that_of_hooks_and_of_two_labels_alone(
    server: LiveServer, stub: NeuronServiceStub, model: PreTrainedModel
) -> None:
    method = pb.WelchTMethod(texts=SOURCE, target="key", contrast="sum")
    result = localized(stub, welch_t=method, share=0.05, holdout_fraction=0.4)
    x, (search, heldout) = pooled(server, model, pb.NEURON_POOLING_MEAN), split(0.4, contrast="sum")
    assert result.texts == len(search) + len(heldout) == 17
    check_set(result.sets[0], welch(x, search), welch(x, heldout), x[search][IS_KEY[search]].mean(0), 6)


@pytest.mark.parametrize(("number", "site"), [("SITE_MLP_GATE", Site.MLP_GATE), ("SITE_MLP_UP", Site.MLP_UP)])
def test_gates_and_ups_have_scores_and_no_values(
    server: LiveServer, stub: NeuronServiceStub, model: PreTrainedModel, number: str, site: Site
) -> None:
    (found,) = localized(stub, welch_t=pb.WelchTMethod(texts=SOURCE, target="key"), site=number, top_k=4).sets
    x, (search, heldout) = pooled(server, model, pb.NEURON_POOLING_MEAN, site), split()
    check_set(found, welch(x, search), welch(x, heldout), None, 4)


def test_the_contrast_set_is_that_of_hooks(server: LiveServer, stub: NeuronServiceStub, model: PreTrainedModel) -> None:
    method = pb.ContrastSetMethod(texts=SOURCE, target="key", z=1.0, subsets=2, agreement=2)
    (found,) = localized(stub, contrast_set=method, top_k=20).sets
    x, (search, heldout) = pooled(server, model, pb.NEURON_POOLING_MEAN), split()
    dealt = dealt_out(IS_KEY[search], search, 2, SEED)
    z = torch.stack([welch(x, search[dealt == subset]) for subset in range(2)])
    scores = torch.where((z >= 1.0).all(0), z.mean(0), -torch.inf)
    size = min(20, int((scores != -torch.inf).sum()))
    assert size > 2
    check_set(found, scores, welch(x, heldout), x[search][IS_KEY[search]].mean(0), size)


def test_entropy_is_that_of_hooks_with_a_set_and_a_tag_for_each_label(
    server: LiveServer, stub: NeuronServiceStub, model: PreTrainedModel, store: ArtifactStore
) -> None:
    method = pb.ActivationEntropyMethod(texts=SOURCE, threshold=0.001, activity=0.5)
    result = localized(stub, activation_entropy=method, top_k=24, tags=["language"])
    fired = [(states(server, model, text) > 0.001).double() for text, _ in TEXTS]
    parts = split()

    def rates(label: str, places: Tensor) -> Tensor:
        own = [fired[i] for i in places.tolist() if TEXTS[i][1] == label]
        return torch.cat(own, dim=1).mean(1).flatten()

    p, heldout = (torch.stack([rates(label, places) for label in LABELS]) for places in parts)
    q = p / p.sum(0).clamp(min=1e-300)
    entropy = torch.special.entr(q).sum(0)
    bound = np.quantile(p.numpy(), 0.5, method="lower")
    candidates = torch.where(p.amax(0) >= bound, entropy, torch.inf)
    specific = torch.zeros(UNITS, dtype=torch.bool)
    specific[candidates.argsort(stable=True)[:24]] = True
    for k, (label, found) in enumerate(zip(LABELS, result.sets, strict=True)):
        assert found.label == label
        scores = torch.where(specific & (p[k] >= bound) & (p[k] > 0), -entropy, -torch.inf)
        others = [other for other in range(3) if other != k]
        size = int((scores != -torch.inf).sum())
        places = [i for i in parts[0].tolist() if TEXTS[i][1] == label]
        values = torch.cat([states(server, model, TEXTS[i][0]) for i in places], dim=1).mean(1).flatten()
        check_set(found, scores, heldout[k] - heldout[others].mean(0), values, size)
        assert store.info(f"language-{label}").id == found.stored.artifact.id


@pytest.mark.parametrize("ranker", [pb.NEURON_RANKER_MEAN_DIFFERENCE, pb.NEURON_RANKER_L1])
def test_probes_are_those_of_hooks_beside_random_ones_matched_by_layer(
    server: LiveServer, stub: NeuronServiceStub, model: PreTrainedModel, ranker: "pb.NeuronRanker.ValueType"
) -> None:
    method = pb.SparseProbeMethod(texts=SOURCE, target="key", ranker=ranker, k=[4, 1], by_layer=True)
    result = localized(stub, sparse_probe=method, tags=["probes"], replace_tags=True)
    x, (search, heldout) = pooled(server, model, pb.NEURON_POOLING_MAX), split()
    assert [(each.k, each.layer if each.HasField("layer") else None) for each in result.probes] == [
        (k, layer) for layer in (None, 0, 1) for k in (4, 1)
    ]

    def f1(units: list[int]) -> float:
        own = x[search][:, units].double().numpy()
        mean, deviation = own.mean(0), own.std(0)
        regression = LogisticRegression(class_weight="balanced", max_iter=1000)
        regression.fit((own - mean) / deviation, IS_KEY[search].numpy())
        predicted = regression.predict((x[heldout][:, units].double().numpy() - mean) / deviation)
        return float(f1_score(IS_KEY[heldout].numpy(), predicted, zero_division=0.0))

    for each in result.probes:
        neurons = tuple(Neuron(n.layer, n.neuron) for n in each.neurons)
        assert len(neurons) == each.k
        if each.HasField("layer"):
            assert {n.layer for n in neurons} == {each.layer}
        assert each.f1 == pytest.approx(f1([n.layer * NEURONS + n.neuron for n in neurons]))
        drawn = random_sets(NeuronSet(neurons), NEURONS, 3, SEED)
        random = [f1([n.layer * NEURONS + n.neuron for n in own]) for own in drawn]
        assert each.random_f1_mean == pytest.approx(sum(random) / 3)
    best = max((p for p in result.probes if not p.HasField("layer")), key=lambda p: (p.f1, -p.k))
    (found,) = result.sets
    assert found.heldout == best.f1
    assert found.random_mean == pytest.approx(best.random_f1_mean)
    assert sorted((e.neuron.layer, e.neuron.neuron) for e in found.stored.best) == sorted(
        (n.layer, n.neuron) for n in best.neurons
    )
    assert found.stored.best[0].score == pytest.approx(max(map(abs, best.weights)), rel=1e-5)


def gradient_scores(
    server: LiveServer, model: PreTrainedModel, listed: Sequence[tuple[str, str]], *, all_tokens: bool
) -> Tensor:
    tokenizer = server.model.tokenizer
    total = torch.zeros(UNITS)
    for prompt, answer in listed:
        ids = tuple(tokenizer.encode(prompt))
        example = Example(ids, LogProbability(tuple(tokenizer.encode(answer, add_special_tokens=False))))
        layers = []
        for layer in range(LAYERS):
            _, activation, gradient = oracle_gradient(model, example, Site.MLP_POST, layer)
            product = activation * gradient
            layers.append(product.sum(0) if all_tokens else product[len(ids) - 1])
        total += torch.cat(layers) / len(listed)
    return total


@pytest.mark.parametrize("all_tokens", [False, True])
def test_gradient_times_activation_is_that_of_autograd(
    server: LiveServer, stub: NeuronServiceStub, model: PreTrainedModel, all_tokens: bool
) -> None:
    method = pb.GradientMethod(facts=facts(), all_tokens=all_tokens)
    result = localized(stub, gradient_times_activation=method, top_k=6)
    scores = gradient_scores(server, model, FACTS, all_tokens=all_tokens)
    assert (result.sets[0].label, result.texts, result.steps) == ("", 3, 0)
    assert "same facts" in result.sets[0].measure
    check_set(result.sets[0], scores, scores, None, 6)


def test_scores_of_controls_are_taken_away_and_their_best_left_out(
    server: LiveServer, stub: NeuronServiceStub, model: PreTrainedModel
) -> None:
    method = pb.GradientMethod(facts=facts(FACTS[:2]), controls=facts(FACTS[2:]))
    (found,) = localized(stub, gradient_times_activation=method, top_k=8).sets
    own, control = (gradient_scores(server, model, part, all_tokens=False) for part in (FACTS[:2], FACTS[2:]))
    scores = own - control
    scores[control.argmax()] = -torch.inf
    check_set(found, scores, torch.where(scores == -torch.inf, 0.0, scores), None, 8)


def test_integrated_gradients_complete_and_say_how(
    server: LiveServer, stub: NeuronServiceStub, model: PreTrainedModel
) -> None:
    method = pb.GradientMethod(facts=facts(), all_tokens=True, completeness=0.01)
    result = localized(stub, integrated_gradients=method, top_k=5)
    assert result.completeness_gap <= 0.01
    assert not result.warnings
    # At least one rule of seven for each fact and layer.
    assert result.steps >= 7 * len(FACTS) * LAYERS


def test_too_few_steps_are_said_with_the_gap(stub: NeuronServiceStub) -> None:
    method = pb.GradientMethod(facts=facts(), all_tokens=True, completeness=1e-6, max_steps=7)
    result = localized(stub, integrated_gradients=method, top_k=5)
    assert result.steps == 7 * len(FACTS) * LAYERS
    assert result.completeness_gap > 1e-6
    assert "raise max_steps" in result.warnings[0]


def test_a_set_that_was_chosen_among_equal_scores_says_so(stub: NeuronServiceStub) -> None:
    # Of two texts that are each there four times, every neuron tells one from the other.
    source = text_source({"a": ["one a"] * 4, "b": ["two b"] * 4})
    method = pb.AveragePrecisionMethod(texts=source, target="a", pooling="NEURON_POOLING_LAST_TOKEN")
    (told,) = localized(stub, average_precision=method, top_k=4).warnings
    assert f"of 'a', 4 of the 4 neurons of the set share the score 1 with {UNITS - 4} that are not in it" in told
    welch = pb.WelchTMethod(texts=SOURCE, target="key")
    assert not localized(stub, welch_t=welch, top_k=4).warnings


def save_model_of_one_detector(directory: Path) -> None:
    """Of the planted neurons; beside TOKEN, which fires at "q", no neuron of layer 0 tells "q" from "b"."""
    save_planted_neurons(directory)
    model = AutoModelForCausalLM.from_pretrained(directory)
    embedding, mlp = model.model.embed_tokens.weight, model.model.layers[0].mlp
    q, b = AutoTokenizer.from_pretrained(directory).convert_tokens_to_ids(["q", "b"])
    with torch.no_grad():
        own = embedding[q] != embedding[b]
        # Dimension 0 is one in every embedding.
        planted = (mlp.gate_proj.weight[TOKEN].clone(), torch.eye(len(own))[0])
        for weight, row in zip((mlp.gate_proj.weight, mlp.up_proj.weight), planted, strict=True):
            weight[:, own] = 0
            weight[TOKEN] = row
    model.save_pretrained(directory)


def test_a_planted_neuron_is_found_first(tmp_path: Path) -> None:
    save_model_of_one_detector(tmp_path / "model")
    with_token = [f"s{'ob' * (i % 5)}q{'ab' * i}" for i in range(12)]
    without = [f"s{'ob' * (i % 5)}b{'ab' * i}" for i in range(12)]
    texts = text_source({"q": with_token, "other": without})
    methods: dict[str, Any] = {
        "welch_t": pb.WelchTMethod(texts=texts, target="q", pooling="NEURON_POOLING_MAX"),
        "contrast_set": pb.ContrastSetMethod(texts=texts, target="q", subsets=2, pooling="NEURON_POOLING_MAX"),
        "average_precision": pb.AveragePrecisionMethod(texts=texts, target="q", pooling="NEURON_POOLING_MAX"),
        "sparse_probe": pb.SparseProbeMethod(texts=texts, target="q", k=[1]),
        "activation_entropy": pb.ActivationEntropyMethod(texts=texts, targets=["q"], activity=0.0),
    }
    with (
        LiveServer(load_model(str(tmp_path / "model")), tmp_path / "artifacts") as server,
        grpc.insecure_channel(server.address) as channel,
    ):
        for name, method in methods.items():
            # The most specific neurons may be those of the other label.
            size = {"sparse_probe": {}, "activation_entropy": {"top_k": 6}}.get(name, {"top_k": 1})
            (found,) = localized(NeuronServiceStub(channel), **{name: method}, layers=[0], **size).sets
            assert found.stored.best[0].neuron == pb.NeuronId(layer=0, neuron=TOKEN), (name, found)
            assert found.heldout > found.random_mean


def test_documents_are_held_out_and_not_windows_of_them(stub: NeuronServiceStub, store: ArtifactStore) -> None:
    """Two documents of a label have enough windows for both parts, and would be in both."""
    builder = CorpusBuilder()
    for _ in range(4):
        builder.add("abcdefg" * 8, "one")
        builder.add("hijklmn" * 8, "two")
        builder.add("no label", None)
    store.put(
        ArtifactKind.CORPUS,
        builder.tensors(),
        model_fingerprint="",
        provenance=builder.provenance(),
        tags=["documents"],
    )
    texts = pb.TextSource(corpus="documents", window_tokens=8)
    result = localized(stub, welch_t=pb.WelchTMethod(texts=texts, target="one"), top_k=1)
    assert (result.texts, result.tokens) == (8 * 7, 8 * 56)
    few = pb.TextSource(corpus="documents", window_tokens=8, max_tokens=4 * 56)
    with pytest.raises(grpc.RpcError) as caught:
        localized(stub, welch_t=pb.WelchTMethod(texts=few, target="one"), top_k=1)
    assert failure(caught.value).fields == ["welch_t.texts"]


def test_a_found_set_is_clamped_watched_kept_alone_and_evaluated_in_the_next_call(
    stub: NeuronServiceStub, channel: grpc.Channel, store: ArtifactStore
) -> None:
    result = localized(stub, welch_t=pb.WelchTMethod(texts=SOURCE, target="key"), top_k=4, tags=["found"])
    saved = stored(store.get("found"))
    assert [(e.neuron.layer, e.neuron.neuron) for e in result.sets[0].stored.best] == list(saved.neurons)
    generation = GenerationServiceStub(channel)
    prompt, stop = generation_pb2.Prompt(text="It was"), generation_pb2.StopConditions(max_tokens=2, ignore_eos=True)
    clamp = program_pb2.Edit(name="clamp", site="SITE_MLP_POST", neurons={"neuron_set": "found", "set": {}})
    layers = sorted({n.layer for n in saved.neurons})
    read = [
        program_pb2.Readout(
            name=str(layer),
            site="SITE_MLP_POST",
            layers=[layer],
            neurons={"neurons": [n.neuron for n in saved.neurons if n.layer == layer]},
        )
        for layer in layers
    ]
    program = program_pb2.Program(edits=[clamp], readouts=read)
    events = list(generation.Generate(generation_pb2.GenerateRequest(prompt=prompt, stop=stop, program=program)))
    edits = [edit for event in events for edit in event.finished.receipt.edits]
    assert [(edit.name, edit.rows > 0) for edit in edits] == [("clamp", True)]
    policy = sparse_policy_pb2.SparsePolicy(static_set={"neuron_set": "found"})
    sparse = generation_pb2.GenerateRequest(prompt=prompt, stop=stop, sparsity={"policy": policy})
    assert list(generation.Generate(sparse))[-1].HasField("finished")
    monitoring = MonitoringServiceStub(channel)
    monitoring.CreateWatch(
        monitoring_pb2.CreateWatchRequest(
            items=[{"name": "found", "neurons": {"neuron_set": "found"}, "threshold": 0.1}], tags=["watch"]
        )
    )
    test = pb.NeuronTest(name="facts", facts=pb.FactsTest(facts=facts()))
    evaluation = pb.EvaluateNeuronEditRequest(
        neurons={"neuron_set": "found"}, mode="NEURON_EDIT_MODE_CLAMP", targets=[test], random_sets=2, fractions=[1.0]
    )
    assert list(stub.EvaluateNeuronEdit(evaluation))[-1].result.points[0].neurons == 4


def test_evidence_says_what_was_measured_beside_random_sets(stub: NeuronServiceStub, store: ArtifactStore) -> None:
    method = pb.ContrastSetMethod(texts=SOURCE, target="key", z=1.0, subsets=2)
    (found,) = localized(stub, contrast_set=method, top_k=3, tags=["evidence"]).sets
    info = store.info("evidence")
    assert info.provenance["method"] == "contrast_set"
    assert info.provenance["parameters"]["seed"] == str(SEED)
    assert info.evidence["heldout"] == found.heldout
    assert info.evidence["random"]["sets"] == 3
    assert all(math.isfinite(layer["max"]) for layer in info.evidence["layers"])


def test_a_neuron_set_that_leaves_no_random_ones_is_refused(stub: NeuronServiceStub) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        localized(stub, welch_t=pb.WelchTMethod(texts=SOURCE, target="key"), share=1.0)
    assert failure(caught.value).code is grpc.StatusCode.FAILED_PRECONDITION
    with pytest.raises(grpc.RpcError) as caught:
        localized(stub, contrast_set=pb.ContrastSetMethod(texts=SOURCE, target="key", z=1e6, subsets=2))
    assert "loosen them" in failure(caught.value).message


AP, WELCH, CONTRAST = pb.AveragePrecisionMethod, pb.WelchTMethod, pb.ContrastSetMethod
ENTROPY, PROBE, GRADIENT = pb.ActivationEntropyMethod, pb.SparseProbeMethod, pb.GradientMethod
GOOD = {"welch_t": WELCH(texts=SOURCE, target="key")}
FEW = text_source({"key": GROUPS["key"], "few": ["a", "b", "c"]})


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({}, "method"),
        ({"average_precision": AP(target="key")}, "average_precision.texts"),
        ({"average_precision": AP(texts={}, target="key")}, "average_precision.texts.groups"),
        ({"average_precision": AP(texts=SOURCE)}, "average_precision.target"),
        ({"average_precision": AP(texts=SOURCE, target="no")}, "average_precision.target"),
        ({"average_precision": AP(texts=SOURCE, target="key", pooling=9)}, "average_precision.pooling"),  # type: ignore[arg-type]
        ({"average_precision": AP(texts=FEW, target="key")}, "average_precision.texts"),
        ({"average_precision": AP(texts=text_source({"key": GROUPS["key"]}), target="key")}, "average_precision.texts"),
        ({"welch_t": WELCH(texts=SOURCE, target="no")}, "welch_t.target"),
        ({"welch_t": WELCH(texts=SOURCE, target="key", contrast="no")}, "welch_t.contrast"),
        ({"welch_t": WELCH(texts=SOURCE, target="key", contrast="key")}, "welch_t.contrast"),
        ({"welch_t": WELCH(texts=SOURCE, target="key", pooling=9)}, "welch_t.pooling"),  # type: ignore[arg-type]
        ({"welch_t": WELCH(texts=text_source(window_tokens=7), target="key")}, "welch_t.texts.window_tokens"),
        ({"welch_t": WELCH(texts=text_source(window_tokens=257), target="key")}, "welch_t.texts.window_tokens"),
        ({"welch_t": WELCH(texts={"corpus": "no"}, target="key")}, "welch_t.texts.corpus"),
        ({"contrast_set": CONTRAST(texts=SOURCE, target="no")}, "contrast_set.target"),
        ({"contrast_set": CONTRAST(texts=SOURCE, target="key", contrast="no")}, "contrast_set.contrast"),
        ({"contrast_set": CONTRAST(texts=SOURCE, target="key", z=math.nan)}, "contrast_set.z"),
        ({"contrast_set": CONTRAST(texts=SOURCE, target="key", subsets=101)}, "contrast_set.subsets"),
        ({"contrast_set": CONTRAST(texts=SOURCE, target="key", subsets=2, agreement=3)}, "contrast_set.agreement"),
        ({"contrast_set": CONTRAST(texts=SOURCE, target="key", pooling=9)}, "contrast_set.pooling"),  # type: ignore[arg-type]
        ({"contrast_set": CONTRAST(texts=SOURCE, target="key", subsets=4)}, "contrast_set.texts"),
        ({"activation_entropy": ENTROPY(texts=SOURCE, threshold=math.inf)}, "activation_entropy.threshold"),
        ({"activation_entropy": ENTROPY(texts=SOURCE, activity=1.5)}, "activation_entropy.activity"),
        ({"activation_entropy": ENTROPY(texts=SOURCE, targets=["key", "no"])}, "activation_entropy.targets[1]"),
        ({"activation_entropy": ENTROPY(texts=SOURCE, targets=["key", "key"])}, "activation_entropy.targets[1]"),
        ({"activation_entropy": ENTROPY(texts=text_source({"a": ["b", "c"]}))}, "activation_entropy.texts"),
        ({"activation_entropy": ENTROPY(texts=text_source({"a": ["b"], "c": ["d"]}))}, "activation_entropy.texts"),
        ({"sparse_probe": PROBE(texts=SOURCE, target="no")}, "sparse_probe.target"),
        ({"sparse_probe": PROBE(texts=SOURCE, target="key", ranker=9)}, "sparse_probe.ranker"),  # type: ignore[arg-type]
        ({"sparse_probe": PROBE(texts=SOURCE, target="key", pooling=9)}, "sparse_probe.pooling"),  # type: ignore[arg-type]
        ({"sparse_probe": PROBE(texts=SOURCE, target="key", k=[1, 33])}, "sparse_probe.k[1]"),
        ({"sparse_probe": PROBE(texts=SOURCE, target="key", k=[1, 1])}, "sparse_probe.k[1]"),
        ({"sparse_probe": PROBE(texts=SOURCE, target="key", k=[1] * 33)}, "sparse_probe.k"),
        ({"sparse_probe": PROBE(texts=SOURCE, target="key"), "top_k": 3}, "top_k"),
        ({"sparse_probe": PROBE(texts=SOURCE, target="key"), "share": 0.1}, "share"),
        ({"gradient_times_activation": GRADIENT()}, "gradient_times_activation.facts"),
        (
            {"gradient_times_activation": GRADIENT(facts=[pb.Fact(answer="a")])},
            "gradient_times_activation.facts[0].prompt",
        ),
        (
            {"gradient_times_activation": GRADIENT(facts=facts([("a", "")]))},
            "gradient_times_activation.facts[0].answer",
        ),
        (
            {"gradient_times_activation": GRADIENT(facts=facts(), controls=facts([("a", "")]))},
            "gradient_times_activation.controls[0].answer",
        ),
        (
            {
                "gradient_times_activation": GRADIENT(
                    facts=[pb.Fact(prompt={"text": "a"}, answer="b", candidates=["c"])]
                )
            },
            "gradient_times_activation.facts[0].candidates",
        ),
        ({"gradient_times_activation": GRADIENT(facts=facts(), max_steps=9)}, "gradient_times_activation.max_steps"),
        (
            {"gradient_times_activation": GRADIENT(facts=facts(), completeness=0.1)},
            "gradient_times_activation.completeness",
        ),
        ({"integrated_gradients": GRADIENT(facts=facts(), max_steps=6)}, "integrated_gradients.max_steps"),
        ({"integrated_gradients": GRADIENT(facts=facts(), max_steps=4097)}, "integrated_gradients.max_steps"),
        ({"integrated_gradients": GRADIENT(facts=facts(), completeness=0.0)}, "integrated_gradients.completeness"),
        ({"integrated_gradients": GRADIENT(facts=facts(), completeness=1.0)}, "integrated_gradients.completeness"),
        ({"gradient_times_activation": GRADIENT(facts=facts()), "site": "SITE_MLP_UP"}, "site"),
        ({**GOOD, "site": "SITE_RESID_POST"}, "site"),
        ({**GOOD, "layers": [0, 2]}, "layers[1]"),
        ({**GOOD, "layers": [0, 0]}, "layers[1]"),
        ({**GOOD, "top_k": 0}, "top_k"),
        ({**GOOD, "top_k": 129}, "top_k"),
        ({**GOOD, "share": 0.0}, "share"),
        ({**GOOD, "share": 1.5}, "share"),
        ({**GOOD, "holdout_fraction": 0.0}, "holdout_fraction"),
        ({**GOOD, "holdout_fraction": 1.0}, "holdout_fraction"),
        ({**GOOD, "random_sets": 1001}, "random_sets"),
        ({**GOOD, "description": "x" * 100_000}, "description"),
        ({**GOOD, "tags": ["ok", "a/b"]}, "tags[1]"),
    ],
)
def test_what_cannot_be_localized_is_refused_by_its_field(
    server: LiveServer, stub: NeuronServiceStub, fields: dict[str, Any], field: str
) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        list(stub.LocalizeNeurons(pb.LocalizeNeuronsRequest(**fields)))
    refused = failure(caught.value)
    assert refused.message.startswith(f"{field}: ")
    assert refused.code in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND)


def test_a_tag_of_several_labels_has_to_be_one_and_free_before_anything_is_run(
    server: LiveServer, stub: NeuronServiceStub, store: ArtifactStore
) -> None:
    tensors = {"layer.0.neurons": torch.arange(2)}
    for tag in ("taken-key", "plain"):
        store.put(ArtifactKind.NEURON_SET, tensors, model_fingerprint=server.model.info.fingerprint, tags=[tag])
    steps = server.server.engine.stats().steps
    spaced = text_source({"two words": GROUPS["key"], "sum": GROUPS["sum"]})
    for tags, source, code in (
        (["free", "taken"], SOURCE, grpc.StatusCode.ALREADY_EXISTS),
        (["free", "other"], spaced, grpc.StatusCode.INVALID_ARGUMENT),
    ):
        with pytest.raises(grpc.RpcError) as caught:
            localized(stub, activation_entropy=ENTROPY(texts=source, activity=0.5), tags=tags)
        refused = failure(caught.value)
        assert refused.code is code
        assert refused.message.startswith("tags[1]: " if code is grpc.StatusCode.ALREADY_EXISTS else "tags[0]: ")
    assert server.server.engine.stats().steps == steps
    # A tag that none of the sets has may be taken, and one label alone has the plain tag, whatever its name.
    method = ENTROPY(texts=SOURCE, activity=0.5)
    localized(stub, activation_entropy=method, tags=["plain"], top_k=16)
    one = ENTROPY(texts=spaced, activity=0.5, targets=["two words"])
    (found,) = localized(stub, activation_entropy=one, tags=["two-words"], top_k=16).sets
    assert store.info("two-words").id == found.stored.artifact.id


@pytest.mark.parametrize(
    "fields",
    [
        {"welch_t": WELCH(texts=text_source({k: v * 20 for k, v in GROUPS.items()}), target="key")},
        {"activation_entropy": ENTROPY(texts=text_source({k: v * 20 for k, v in GROUPS.items()}))},
        {"integrated_gradients": GRADIENT(facts=facts() * 50, all_tokens=True, completeness=1e-6)},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_a_cancelled_localization_leaves_nothing_in_the_engine(
    server: LiveServer, stub: NeuronServiceStub, fields: dict[str, Any]
) -> None:
    call = stub.LocalizeNeurons(pb.LocalizeNeuronsRequest(**fields))
    next(call)
    call.cancel()
    with pytest.raises(grpc.RpcError):
        list(call)

    def idle() -> bool:
        stats = server.server.engine.stats()
        return not (stats.running or stats.waiting) and stats.kv_blocks_free == stats.kv_blocks_total

    until(idle)
    # The exclusive door is free again.
    assert localized(stub, gradient_times_activation=GRADIENT(facts=facts()), top_k=1).sets


def test_texts_without_a_label_are_not_read(stub: NeuronServiceStub, store: ArtifactStore) -> None:
    builder = CorpusBuilder()
    for i in range(6):
        for label in ("one", "two", None):
            builder.add(f"{label} {i}", label)
    provenance = builder.provenance()
    store.put(ArtifactKind.CORPUS, builder.tensors(), model_fingerprint="", provenance=provenance, tags=["mixed"])
    assert UNLABELLED in store.get("mixed").tensors["labels"].tolist()
    for name, method in (
        ("average_precision", AP(texts={"corpus": "mixed"}, target="one")),
        ("activation_entropy", ENTROPY(texts={"corpus": "mixed"}, activity=0.5)),
    ):
        assert localized(stub, **{name: method}, top_k=16).texts == 12

"""Neurons: what the clients send to NeuronService, and what they make of the answers."""

from collections.abc import Callable
from typing import Any

import pytest
from canned_neurons import NEURON_SET, Neurons

from patchclamp import AsyncClient, Client, requests
from patchclamp.names import NEURON_EDIT_MODES, NEURON_POOLINGS, NEURON_RANKERS, NEURON_WEIGHTS
from patchclamp.neurons import (
    Fact,
    FactsTest,
    GenerationTest,
    Neuron,
    TextSource,
    TextsTest,
    activation_entropy,
    average_precision,
    contrast_set,
    gradient_times_activation,
    integrated_gradients,
    selection_message,
    sparse_probe,
    texts_message,
    welch_t,
)
from patchclamp.programs import generated
from patchclamp.requests import download, upload
from patchclamp.results import (
    DecodedNeurons,
    NeuronDescription,
    NeuronEditEffect,
    NeuronEditPoint,
    Progress,
    ScoredNeuron,
)
from patchclamp.v1 import artifact_pb2, generation_pb2, program_pb2, sparsity_pb2
from patchclamp.v1 import neuron_pb2 as pb

Serve = Callable[..., str]
TEXTS: Any = {"capitals": ["Paris is"], "colours": ["Grass is", "Snow is"]}
FACTS: Any = [("The capital of France is", " Paris"), Fact("Grass is", " green", [" red"])]


@pytest.fixture
def server() -> Neurons:
    return Neurons()


@pytest.fixture
def client(serve: Serve, server: Neurons) -> Any:
    with Client(serve(neurons=server)) as client:
        yield client


def text(content: str) -> generation_pb2.Prompt:
    return generation_pb2.Prompt(text=content)


def test_neurons_are_listed_or_the_best_of_a_set() -> None:
    listed = selection_message([(29, 808), Neuron(3, 5)])
    assert [(each.layer, each.neuron) for each in listed.neurons.neurons] == [(29, 808), (3, 5)]
    assert selection_message("dog", 3) == pb.NeuronSelection(neuron_set="dog", top_k=3)
    assert str(Neuron(29, 808)) == "L29N808"


@pytest.mark.parametrize(("neurons", "top_k"), [([(1, 2)], 3), ([], 0)])
def test_a_contradiction_in_a_selection_is_refused(neurons: Any, top_k: int) -> None:
    with pytest.raises(ValueError, match="neuron"):
        selection_message(neurons, top_k)


@pytest.mark.parametrize(
    ("words", "sent"), [("dog", ["dog"]), (["dog", "puppy"], ["dog", "puppy"]), (iter(["dog"]), ["dog"])]
)
def test_neurons_of_a_word_or_of_several_are_found(client: Client, server: Neurons, words: Any, sent: Any) -> None:
    result = client.find_neurons(words, layers=[1], top_k=5, value=0.0, tags=["dog"]).result()
    words = pb.Words(words=sent)
    assert server.request == pb.FindNeuronsRequest(words=words, layers=[1], top_k=5, value=0.0, tags=["dog"])
    assert result.found.best[0] == ScoredNeuron(Neuron(1, 5), 9.5, 20.0)
    assert (result.found.artifact.kind, result.found.neurons) == ("neuron_set", 2)
    assert [(each.layer, each.neurons) for each in result.found.layers] == [(0, 1), (1, 1)]
    assert result.tokens[0].text == " dog"


def test_neurons_along_a_vector_are_found(client: Client, server: Neurons) -> None:
    client.find_neurons(vector="joyful").result()
    assert server.request == pb.FindNeuronsRequest(vector=program_pb2.Vector(artifact="joyful"))
    client.find_neurons(vector=[1.0, 0.0]).result()
    assert list(server.request.vector.values.shape) == [2]


@pytest.mark.parametrize("options", [{}, {"words": "dog", "vector": "joyful"}, {"words": []}])
def test_a_search_is_for_words_or_along_a_vector(options: Any) -> None:
    with pytest.raises(ValueError, match="words: give"):
        requests.find_neurons(**options)


def test_neurons_are_decoded_in_batches_and_kept_in_order(client: Client, server: Neurons) -> None:
    events: list[object] = []
    decoded = client.decode_neurons("dog", top_k=3, weights=["down"], tokens=4).result(events.append)
    assert server.request == pb.DecodeNeuronsRequest(
        neurons=pb.NeuronSelection(neuron_set="dog", top_k=3), weights=[pb.NEURON_WEIGHTS_DOWN], top_k=4
    )
    assert [type(event) for event in events] == [Progress, DecodedNeurons, DecodedNeurons]
    assert [each.neuron for each in decoded] == [Neuron(1, 5), Neuron(1, 6), Neuron(0, 3)]
    [row] = decoded[0].rows
    assert (row.weights, row.top[0].text, row.bottom[0].effect, row.top_z) == ("down", " dog", -1.5, 9.5)


def test_whole_layers_are_decoded(client: Client, server: Neurons) -> None:
    client.decode_neurons(layers=range(2)).result()
    assert server.request == pb.DecodeNeuronsRequest(layers=[0, 1])


@pytest.mark.parametrize(
    "build",
    [
        lambda: requests.decode_neurons("dog", layers=[1]),
        lambda: requests.match_neurons("other", "corpus", neurons=[(1, 2)], layers=[1]),
        lambda: requests.decode_neurons(top_k=3),
        lambda: requests.localize_neurons(welch_t(TEXTS, "capitals"), top_k=5, share=0.1),
    ],
)
def test_two_ways_to_say_which_neurons_are_one_too_many(build: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match="give"):
        build()


def test_texts_are_sent_by_label_or_named_as_a_corpus() -> None:
    groups = [
        pb.LabelledTexts(label="capitals", prompts=[text("Paris is")]),
        pb.LabelledTexts(label="colours", prompts=[text("Grass is"), text("Snow is")]),
    ]
    assert texts_message(TEXTS) == pb.TextSource(groups=groups)
    limited = TextSource("wiki", window_tokens=64, max_tokens=2**40)
    assert texts_message(limited) == pb.TextSource(corpus="wiki", window_tokens=64, max_tokens=2**40)
    assert texts_message("wiki") == pb.TextSource(corpus="wiki")
    [unlabelled] = texts_message(["Paris is", [5, 6]]).groups
    assert [each.WhichOneof("form") for each in unlabelled.prompts] == ["text", "tokens"]


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ([], "texts: give at least one text"),
        ({"a": []}, "texts: give at least one text"),
        ("", "texts: give at least one text"),
        ({"a": "one"}, r"texts\['a'\]: expected several, each a text, got 'one'"),
        ({"a": ["one", 2]}, r"texts\['a'\]\[1\]: expected a text, token ids or chat turns"),
        ({1: ["one"]}, r"texts\[1\]: expected a str, got 1"),
    ],
)
def test_texts_that_are_none_are_named_by_their_label(texts: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        texts_message(texts)


def test_each_method_fills_in_its_own_message() -> None:
    source = texts_message(TEXTS)
    facts = [
        pb.Fact(prompt=text("The capital of France is"), answer=" Paris"),
        pb.Fact(prompt=text("Grass is"), answer=" green", candidates=[" red"]),
    ]
    last, largest, l1 = pb.NEURON_POOLING_LAST_TOKEN, pb.NEURON_POOLING_MAX, pb.NEURON_RANKER_L1
    request = pb.LocalizeNeuronsRequest
    made = [
        average_precision(TEXTS, "capitals", pooling="last_token"),
        activation_entropy(TEXTS, ["capitals"], threshold=0.0, activity=0.9),
        gradient_times_activation(FACTS, FACTS[1:], all_tokens=True),
        integrated_gradients(FACTS, max_steps=16, completeness=0.0),
        welch_t(TEXTS, "capitals", "colours"),
        contrast_set(TEXTS, "capitals", z=2.0, subsets=4, agreement=3, pooling="max"),
        sparse_probe(TEXTS, "capitals", k=[1, 2], ranker="l1", by_layer=True),
    ]
    assert made == [
        request(average_precision=pb.AveragePrecisionMethod(texts=source, target="capitals", pooling=last)),
        request(
            activation_entropy=pb.ActivationEntropyMethod(
                texts=source, threshold=0.0, activity=0.9, targets=["capitals"]
            )
        ),
        request(gradient_times_activation=pb.GradientMethod(facts=facts, controls=facts[1:], all_tokens=True)),
        request(integrated_gradients=pb.GradientMethod(facts=facts, max_steps=16, completeness=0.0)),
        request(welch_t=pb.WelchTMethod(texts=source, target="capitals", contrast="colours")),
        request(
            contrast_set=pb.ContrastSetMethod(
                texts=source, target="capitals", z=2.0, subsets=4, agreement=3, pooling=largest
            )
        ),
        request(sparse_probe=pb.SparseProbeMethod(texts=source, target="capitals", k=[1, 2], ranker=l1, by_layer=True)),
    ]
    methods = request.DESCRIPTOR.oneofs_by_name["method"].fields
    assert [each.WhichOneof("method") for each in made] == [field.name for field in methods]


def test_a_localisation_returns_its_sets_beside_random_ones(client: Client, server: Neurons) -> None:
    events: list[object] = []
    result = client.localize_neurons(
        average_precision(TEXTS, "capitals"),
        layers=[1],
        site="mlp_post",
        share=0.01,
        holdout_fraction=0.0,
        random_sets=2,
        seed=7,
        description="mine",
        tags=["capitals"],
    ).result(events.append)
    assert server.request == pb.LocalizeNeuronsRequest(
        average_precision=pb.AveragePrecisionMethod(texts=texts_message(TEXTS), target="capitals"),
        layers=[1],
        site=program_pb2.SITE_MLP_POST,
        share=0.01,
        holdout_fraction=0.0,
        random_sets=2,
        seed=7,
        description="mine",
        tags=["capitals"],
    )
    assert events[0] == Progress("activations", 3, 4, resumed=2)
    [found] = result.sets
    assert (found.label, found.heldout, found.random, found.layer_max) == ("capitals", 0.875, (0.5, 0.25), (0.5, 0.875))
    assert (result.texts, result.tokens, result.warnings, result.probes) == (12, 340, ("few texts",), ())


def test_a_size_that_is_left_out_is_the_methods() -> None:
    request = requests.localize_neurons(welch_t("wiki", "code"))
    assert request.WhichOneof("size") is None
    assert requests.localize_neurons(welch_t("wiki", "code"), top_k=5).top_k == 5


def test_probes_are_over_all_layers_unless_they_name_one(client: Client) -> None:
    [probe] = client.localize_neurons(sparse_probe(TEXTS, "capitals")).result().probes
    assert (probe.k, probe.layer, probe.f1, probe.neurons) == (2, None, 0.9, (Neuron(1, 5),))


def test_what_is_no_method_is_refused() -> None:
    with pytest.raises(TypeError, match=r"method: expected what a function of patchclamp\.neurons makes, got 'welch"):
        requests.localize_neurons("welch_t")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"method: .* such as welch_t"):
        requests.localize_neurons(pb.LocalizeNeuronsRequest())
    with pytest.raises(ValueError, match="facts: give at least one"):
        gradient_times_activation([])


def test_an_edit_is_measured_point_by_point_beside_random_sets(client: Client, server: Neurons) -> None:
    events: list[object] = []
    effect = client.evaluate_neuron_edit(
        "capitals",
        "clamp",
        [FactsTest("capitals", FACTS[:1]), GenerationTest("words", ["Hi"], words=["Paris"], probe="v", probe_layer=0)],
        sides=TextsTest("prose", "A text."),
        top_k=9,
        value=0.0,
        fractions=[0.5, 1],
        random_sets=2,
        seed=3,
        scope=generated(),
    ).result(events.append)
    fact = pb.Fact(prompt=text("The capital of France is"), answer=" Paris")
    generation = pb.GenerationTest(prompts=[text("Hi")], words=["Paris"], probe="v", probe_layer=0)
    assert server.request == pb.EvaluateNeuronEditRequest(
        neurons=pb.NeuronSelection(neuron_set="capitals", top_k=9),
        mode=pb.NEURON_EDIT_MODE_CLAMP,
        value=0.0,
        fractions=[0.5, 1],
        targets=[
            pb.NeuronTest(name="capitals", facts=pb.FactsTest(facts=[fact])),
            pb.NeuronTest(name="words", generation=generation),
        ],
        sides=[pb.NeuronTest(name="prose", texts=pb.TextsTest(texts=["A text."]))],
        random_sets=2,
        seed=3,
        scope=generated().message(),
    )
    assert [type(event) for event in events] == [Progress, NeuronEditPoint, NeuronEditPoint, NeuronEditEffect]
    assert effect.neurons == (Neuron(1, 5), Neuron(0, 3))
    accuracy, perplexity = effect.curves()
    assert [(fraction, each.change) for fraction, each in accuracy] == [(0.5, -0.25), (1.0, -0.5)]
    assert {(each.test, each.metric, each.side) for _, each in perplexity} == {("prose", "perplexity", True)}
    assert (accuracy[0][1].random, accuracy[0][1].beyond_random) == ((-0.0625, 0.0), -0.21875)


TEST = TextsTest("t", "words")
UNFIT: Any = ["a", ("a", 5)]


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (("dog", "zero", []), {}, "targets: give at least one"),
        (("dog", "zero", TEST), {"sides": TEST}, "each test has a name of its own, got t, t"),
        (("dog", "zero", TEST), {"value": 1.0}, 'value: is given with the modes "clamp" and "scale"'),
        (("dog", "scale", TEST), {}, 'value: the mode "scale" needs the factor'),
        (("dog", "off", TEST), {}, "mode 'off' is unknown; accepted: zero, mean, clamp, scale"),
        (("dog", "zero", ["t"]), {}, r"targets\[0\]: expected a FactsTest, TextsTest or GenerationTest, got 't'"),
        (
            ("dog", "zero", [FactsTest("t", UNFIT[:1])]),
            {},
            r"targets\[0\]\.facts\[0\]: expected a Fact or \(prompt, ans",
        ),
        (("dog", "zero", [FactsTest("t", UNFIT[1:])]), {}, r"targets\[0\]\.facts\[0\]\.answer: expected a str, got 5"),
        (("dog", "zero", [GenerationTest("t", [], max_tokens=-1)]), {}, r"targets\[0\]\.max_tokens: expected an int"),
    ],
)
def test_an_edit_that_cannot_be_measured_is_refused(arguments: Any, options: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        requests.evaluate_neuron_edit(*arguments, **options)


def test_a_census_sends_its_settings_and_returns_its_counts(client: Client, server: Neurons) -> None:
    census = client.census_neurons(
        "wiki", threshold=0.0, always_from=0.5, ngram=3, restart=True, tags=["usual"], replace_tags=True
    ).result()
    assert server.request == pb.CensusNeuronsRequest(
        texts=pb.TextSource(corpus="wiki"),
        threshold=0.0,
        always_from=0.5,
        ngram=3,
        restart=True,
        tags=["usual"],
        replace_tags=True,
    )
    assert (census.tokens, census.resumed_tokens, census.tokens_per_second) == (100_000, 50_000, 1250.0)
    assert [(each.layer, each.dead, each.positional) for each in census.layers] == [(0, 2, 0), (1, 1, 3)]
    assert [each.neuron_class for each in census.classes] == ["dead"]
    assert (census.detectors[0].text, census.detectors[0].token_ids) == (" dog cat", (7, 8))
    assert census.positional[0].rates == (1.0, 0.5)


def test_neurons_are_described_one_by_one(client: Client, server: Neurons) -> None:
    events: list[object] = []
    stream = client.describe_neurons([(1, 5), (0, 3)], ["My dog barks"], context_tokens=0, descriptions=["dogs"])
    described = stream.result(events.append)
    assert server.request == pb.DescribeNeuronsRequest(
        neurons=selection_message([(1, 5), (0, 3)]),
        texts=texts_message(["My dog barks"]),
        context_tokens=0,
        descriptions=["dogs"],
    )
    assert [type(event) for event in events] == [Progress, NeuronDescription, NeuronDescription]
    assert [each.neuron for each in described] == [Neuron(1, 5), Neuron(0, 3)]
    [context] = described[0].contexts
    assert (context.value, [each.value for each in context.tokens]) == (8.0, [0.0, 8.0, 1.0])
    assert (described[0].scores[0].pmi, described[0].scores[0].causal) == (0.5, None)


def test_a_causal_score_is_one_of_a_description(client: Client) -> None:
    [described, _] = client.describe_neurons("dog", "wiki", descriptions=["dogs"], causal=True).result()
    assert described.scores[0].causal == 1.25
    with pytest.raises(ValueError, match="causal: scores descriptions"):
        client.describe_neurons("dog", "wiki", causal=True)


def test_neurons_of_two_checkpoints_are_matched(client: Client, server: Neurons) -> None:
    matched = client.match_neurons("tuned", "wiki", neurons="dog", top_k=3, any_layer=True, tags=["ported"]).result()
    assert server.request == pb.MatchNeuronsRequest(
        other="tuned",
        texts=pb.TextSource(corpus="wiki"),
        neurons=pb.NeuronSelection(neuron_set="dog", top_k=3),
        any_layer=True,
        tags=["ported"],
    )
    [match] = matched.matches
    assert (match.neuron, match.other, match.mutual) == (Neuron(1, 5), Neuron(1, 2), True)
    assert (matched.ported.artifact.id, matched.shuffled_mean_correlation) == (NEURON_SET.id, 0.0625)


def test_neuron_sets_are_compared_by_stated_definitions(client: Client, server: Neurons) -> None:
    [found] = client.compare_neuron_sets(["one", "two"], top_k=4)
    assert server.request == pb.CompareNeuronSetsRequest(neuron_sets=["one", "two"], top_k=4)
    assert (found.common, found.expected_common, found.jaccard, found.p_value) == (3, 0.25, 0.5, 0.001)
    assert [(each.layer, each.neurons) for each in found.common_by_layer] == [(1, 3)]


def test_one_neuron_set_is_nothing_to_compare() -> None:
    with Client() as client, pytest.raises(TypeError, match="neuron_sets: expected several"):
        client.compare_neuron_sets("one")


def test_every_word_of_the_contract_has_a_name() -> None:
    assert list(NEURON_WEIGHTS) == ["gate", "up", "down"]
    assert list(NEURON_POOLINGS) == ["last_token", "mean", "max"]
    assert list(NEURON_RANKERS) == ["mean_difference", "f", "mutual_information", "l1"]
    assert list(NEURON_EDIT_MODES) == ["zero", "mean", "clamp", "scale"]


def test_progress_tells_what_a_checkpoint_brought_where_the_job_has_any() -> None:
    assert Progress.from_proto(pb.NeuronProgress(stage="tokens", done=3, total=4, resumed=2)).resumed == 2
    assert Progress.from_proto(sparsity_pb2.SparsityProgress(stage="quality", done=1, total=2)).resumed == 0


def test_neurons_are_uploaded_and_downloaded_as_lists_by_layer() -> None:
    header, _ = upload(b'{"1": [5]}', kind="neuron_set", format="neuron_set_json")
    assert header.header.kind == artifact_pb2.ARTIFACT_KIND_NEURON_SET
    assert header.header.format == artifact_pb2.ARTIFACT_FORMAT_NEURON_SET_JSON
    assert download("dog", "neuron_set_json", ()).format == artifact_pb2.ARTIFACT_FORMAT_NEURON_SET_JSON


async def test_the_async_client_does_the_same(serve: Serve) -> None:
    async with AsyncClient(serve(neurons=Neurons())) as client:
        decoded = await client.decode_neurons("dog").result()
        found = await client.find_neurons("dog").result()
        localized = await client.localize_neurons(welch_t("wiki", "code")).result()
        effect = await client.evaluate_neuron_edit("dog", "zero", TEST).result()
        census = await client.census_neurons("wiki").result()
        described = await client.describe_neurons("dog", "wiki").result()
        matched = await client.match_neurons("tuned", "wiki").result()
        [compared] = await client.compare_neuron_sets(["one", "two"])
    assert (len(decoded), len(effect.points), len(described), compared.common) == (3, 2, 2, 3)
    assert found.found.artifact == localized.sets[0].stored.artifact == matched.ported.artifact
    assert census.classes[0].stored.artifact.id == NEURON_SET.id


def test_neurons_in_text_are_listed_ones_and_all_other_text_is_a_set() -> None:
    assert selection_message("L29N808,L3N5") == selection_message([(29, 808), (3, 5)])
    assert selection_message("L29N808") == selection_message([(29, 808)])
    assert selection_message("L29").neuron_set == "L29"


def test_answers_by_their_prompts_are_facts() -> None:
    pairs = [("The capital of France is", " Paris"), ("The capital of Italy is", " Rome")]
    assert FactsTest("capitals", dict(pairs)).message() == FactsTest("capitals", pairs).message()

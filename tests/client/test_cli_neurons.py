"""What `patchclamp neurons` sends and prints, and how its arguments are read."""

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from canned_neurons import NEURON_SET, Neurons

from patchclamp import datasets
from patchclamp.cli import main
from patchclamp.cli.neurons.drawing import layer_lines
from patchclamp.cli.neurons.evaluate import probe
from patchclamp.cli.neurons.selection import neurons
from patchclamp.cli.neurons.texts import facts_file, named_file
from patchclamp.neurons import (
    Fact,
    FactsTest,
    GenerationTest,
    TextSource,
    TextsTest,
    activation_entropy,
    integrated_gradients,
    sparse_probe,
    welch_t,
)
from patchclamp.requests import evaluate_neuron_edit, localize_neurons
from patchclamp.v1 import job_pb2
from patchclamp.v1 import neuron_pb2 as pb
from patchclamp.v1.job_pb2_grpc import JobServiceServicer

Serve = Callable[..., str]


@pytest.fixture
def server() -> Neurons:
    return Neurons()


@pytest.fixture(autouse=True)
def address(serve: Serve, server: Neurons, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATCHCLAMP_ADDRESS", serve(neurons=server))


@pytest.fixture(autouse=True)
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    contents = {
        "code.txt": "x = 1\n\ny = 2\n",
        "prose.txt": "It rained.\n",
        "facts.tsv": "France has the capital\t Paris\t Rome\nGrass is\t green\n",
        "facts.jsonl": '{"prompt": "Snow is", "answer": " white", "candidates": [" red"]}\n',
    }
    for name, content in contents.items():
        (tmp_path / name).write_text(content)
    monkeypatch.chdir(tmp_path)


def json_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    assert main(["neurons", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["neurons", *arguments]) == 2
    return capsys.readouterr().err


def test_neurons_are_listed_or_a_set() -> None:
    assert neurons("L29N808,L3N5") == [(29, 808), (3, 5)]
    assert neurons("dog") == "dog"
    with pytest.raises(argparse.ArgumentTypeError, match="L29N808,L3N5"):
        neurons("L29N808,dog")


def test_a_file_has_the_name_it_is_given_or_its_own() -> None:
    assert named_file("french=texts/fr.txt") == ("french", "texts/fr.txt")
    assert named_file("texts/fr.txt") == ("fr", "texts/fr.txt")
    with pytest.raises(argparse.ArgumentTypeError, match="NAME=FILE"):
        named_file("=fr.txt")


def test_facts_are_read_from_tables_and_from_lines_of_json() -> None:
    assert facts_file("facts.tsv") == [
        Fact("France has the capital", " Paris", [" Rome"]),
        Fact("Grass is", " green", []),
    ]
    assert facts_file("facts.jsonl") == [Fact("Snow is", " white", [" red"])]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.tsv", "Grass is\t green\nSnow is\n", r"a\.tsv:2: expected a prompt, a tab and its answer"),
        ("a.jsonl", '{"prompt": "Snow is"}', r'a\.jsonl:1: expected {"prompt"'),
        ("a.jsonl", '{"prompt": "a", "answer": "b", "candidates": "c"}', r"a\.jsonl:1: expected"),
    ],
)
def test_a_line_that_holds_no_fact_is_named(name: str, content: str, message: str) -> None:
    Path(name).write_text(content)
    with pytest.raises(argparse.ArgumentTypeError, match=message):
        facts_file(name)


def test_decode_prints_a_row_for_each_matrix(server: Neurons, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["neurons", "decode", "dog", "--top", "3", "--weights", "down", "--tokens", "1"]) == 0
    assert server.request == pb.DecodeNeuronsRequest(
        neurons=pb.NeuronSelection(neuron_set="dog", top_k=3), weights=[pb.NEURON_WEIGHTS_DOWN], top_k=1
    )
    rows = capsys.readouterr().out.splitlines()
    assert len(rows) == 4
    assert rows[1].split() == ["L1N5", "down", "+9.5", '"', 'dog"', "-3.0", '"', 'cat"']
    assert main(["neurons", "decode", "--layers", "0-1"]) == 0
    assert server.request == pb.DecodeNeuronsRequest(layers=[0, 1])
    capsys.readouterr()
    assert json_of(capsys, "decode", "L1N5,L0N3")[0]["neuron"] == [1, 5]


def test_find_prints_the_best_with_their_values_and_a_bar_for_each_layer(
    server: Neurons, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["neurons", "find", "dog", "puppy", "--name", "dogs", "--top", "2", "--value", "30"]) == 0
    words = pb.Words(words=["dog", "puppy"])
    assert server.request == pb.FindNeuronsRequest(words=words, top_k=2, value=30, tags=["dogs"])
    printed = capsys.readouterr()
    header, first, second, *_ = printed.out.splitlines()
    assert (header.split(), first.split()) == (["neuron", "|z|", "value"], ["L1N5", "9.5000", "20"])
    assert second.split() == ["L0N3", "4.2500", "-20"]
    assert f"L1 |{'▒' * 32}| 9.5" in printed.out
    assert f"stored without a name, as {NEURON_SET.id}" in printed.err
    assert "first tokens, which alone are sought: " in printed.err
    assert main(["neurons", "find", "--vector", "joyful"]) == 0
    assert server.request.vector.artifact == "joyful"
    assert "|cosine|" in capsys.readouterr().out


def test_find_wants_words_or_a_vector(capsys: pytest.CaptureFixture[str]) -> None:
    assert "words: give either" in refused(capsys, "find")
    assert "words: give either" in refused(capsys, "find", "dog", "--vector", "joyful")


def test_localize_sends_texts_by_label_and_prints_the_evidence(
    server: Neurons, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = ["--texts", "code=code.txt", "--texts", "prose.txt", "--texts", "code=prose.txt", "--max-tokens", "99"]
    options = [
        "--target",
        "code",
        "--contrast",
        "prose",
        "--top",
        "5",
        "--random-sets",
        "2",
        "--holdout-fraction",
        ".5",
    ]
    assert main(["neurons", "localize", "welch_t", "code", *texts, *options]) == 0
    source = TextSource({"code": ["x = 1", "y = 2", "It rained."], "prose": ["It rained."]}, max_tokens=99)
    sent = localize_neurons(
        welch_t(source, "code", "prose"), top_k=5, random_sets=2, holdout_fraction=0.5, tags=["code"]
    )
    assert server.request == sent
    printed = capsys.readouterr()
    assert printed.out.splitlines()[:3] == ["capitals", "neuron  score   value", "L1N5    9.5000  20"]
    assert f"L0 |{'█' * 9}{'▒' * 9}{' ' * 14}| 0.5, mean 0.25" in printed.out
    assert "average precision, held out: 0.8750; of 2 random sets 0.3750 ± 0.1250" in printed.out
    assert "warning: few texts" in printed.err
    assert "12 texts, 340 tokens" in printed.err


def test_each_method_takes_its_own_options(server: Neurons, capsys: pytest.CaptureFixture[str]) -> None:
    corpus = ["--corpus", "wiki"]
    entropy = ["--target", "fr", "--target", "de", "--activity", ".9"]
    json_of(capsys, "localize", "activation_entropy", *corpus, *entropy, "--share", ".01")
    assert server.request == localize_neurons(activation_entropy("wiki", ["fr", "de"], activity=0.9), share=0.01)
    gradients = ["--facts", "facts.tsv", "--controls", "facts.jsonl", "--all-tokens", "--max-steps", "8"]
    json_of(capsys, "localize", "integrated_gradients", *gradients)
    facts, controls = facts_file("facts.tsv"), facts_file("facts.jsonl")
    assert server.request == localize_neurons(integrated_gradients(facts, controls, all_tokens=True, max_steps=8))
    assert (
        main(["neurons", "localize", "sparse_probe", *corpus, "--target", "code", "--k", "1", "2", "--by-layer"]) == 0
    )
    assert server.request == localize_neurons(sparse_probe("wiki", "code", k=[1, 2], by_layer=True))
    assert "F1 of random neurons" in capsys.readouterr().out


def test_texts_come_from_a_data_set_of_the_package(server: Neurons, capsys: pytest.CaptureFixture[str]) -> None:
    json_of(capsys, "localize", "welch_t", "--data", "sentences", "--target", "sentences")
    assert server.request == localize_neurons(welch_t(datasets.load("sentences").texts, "sentences"))
    assert "neither texts nor" in refused(capsys, "localize", "integrated_gradients", "--data", "sentences")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["welch_t", "--corpus", "wiki", "--target", "a", "--subsets", "3"], "--subsets is no option of welch_t"),
        (["welch_t", "--corpus", "wiki"], "welch_t needs one --target LABEL"),
        (["welch_t", "--target", "a"], "give --texts [LABEL=]FILE, --corpus CORPUS or --data NAME"),
        (["integrated_gradients", "--target", "a"], "integrated_gradients takes --facts, and neither texts nor"),
        (["integrated_gradients"], "integrated_gradients needs --facts FILE"),
    ],
)
def test_an_option_of_another_method_is_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in refused(capsys, "localize", *arguments)


def test_evaluate_measures_files_as_facts_or_texts_and_text_that_is_generated(
    server: Neurons, capsys: pytest.CaptureFixture[str]
) -> None:
    tests = ["--target", "capitals=facts.tsv", "--side", "facts.jsonl", "--side", "prose=prose.txt"]
    generated = ["--prompts", "prose.txt", "--words", "dog", "cat", "--probe", "joyful@16", "--max-tokens", "8"]
    more = ["--mode", "clamp", "--value", "0", "--fractions", ".5", "1", "--scope", "generated", "--top", "4"]
    assert main(["neurons", "evaluate", "capitals", *tests, *generated, *more]) == 0
    assert server.request == evaluate_neuron_edit(
        "capitals",
        "clamp",
        [
            FactsTest("capitals", facts_file("facts.tsv")),
            GenerationTest("generation", ["It rained."], 8, ["dog", "cat"], "joyful", 16),
        ],
        sides=[FactsTest("facts", facts_file("facts.jsonl")), TextsTest("prose", ["It rained."])],
        value=0.0,
        fractions=[0.5, 1],
        scope="generated",
        top_k=4,
    )
    header, first, second, *_ = capsys.readouterr().out.splitlines()
    assert header.split()[:4] == ["fraction", "neurons", "test", "metric"]
    assert first.split()[:7] == ["0.5", "1", "capitals", "accuracy", "0.75", "0.5", "-0.25"]
    assert second.split()[2:5] == ["prose", "(side)", "perplexity"]
    assert json_of(capsys, "evaluate", "capitals", *tests)["points"][1]["fraction"] == 1.0


def test_evaluate_refuses_what_it_would_not_measure(capsys: pytest.CaptureFixture[str]) -> None:
    assert "targets: give at least one" in refused(capsys, "evaluate", "dog")
    assert "after --prompts FILE" in refused(capsys, "evaluate", "dog", "--target", "prose.txt", "--words", "dog")
    assert probe("joyful@16") == ("joyful", 16)
    with pytest.raises(argparse.ArgumentTypeError, match="VECTOR@LAYER"):
        probe("joyful")


def test_census_prints_counts_by_layer_and_the_best_detectors(
    server: Neurons, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--ngram", "3", "--always-from", ".5", "--checkpoint-tokens", "1000", "--restart", "--replace"]
    assert main(["neurons", "census", "usual", "--corpus", "wiki", *options]) == 0
    assert server.request == pb.CensusNeuronsRequest(
        texts=pb.TextSource(corpus="wiki"),
        ngram=3,
        always_from=0.5,
        checkpoint_tokens=1000,
        restart=True,
        tags=["usual"],
        replace_tags=True,
    )
    printed = capsys.readouterr()
    assert printed.out.splitlines()[1].split() == ["0", "8", "2", "1", "1", "1", "0", "0", "0.2500"]
    assert 'L1N5      " dog cat"  20           0.950   0.050' in printed.out
    assert "400 texts, 100,000 tokens, 50,000 of them from the checkpoint; 1,250 tokens/s" in printed.err
    assert "activations 3/4 (2 resumed)" in printed.err


def test_describe_marks_the_largest_token_of_a_context(server: Neurons, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--description", "dogs", "--causal", "--context-tokens", "0", "--contexts", "3"]
    assert main(["neurons", "describe", "dog", "--texts", "prose.txt", *options]) == 0
    assert server.request == pb.DescribeNeuronsRequest(
        neurons=pb.NeuronSelection(neuron_set="dog"),
        texts=TextSource({"prose": ["It rained."]}).message(),
        contexts=3,
        context_tokens=0,
        descriptions=["dogs"],
        causal=True,
    )
    printed = capsys.readouterr().out
    assert printed.splitlines()[0] == "L1N5"
    assert '8      " my[ dog] barks\\n"' in printed
    assert "dogs         +0.5000  +1.2500" in printed
    assert [each["neuron"] for each in json_of(capsys, "describe", "dog", "--corpus", "wiki")] == [[1, 5], [0, 3]]


def test_match_prints_the_pairs_beside_what_chance_makes(server: Neurons, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["match", "tuned", "--corpus", "wiki", "--neurons", "dog", "--any-layer", "--name", "ported"]
    assert main(["neurons", *arguments]) == 0
    assert server.request == pb.MatchNeuronsRequest(
        other="tuned",
        texts=pb.TextSource(corpus="wiki"),
        neurons=pb.NeuronSelection(neuron_set="dog"),
        any_layer=True,
        tags=["ported"],
    )
    printed = capsys.readouterr().out
    assert printed.splitlines()[1].split() == ["L1N5", "L1N2", "0.7500", "mutual"]
    assert "2 of 16 matched mutually over 340 tokens; mean correlation 0.5000, with shuffled tokens 0.0625" in printed


def test_compare_names_the_sets_it_compares(server: Neurons, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["neurons", "compare", "one", "two", "--top", "4"]) == 0
    assert server.request == pb.CompareNeuronSetsRequest(neuron_sets=["one", "two"], top_k=4)
    row = capsys.readouterr().out.splitlines()[1].split()
    assert row == ["one,", "two", "3", "0.25", "0.001", "0.500", "0.750", "L1:3"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["find", "dog"], "neurons of dog"),
        (["localize", "welch_t", "--corpus", "wiki", "--target", "a"], "welch_t: capitals"),
        (["evaluate", "dog", "--target", "prose.txt"], "change of accuracy"),
        (["census", "usual", "--corpus", "wiki"], "100,000 tokens"),
    ],
)
def test_a_picture_is_written_where_one_is_asked_for(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        assert main(["neurons", *arguments, "--picture", "out.svg"]) == 0
    assert words in Path("out.svg").read_text()
    assert "picture: out.svg" in capsys.readouterr().err


class FollowedJobs(JobServiceServicer):
    """One job, which was a call of this method."""

    def __init__(self, method: str) -> None:
        self.method = method

    def FollowJob(self, request: Any, context: Any) -> Iterator[job_pb2.FollowJobResponse]:
        call: Any = getattr(Neurons(), "".join(word.capitalize() for word in self.method.split("_")))
        asked = pb.DescribeNeuronsRequest() if self.method == "describe_neurons" else pb.LocalizeNeuronsRequest()
        for response in call(asked, None):
            held: dict[str, Any] = {self.method: response}
            yield job_pb2.FollowJobResponse(**held)


@pytest.mark.parametrize(
    ("method", "shown"),
    [
        ("find_neurons", "L1N5"),
        ("localize_neurons", "held out"),
        ("census_neurons", "always on"),
        ("match_neurons", "matched mutually"),
        ("decode_neurons", "lowest z"),
        ("evaluate_neuron_edit", "beyond them"),
        ("describe_neurons", "context"),
    ],
)
def test_a_job_that_is_followed_ends_with_the_report_of_its_command(
    serve: Serve, method: str, shown: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["jobs", "follow", "job-1", "--address", serve(jobs=FollowedJobs(method))]) == 0
    printed = capsys.readouterr()
    assert shown in printed.out
    stores = method in ("find_neurons", "localize_neurons", "census_neurons", "match_neurons")
    assert (NEURON_SET.id in printed.err) == stores


@pytest.mark.parametrize("method", ["find_neurons", "localize_neurons", "census_neurons", "evaluate_neuron_edit"])
def test_a_job_that_is_followed_is_drawn_as_its_command_would(serve: Serve, method: str) -> None:
    pytest.importorskip("matplotlib")
    address = serve(jobs=FollowedJobs(method))
    assert main(["jobs", "follow", "job-1", "--address", address, "--picture", "out.svg"]) == 0
    assert Path("out.svg").stat().st_size > 1000


def test_a_job_without_a_picture_is_refused_one(serve: Serve, capsys: pytest.CaptureFixture[str]) -> None:
    address = serve(jobs=FollowedJobs("decode_neurons"))
    assert main(["jobs", "follow", "job-1", "--address", address, "--picture", "out.svg"]) != 0
    assert "--picture: there is none" in capsys.readouterr().err


def test_a_picture_shows_a_result_that_detach_does_not_wait_for(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    assert "--picture shows the result" in refused(capsys, "find", "dog", "--picture", "out.png", "--detach")


def test_a_bar_is_as_long_as_the_largest_score_of_its_layer() -> None:
    assert list(layer_lines([9, 10], [0.5, -1.0])) == [
        f" L9 |{'▒' * 16}{' ' * 16}| 0.5",
        f"L10 |{'▒' * 32}| -1",
    ]
    assert list(layer_lines([0], [0.0])) == [f"L0 |{' ' * 32}| 0"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["neurons"],
        ["neurons", "localize", "lucky_guess"],
        ["neurons", "census", "usual"],
        ["neurons", "census", "usual", "--corpus", "wiki", "--texts", "prose.txt"],
        ["neurons", "describe", "dog", "--texts", "missing.txt"],
        ["neurons", "evaluate", "L1N2,dog"],
        ["neurons", "localize", "welch_t", "--top", "5", "--share", ".1"],
    ],
)
def test_wrong_usage_exits_with_2(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2


ACTIONS = ("decode", "find", "localize", "evaluate", "census", "describe", "match", "compare")


@pytest.mark.parametrize("action", ACTIONS)
def test_every_action_on_neurons_can_answer_in_json(action: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["neurons", action, "-h"])
    shown = capsys.readouterr().out
    assert "--json" in shown
    assert ("--detach" in shown) == (action != "compare")

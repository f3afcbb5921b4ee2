"""Head analysis from both clients and the command line, against a whole server of a tiny random llama (2 x 4 heads)."""

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from live import LiveServer

from patchclamp import AsyncClient, Client, PatchclampError
from patchclamp.cli import main
from patchclamp.heads import CleanCorruptPair, Grounding, Head, Needle, NeedleTest, StoppingRule
from patchclamp.programs import Program, generated, read_heads, uniform_heads
from patchclamp.results import NeedleRun, Progress, score_matrix
from patchclamp_server.model.load import load_model

ZEROS = {f"{layer}-{head}": [0.0] for layer in range(2) for head in range(4)}
SCORES = {**ZEROS, "0-1": [0.5], "1-2": [0.75, 0.25], "1-3": [0.125]}
# One byte is one token.
NEEDLES = NeedleTest(["It rains. " * 40], [Needle("Who?", "Ann did.", "Ann")], [96, 128], [0.1, 0.9])
RANDOM: dict[str, Any] = {"sequence_tokens": 16, "sequences": 2}
# Answers for which the logits of the random model differ most between the two prompts.
PAIRS = [CleanCorruptPair("the cat", "the dog", "c", "p"), CleanCorruptPair("a cat", "a dog", "c", "p")]
SHORT: dict[str, Any] = {"max_tokens": 8, "ignore_eos": True}


@pytest.fixture(scope="module")
def server(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """One of its own, with an imported head set in its store."""
    with LiveServer(load_model(str(tiny_llama_dir)), tmp_path_factory.mktemp("head_artifacts")) as live:
        with Client(live.address) as client:
            data = json.dumps(SCORES).encode()
            client.put_artifact(data, kind="head_set", format="head_score_json", tags=["imported"])
        yield live


@pytest.fixture
def client(server: LiveServer) -> Iterator[Client]:
    with Client(server.address) as client:
        yield client


def test_published_head_scores_come_back_as_they_were_sent(client: Client):
    back = json.loads(client.download_artifact("imported", "head_score_json"))
    sent = {head: sum(scores) / len(scores) for head, scores in SCORES.items()}
    means = {head: sum(scores) / len(scores) for head, scores in back.items()}
    assert means == pytest.approx(sent)
    assert client.get_artifact("imported").kind == "head_set"


def test_heads_are_read_with_the_tokens_they_belong_to(client: Client):
    program = Program(readouts=[read_heads([1, 3], layers=[0, 1], name="looks", scope=generated())])
    result = client.generate("hello", program=program, **SHORT).result()
    values = [value for token in result.tokens for value in token.readouts]
    assert {(value.name, value.layer) for value in values} == {("looks", 0), ("looks", 1)}
    assert all(len(value.ids) == len(value.values) == 2 for value in values)
    assert all(0 <= key <= value.position for value in values for key in value.ids)
    assert all(0 < probability <= 1 for value in values for probability in value.values)


def test_uniform_heads_change_the_text_and_show_in_the_receipt(client: Client):
    program = [uniform_heads(range(4), layers="all", name="blur")]
    edited = client.generate("hello", program=program, logprobs=0, **SHORT).result()
    plain = client.generate("hello", logprobs=0, **SHORT).result()
    assert edited.receipt.touched
    assert [t.logprob for t in edited.tokens] != [t.logprob for t in plain.tokens]


def test_grounding_names_sources_that_hold_the_generated_token(client: Client):
    # The model repeats itself on this prompt, so that some heads look back at what they repeat.
    prompt = [5] * 100
    result = client.generate(prompt, grounding=Grounding("imported", top_k=8), max_tokens=90, ignore_eos=True).result()
    report = result.grounding
    assert report is not None
    grounded = [token for token in result.tokens if token.sources]
    assert report.grounded_tokens == len(grounded) > 0
    assert report.grounded_ratio == pytest.approx(len(grounded) / len(result.tokens))
    for token in grounded:
        assert all(prompt[source.position] == token.id for source in token.sources)
        most_probable = token.sources[0].position
        assert any(place.start <= most_probable < place.end for place in report.ranges)


def test_a_request_without_grounding_has_no_sources(client: Client):
    result = client.generate("hello", **SHORT).result()
    assert result.grounding is None
    assert not any(token.sources for token in result.tokens)


def test_an_unknown_head_set_is_refused_by_field(client: Client):
    with pytest.raises(PatchclampError) as refused:
        client.generate("hello", grounding="nothing").result()
    assert (refused.value.code, refused.value.violations[0].field) == ("NOT_FOUND", "grounding.head_set")


def test_a_detection_streams_its_runs_and_tells_when_no_needle_was_found(client: Client):
    events: list[object] = []
    with pytest.raises(PatchclampError, match="FAILED_PRECONDITION") as refused:
        client.detect_retrieval_heads(NEEDLES, stopping=StoppingRule(top_k=3)).result(events.append)
    assert refused.value.violations[0].field == "test"
    runs = [event for event in events if isinstance(event, NeedleRun)]
    assert sorted((run.length, run.depth) for run in runs) == [(96, 0.1), (96, 0.9), (128, 0.1), (128, 0.9)]
    assert any(isinstance(event, Progress) for event in events)


@pytest.mark.parametrize(
    ("method", "options"),
    [("induction", RANDOM), ("previous_token", RANDOM), ("ngram", {**RANDOM, "ngram": 3}), ("ov_nuclear_norm", {})],
)
def test_every_head_gets_a_score_and_the_scores_a_head_set(client: Client, method: Any, options: Any):
    result = client.score_heads(method, **options, tags=[method]).result()
    matrix = score_matrix(result.scores)
    assert (len(matrix), len(matrix[0])) == (2, 4)
    assert [each.score for each in result.scores] == sorted((each.score for each in result.scores), reverse=True)
    assert client.get_artifact(method).kind == "head_set"


def test_an_edit_of_heads_is_measured_beside_random_ones(client: Client):
    effect = client.evaluate_head_edit(
        [(0, 1), (1, 2)], "zero", random_sets=2, test=NEEDLES, texts="The rain in Spain stays in the plain. " * 8
    ).result()
    assert effect.edited.heads == (Head(0, 1), Head(1, 2))
    assert effect.unedited.runs == effect.edited.runs == 4
    assert effect.edited.perplexity != effect.unedited.perplexity
    assert len(effect.random) == 2
    assert all(len(each.heads) == 2 for each in effect.random)


@pytest.mark.parametrize("method", ["mean_ablation", "activation_patching", "path_patching"])
def test_a_circuit_ranks_every_head_and_reports_faithfulness(client: Client, method: Any):
    circuit = client.find_circuit(PAIRS, method, circuit_size=3, random_sets=2, tags=[f"circuit-{method}"]).result()
    assert len(circuit.effects) == 8
    assert circuit.clean_metric != circuit.corrupt_metric
    assert circuit.artifact.tags == (f"circuit-{method}",)


def test_head_sets_are_compared(client: Client):
    client.score_heads("induction", **RANDOM, tags=["one"]).result()
    found = client.compare_head_sets(["imported", "one", "imported"], top_k=3)
    same = next(each for each in found if (each.first, each.second) == (0, 2))
    assert (same.common, same.jaccard, same.rank_correlation) == (3, 1.0, pytest.approx(1.0))
    assert len(found) == 3


def test_parts_of_a_logit_difference_sum_to_it(client: Client):
    found = client.attribute_logits("hello", "a", contrast="b", top_heads=8)
    parts = found.embedding + sum(found.mlps) + found.biases + sum(each.part for each in found.heads)
    assert parts == pytest.approx(found.parts_sum, abs=1e-4)
    assert found.parts_sum == pytest.approx(found.logit_difference, abs=1e-4)
    assert all(sum(each.sources) == pytest.approx(each.part, abs=1e-4) for each in found.heads)
    assert all(len(each.sources) == 5 for each in found.heads)


async def test_the_async_client_does_the_same(server: LiveServer):
    async with AsyncClient(server.address) as client:
        grounded = await client.generate("hello", grounding="imported", **SHORT).result()
        scored = await client.score_heads("induction", **RANDOM).result()
        [compared] = await client.compare_head_sets(["imported", scored.artifact.id], top_k=2)
        attributed = await client.attribute_logits("hello", "a")
        circuit = await client.find_circuit(PAIRS, "activation_patching", random_sets=1).result()
    assert grounded.grounding is not None
    assert (compared.first, compared.second) == (0, 1)
    assert len(attributed.heads) == len(circuit.effects) == 8


def test_the_command_line_scores_ablates_and_attributes(
    server: LiveServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    pytest.importorskip("matplotlib")
    monkeypatch.setenv("PATCHCLAMP_ADDRESS", server.address)
    files = {
        "scores.json": json.dumps(SCORES),
        "needles.jsonl": json.dumps({"question": "Who?", "needle": "Ann did.", "answer": "Ann"}),
        "hay.txt": "It rains. " * 40,
        "pairs.jsonl": "\n".join(json.dumps(asdict(pair)) for pair in PAIRS),
    }
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    monkeypatch.chdir(tmp_path)
    assert main(["vectors", "put", "scores.json", "--name", "mine"]) == 0
    assert "head_set" in capsys.readouterr().out
    assert main(["vectors", "export", "mine", "-o", "back.json"]) == 0
    assert "1-2" in json.loads((tmp_path / "back.json").read_text())
    score = ["--sequence-tokens", "16", "--sequences", "2", "--heatmap", "heads.png"]
    assert main(["heads", "score", "induction", "copying", *score]) == 0
    assert "head 0 to 3" in capsys.readouterr().out
    assert (tmp_path / "heads.png").exists()
    needles = ["--haystack", "hay.txt", "--needles", "needles.jsonl", "--lengths", "96", "--depths", ".5"]
    ablate = ["--top", "2", "--mode", "uniform", "--random-sets", "2", "--text", "hay.txt"]
    assert main(["heads", "ablate", "mine", *ablate, *needles]) == 0
    assert "mean of 2 random sets" in capsys.readouterr().out
    assert main(["heads", "circuit", "cats", "--pairs", "pairs.jsonl", "--random-sets", "2"]) == 0
    assert "faithfulness" in capsys.readouterr().out
    assert main(["heads", "compare", "mine", "copying", "--top", "3"]) == 0
    assert "mine, copying" in capsys.readouterr().out
    assert main(["heads", "attribute", "hello", "--target", "a"]) == 0
    assert "sum of all parts" in capsys.readouterr().out
    assert main(["heads", "ground", "mine", "hello hello", "--top", "3", "--max-tokens", "4", "--ignore-eos"]) == 0
    assert "grounding:" in capsys.readouterr().err
    assert main(["heads", "detect", "none", *needles]) == 1
    assert "test" in capsys.readouterr().err


def test_retrieval_heads_of_a_real_model_are_found_drawn_and_ground_an_answer(
    embedded_server: LiveServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    pytest.importorskip("matplotlib")
    monkeypatch.setenv("PATCHCLAMP_ADDRESS", embedded_server.address)
    monkeypatch.chdir(tmp_path)
    pictures = ["--heatmap", "heads.png", "--grid", "grid.png"]
    assert main(["heads", "detect", "retrieval", "--lengths", "256", "--max-runs", "6", *pictures]) == 0
    printed = capsys.readouterr().out
    assert "of 6 needles found" in printed
    assert "tokens" in printed
    assert (tmp_path / "heads.png").exists()
    assert (tmp_path / "grid.png").exists()
    prompt = "Repeat the sentence: The secret ingredient of the soup is smoked paprika."
    assert main(["heads", "ground", "retrieval", prompt, "--chat", "--top", "10", "--max-tokens", "24"]) == 0
    printed = capsys.readouterr().out
    assert "copied from the prompt" in printed
    assert "paprika" in printed

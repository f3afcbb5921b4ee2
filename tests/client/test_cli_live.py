"""The command line against a whole server: what it prints, and its exit status."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from live import LiveServer

from patchclamp.cli import main
from patchclamp.cli.terminal import quoted
from patchclamp.programs import Program, add, when
from patchclamp_server.model.load import load_model

PUSH = [3.0 if i % 2 else -2.0 for i in range(32)]
SHORT = ["--max-tokens", "4", "--ignore-eos"]


@pytest.fixture(scope="module")
def server(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """One of its own, because these tests store artifacts."""
    with LiveServer(load_model(str(tiny_llama_dir)), tmp_path_factory.mktemp("cli_artifacts")) as live:
        yield live


@pytest.fixture(autouse=True)
def address(server: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATCHCLAMP_ADDRESS", server.address)


@pytest.fixture
def pairs(tmp_path: Path) -> str:
    words = ("day", "dog", "book", "tea", "idea", "song", "walk", "game")
    file = tmp_path / "pairs.jsonl"
    file.write_text("\n".join(json.dumps({"positive": f"good {w}", "negative": f"bad {w}"}) for w in words))
    return str(file)


@pytest.fixture
def program(tmp_path: Path) -> str:
    file = tmp_path / "program.json"
    file.write_text(Program([add(PUSH, layers=1, name="push")]).to_json())
    return str(file)


def json_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    assert main([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_generate_prints_the_text_and_beside_it_the_receipt(program: str, capsys: pytest.CaptureFixture[str]):
    result = json_of(capsys, "generate", "hello", *SHORT, "--program", program, "--clamp", "L0N3=1.5")
    assert main(["generate", "hello", *SHORT, "--program", program, "--clamp", "L0N3=1.5"]) == 0
    printed = capsys.readouterr()
    assert printed.out == result["text"] + "\n"
    assert "push:" in printed.err
    assert "L0N3:" in printed.err
    assert [edit["name"] for edit in result["receipt"]["edits"]] == ["push", "L0N3"]


def test_generate_holds_the_gate_of_a_neuron(capsys: pytest.CaptureFixture[str]):
    plain = json_of(capsys, "generate", "hello", *SHORT)
    held = json_of(capsys, "generate", "hello", *SHORT, "--clamp", "L0N3@mlp_gate=1.5", "--clamp", "L1N2@mlp_up=..0")
    gate, up = held["receipt"]["edits"]
    assert (gate["name"], up["name"]) == ("L0N3@mlp_gate", "L1N2@mlp_up")
    # All tokens but the last, which is never computed.
    assert int(gate["rows"]) == int(up["rows"]) >= len(plain["tokens"])


def test_more_tokens_than_the_context_has_are_warned_of_once_before_the_text(capsys: pytest.CaptureFixture[str]):
    assert main(["generate", "hello", "--max-tokens", "9999", "--ignore-eos"]) == 0
    printed = capsys.readouterr().err.splitlines()
    assert "warning: stop.max_tokens: the context has room for 251 tokens after the prompt, not for 9999" in printed[0]
    assert sum("warning" in line for line in printed) == 1


def test_a_strength_beyond_all_measure_is_warned_of(program: str, capsys: pytest.CaptureFixture[str]):
    assert main(["generate", "hello", *SHORT, "--program", program]) == 0
    assert "warning: program.edits[0]: edit 'push' changed activations by" in capsys.readouterr().err


def test_a_gate_from_the_evidence_of_its_own_vector(pairs: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    made = json_of(capsys, "vectors", "extract", "gating", "--pairs", pairs, "--layers", "0")
    assert made["layers"][0]["positive_tokens"]["tokens"] > 0
    file = tmp_path / "gated.json"
    gate = when("gating", layer=0, above="midpoint")
    file.write_text(Program([add(PUSH, layers=1, strength=1e-3, gate=gate)]).to_json())
    result = json_of(capsys, "generate", "hello", *SHORT, "--program", str(file))
    assert result["receipt"]["edits"][0]["gate_threshold"] == pytest.approx(made["layers"][0]["midpoint"])


def test_generate_lists_logprobs_by_words_when_asked(capsys: pytest.CaptureFixture[str]):
    tokens = json_of(capsys, "generate", "hello", *SHORT, "--logprobs", "2")["tokens"]
    assert main(["generate", "hello", *SHORT, "--logprobs", "2"]) == 0
    table = capsys.readouterr().out
    for token in tokens:
        likeliest = "  ".join(f"{quoted(top['text'])} {top['logprob']:.4f}" for top in token["top_logprobs"])
        assert re.search(
            rf"^{token['position']} +{re.escape(quoted(token['text']))} .*{re.escape(likeliest)}$", table, re.M
        )


def test_a_lens_shows_the_likeliest_tokens_by_layer(capsys: pytest.CaptureFixture[str]):
    seen = json_of(capsys, "lens", "hello", "--top", "2")
    assert main(["lens", "hello", "--top", "2"]) == 0
    header, *rows = capsys.readouterr().out.splitlines()
    assert header.split() == ["layer", "likeliest"]
    assert [row.split()[0] for row in rows] == [str(value["layer"]) for value in seen]
    assert all(quoted(text) in row for row, value in zip(rows, seen, strict=True) for text in value["texts"])


def test_a_lens_shows_what_attention_and_mlps_add_to_tokens(program: str, capsys: pytest.CaptureFixture[str]):
    asked = ["lens", "hello", "--token", "a", "--token", "b", "--layers", "1", "--program", program]
    seen = {value["name"]: value["values"] for value in json_of(capsys, *asked)}
    assert main(asked) == 0
    header, row = capsys.readouterr().out.splitlines()
    assert header.count("MLP adds") == 2
    of_each = zip(seen["state"], seen["attention"], seen["mlp"], strict=True)
    assert row.split() == ["1", *(f"{number:+.3f}" for own in of_each for number in own)]
    plain = {value["name"]: value["values"] for value in json_of(capsys, *asked[:-2])}
    assert plain["state"] != seen["state"]


def test_a_lens_shows_what_neurons_add(capsys: pytest.CaptureFixture[str]):
    asked = ["lens", "hello", "--neurons", "L1N5,L0N3,L1N2", "--token", "a"]
    seen = json_of(capsys, *asked)
    assert [(value["layer"], len(value["values"])) for value in seen] == [(0, 1), (1, 2)]
    assert main(asked) == 0
    shown = [row.split() for row in capsys.readouterr().out.splitlines()[1:]]
    numbers = [f"{number:+.3f}" for value in seen for number in value["values"]]
    assert shown == [[name, '"a"', number] for name, number in zip(("L0N3", "L1N5", "L1N2"), numbers, strict=True)]


def test_a_lens_takes_no_token_that_is_part_of_a_character(capsys: pytest.CaptureFixture[str]):
    assert main(["lens", "hello", "--token", "語"]) == 2
    assert "--token '語'" in capsys.readouterr().err


def test_score_lists_words(capsys: pytest.CaptureFixture[str]):
    assert main(["score", "hello", " you"]) == 0
    rows = capsys.readouterr().out.splitlines()[1:5]
    assert [row.split()[1] for row in rows] == ['"', '"y"', '"o"', '"u"']


def test_tokens_become_text_and_text_becomes_tokens(capsys: pytest.CaptureFixture[str]):
    ids = json_of(capsys, "tokenize", "a é")["ids"]
    assert json_of(capsys, "detokenize", *map(str, ids))["text"] == "a é"
    assert main(["detokenize", *map(str, ids)]) == 0
    assert capsys.readouterr().out == "a é\n"
    assert main(["detokenize", "--pieces", *map(str, ids[:2])]) == 0
    assert capsys.readouterr().out.splitlines()[1].split() == ['"a"', str(ids[0])]
    assert main(["tokenize", "hi", "--chat"]) == 0
    assert "assistant" in capsys.readouterr().out


def test_an_id_that_is_no_token_is_refused_by_its_place(capsys: pytest.CaptureFixture[str]):
    assert main(["detokenize", "1", "99999"]) == 1
    assert "ids[1]: expected a whole number from 0 to" in capsys.readouterr().err


def test_a_refusal_exits_with_1_and_prints_the_field(capsys: pytest.CaptureFixture[str]):
    assert main(["generate", "hello", "--clamp", "L99N3=1"]) == 1
    assert "program.edits[0].layers" in capsys.readouterr().err


def test_a_refusal_is_json_on_request(capsys: pytest.CaptureFixture[str]):
    assert main(["generate", "hello", "--clamp", "L99N3=1", "--json"]) == 1
    error = json.loads(capsys.readouterr().err)["error"]
    assert error["code"] == "INVALID_ARGUMENT"
    assert error["violations"][0]["field"].startswith("program.edits[0].layers")


def test_a_server_that_cannot_be_reached_exits_with_1(capsys: pytest.CaptureFixture[str]):
    assert main(["models", "--address", "127.0.0.1:1"]) == 1
    assert "UNAVAILABLE" in capsys.readouterr().err


def test_score_prints_the_perplexity(program: str, capsys: pytest.CaptureFixture[str]):
    result = json_of(capsys, "score", "hello", " you", "--program", program)
    assert main(["score", "hello", " you", "--program", program]) == 0
    assert f"perplexity {result['perplexity']:.4f}" in capsys.readouterr().out


def test_compare_prints_both_texts_and_the_divergence(program: str, capsys: pytest.CaptureFixture[str]):
    result = json_of(capsys, "compare", "hello", *SHORT, "--program", program)
    assert main(["compare", "hello", *SHORT, "--program", program]) == 0
    printed = capsys.readouterr().out
    assert result["edited"]["text"] in printed
    assert result["baseline"]["text"] in printed
    assert "KL(edited‖baseline)" in printed


def test_vectors_are_extracted_exported_and_put_back(pairs: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    made = json_of(capsys, "vectors", "extract", "good", "--pairs", pairs, "--layers", "1")
    assert [layer["layer"] for layer in made["layers"]] == [1]
    file = tmp_path / "good.gguf"
    assert main(["vectors", "export", "good", "--format", "gguf", "-o", str(file)]) == 0
    assert file.read_bytes()[:4] == b"GGUF"
    back = json_of(capsys, "vectors", "put", str(file), "--name", "good-again")
    assert back["width"] == 32
    steered = json_of(capsys, "generate", "hello", *SHORT, "--steer", "good-again@1:3.0,generated")
    assert steered["receipt"]["touched"]


def test_vectors_are_extracted_from_texts_and_demonstrations(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    files = []
    for label in ("good", "bad"):
        file = tmp_path / f"{label}.txt"
        file.write_text("\n".join(f"{label} {word}" for word in ("day", "dog", "tea", "song")))
        files += ["--texts", str(file)]
    options = ["--method", "linear_discriminant", "--target", "good", "--last", "2", "--layers", "1"]
    made = json_of(capsys, "vectors", "extract", "texts", *files, *options)
    assert made["artifact"]["provenance"]["parameters"]["scope"] == {"include": [{"last_k": 2}]}
    shown = tmp_path / "shown.jsonl"
    shown.write_text("\n".join(json.dumps({"input": letter, "output": letter.upper()}) for letter in "abcdefgh"))
    arguments = ["--demonstrations", str(shown), "--layers", "1"]
    assert main(["vectors", "extract", "task", *arguments, "--method", "task_vector"]) == 0
    printed = capsys.readouterr()
    header = printed.out.splitlines()[0]
    assert "control" in header
    assert not any(column in header for column in ("explained variance", "midpoint", "margin", "tokens of positives"))
    assert "held-out accuracy otherwise: demonstrations" in printed.out
    assert "exchanged" in printed.err
    assert main(["vectors", "extract", "defined", *arguments, "--method", "definition"]) == 1
    assert "definition: required" in capsys.readouterr().err


def test_a_trained_vector_is_printed_with_what_it_is_compared_with(pairs: str, capsys: pytest.CaptureFixture[str]):
    arguments = ["--pairs", pairs, "--method", "reft_r1", "--layers", "1", "--max-steps", "2", "--batch-size", "2"]
    made = json_of(capsys, "vectors", "extract", "trained", *arguments, "--learning-rate", "0.01", "--patience", "3")
    parameters = made["artifact"]["provenance"]["parameters"]
    assert [parameters[name] for name in ("max_steps", "learning_rate", "batch_size", "patience")] == [2, 0.01, 2, 3]
    assert made["layers"][0]["training"]["steps"] == 2
    assert main(["vectors", "extract", "trained", *arguments, "--replace"]) == 0
    printed = capsys.readouterr().out
    assert all(column in printed for column in ("midpoint", "AUROC", "loss unedited", "difference of means"))
    assert "participation ratio" not in printed
    assert main(["vectors", "extract", "not", "--pairs", pairs, "--max-steps", "2"]) == 1
    assert "training: is of methods that are trained" in capsys.readouterr().err


def test_vectors_are_listed_shown_tagged_and_removed(pairs: str, capsys: pytest.CaptureFixture[str]):
    assert main(["vectors", "extract", "one", "--pairs", pairs, "--method", "pca_of_differences"]) == 0
    header = capsys.readouterr().out.splitlines()[0]
    assert all(column in header for column in ("held-out accuracy", "midpoint", "margin", "tokens of positives"))
    assert main(["vectors", "tag", "two", "one"]) == 0
    assert main(["vectors", "list"]) == 0
    assert "one,two" in capsys.readouterr().out
    assert main(["vectors", "tag", "one", "--remove"]) == 0
    assert main(["vectors", "get", "two"]) == 0
    assert "sha256:" in capsys.readouterr().out
    assert main(["vectors", "rm", "two"]) == 0
    assert main(["vectors", "get", "two"]) == 1


def test_models_and_health_describe_the_server(capsys: pytest.CaptureFixture[str]):
    assert json_of(capsys, "models")[0]["d_model"] == 32
    assert main(["models"]) == 0
    assert "mlp_post [64]" in capsys.readouterr().out
    assert json_of(capsys, "health")["status"] == "serving"
    assert main(["health", "no.such.Service"]) == 1

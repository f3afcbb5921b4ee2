"""Requests that become jobs: what the clients and --detach of the commands send."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from canned import Heads, Jobs, Monitoring, Sparsities
from canned_neurons import Neurons

from patchclamp import requests
from patchclamp.cli import main
from patchclamp.heads import CleanCorruptPair
from patchclamp.neurons import TextsTest, welch_t
from patchclamp.patching import PatchPair
from patchclamp.requests import start_job
from patchclamp.results.followed import COLLECTORS
from patchclamp.sparsity import cats
from patchclamp.subspaces import circular_plane
from patchclamp.v1 import job_pb2 as pb

Serve = Callable[..., str]

MADE: dict[str, Any] = {
    "extract_vectors": requests.extract_vectors([("good", "bad")]),
    "calibrate_profile": requests.calibrate_profile(cats(), "words"),
    "evaluate_profile": requests.evaluate_profile([cats()], "words"),
    "detect_retrieval_heads": requests.detect_retrieval_heads(),
    "score_heads": requests.score_heads("induction"),
    "evaluate_head_edit": requests.evaluate_head_edit("mine", "zero"),
    "find_circuit": requests.find_circuit([CleanCorruptPair("a", "b", "c", "d")], "path_patching"),
    "record_reference": requests.record_reference("mine"),
    "decode_neurons": requests.decode_neurons("mine"),
    "find_neurons": requests.find_neurons("dog"),
    "localize_neurons": requests.localize_neurons(welch_t("wiki", "code")),
    "evaluate_neuron_edit": requests.evaluate_neuron_edit("mine", "zero", TextsTest("prose", "words")),
    "census_neurons": requests.census_neurons("wiki"),
    "describe_neurons": requests.describe_neurons("mine", "wiki"),
    "match_neurons": requests.match_neurons("tuned", "wiki"),
    "read_activations": requests.read_activations("wiki", "resid_post", reduction="moments"),
    "patch_activations": requests.patch_activations(PatchPair("a", "b", "c", "d")),
    "find_subspace": requests.find_subspace(circular_plane({"a": ["x"], "b": ["y"], "c": ["z"]})),
    "search_features": requests.search_features("sae", texts="wiki", tokens="x"),
    "calibrate_vector": requests.calibrate_vector("joy", ["hi"]),
    "detect_concept": requests.detect_concept("joy", ["hi"]),
    "train_probe": requests.train_probe({"a": ["x"], "b": ["y"]}),
    "find_concept_circuit": requests.find_concept_circuit([{"a": "x", "b": "y"}], "a"),
}
COMMANDS = [
    ("heads", Heads, ["heads", "detect", "mine", "--lengths", "128"]),
    ("heads", Heads, ["heads", "score", "induction", "mine", "--seed", "3"]),
    ("heads", Heads, ["heads", "ablate", "mine", "--mode", "scale", "--scale", "0.5"]),
    ("heads", Heads, ["heads", "circuit", "mine", "--pairs", "FILE", "--method", "mean_ablation"]),
    ("neurons", Neurons, ["neurons", "decode", "mine", "--tokens", "5"]),
    ("neurons", Neurons, ["neurons", "find", "dog", "--name", "mine", "--top", "3"]),
    ("neurons", Neurons, ["neurons", "localize", "welch_t", "mine", "--texts", "a=FILE", "--target", "a"]),
    ("neurons", Neurons, ["neurons", "evaluate", "mine", "--mode", "scale", "--value", ".5", "--target", "FILE"]),
    ("neurons", Neurons, ["neurons", "census", "mine", "--corpus", "wiki", "--ngram", "3"]),
    ("neurons", Neurons, ["neurons", "describe", "mine", "--corpus", "wiki", "--contexts", "3"]),
    ("neurons", Neurons, ["neurons", "match", "tuned", "--corpus", "wiki", "--name", "mine"]),
    ("sparsity", Sparsities, ["sparsity", "calibrate", "mine", "--policy", "cats", "--text", "FILE"]),
    ("sparsity", Sparsities, ["sparsity", "evaluate", "cats", "--keep", ".5", "--text", "FILE", "--speed"]),
    ("monitoring", Monitoring, ["watch", "reference", "safety", "usual", "--tokens", "9", "--use"]),
]
STORING = [each for each in COMMANDS if not {"ablate", "evaluate", "decode", "describe"} & set(each[2])]


@pytest.fixture
def file(tmp_path: Path) -> str:
    """One line that every kind of file can be."""
    pair = {"positive": "a", "negative": "b", "clean": "a", "corrupt": "b", "clean_answer": "c", "corrupt_answer": "d"}
    pair |= {"prompt": "p", "answer": "a"}
    path = tmp_path / "line.jsonl"
    path.write_text(json.dumps(pair))
    return str(path)


def test_every_job_of_the_contract_can_be_begun_and_followed() -> None:
    asked = [field.name for field in pb.StartJobRequest.DESCRIPTOR.oneofs_by_name["request"].fields]
    answered = [field.name for field in pb.FollowJobResponse.DESCRIPTOR.oneofs_by_name["response"].fields]
    assert list(MADE) == asked
    assert list(COLLECTORS) == answered == asked


@pytest.mark.parametrize("kind", MADE)
def test_a_request_becomes_a_job_by_its_type(kind: str) -> None:
    started = start_job(MADE[kind])
    assert started.WhichOneof("request") == kind
    assert getattr(started, kind) == MADE[kind]


@pytest.mark.parametrize("request_", [requests.generate("hi"), type(MADE["find_circuit"]), "extract_vectors"])
def test_what_can_be_no_job_is_refused_with_what_can(request_: Any) -> None:
    with pytest.raises(TypeError, match=r"request: expected what extract_vectors, .* of patchclamp.requests make, got"):
        start_job(request_)


@pytest.mark.parametrize(("service", "servicer", "command"), COMMANDS)
def test_a_detached_command_asks_for_what_it_would_ask_for_without(
    serve: Serve,
    file: str,
    service: str,
    servicer: Callable[[], Any],
    command: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    direct, jobs = servicer(), Jobs()
    monkeypatch.setenv("PATCHCLAMP_ADDRESS", serve(**{service: direct, "jobs": jobs}))
    arguments = [argument.replace("FILE", file) for argument in command]
    assert main(arguments) == 0
    capsys.readouterr()
    assert main([*arguments, "--detach"]) == 0
    assert capsys.readouterr().out == "job-1\n"
    assert getattr(jobs.request, jobs.request.WhichOneof("request")) == direct.request
    assert main([*arguments, "--detach", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["id"] == "job-1"


@pytest.mark.parametrize(
    "command", [["detect", "mine"], ["score", "induction"], ["circuit", "mine", "--pairs", "FILE"]]
)
def test_a_picture_of_a_result_is_refused_with_detach_in_one_line(
    file: str, command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["heads", *(file if argument == "FILE" else argument for argument in command)]
    assert main([*arguments, "--heatmap", "heads.png", "--detach"]) == 2
    assert capsys.readouterr().err == "error: --heatmap shows the result, which --detach does not wait for\n"


@pytest.mark.parametrize(("service", "servicer", "command"), STORING)
def test_a_command_takes_a_name_that_is_taken_only_when_it_is_told_to(
    serve: Serve,
    file: str,
    service: str,
    servicer: Callable[[], Any],
    command: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    server = servicer()
    monkeypatch.setenv("PATCHCLAMP_ADDRESS", serve(**{service: server}))
    arguments = [argument.replace("FILE", file) for argument in command]
    assert main(arguments) == 0
    assert not server.request.replace_tags
    assert main([*arguments, "--replace"]) == 0
    assert server.request.replace_tags

"""patchclamp vectors subspace against a whole server: what it finds, prints and refuses."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from live import LiveServer
from planted_subspace import DIGITS, LETTERS, MINUS, PLUS, WIDTH, save_planted_subspace

from patchclamp.cli import main
from patchclamp_server.model.load import load_model


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    directory: Path = tmp_path_factory.mktemp("planted")
    save_planted_subspace(directory)
    with LiveServer(load_model(str(directory)), tmp_path_factory.mktemp("artifacts")) as live:
        yield live


@pytest.fixture(autouse=True)
def files(server: LiveServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATCHCLAMP_ADDRESS", server.address)
    monkeypatch.chdir(tmp_path)
    values = [{"value": letter, "prompts": [f"x{digit}"]} for digit, letter in zip(DIGITS, LETTERS, strict=True)]
    Path("digits.jsonl").write_text("\n".join(map(json.dumps, values)))
    pairs = [{"base": base, "source": source, "answer": "+"} for base, source in zip(MINUS, PLUS, strict=True)]
    Path("pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    Path("bad.jsonl").write_text('{"base": "a", "source": "b"}')


def test_a_cycle_is_printed_with_its_angles(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["vectors", "subspace", "digits", "--cycle", "digits.jsonl", "--layers", "0-1"]) == 0
    printed = capsys.readouterr()
    assert "circularity" in printed.out
    assert "angles in degrees" in printed.out
    assert "digits" in printed.err


@pytest.mark.parametrize(
    ("method", "heading"),
    [(["--cycle", "digits.jsonl"], "angles in degrees"), (["--pairs", "pairs.jsonl", "--max-steps", "2"], "kept")],
)
def test_a_detached_search_is_followed_to_what_it_found(
    method: list[str], heading: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["vectors", "subspace", "detached", *method, "--layers", "1", "--replace", "--detach"]) == 0
    job_id = capsys.readouterr().out.strip()
    assert main(["jobs", "follow", job_id]) == 0
    printed = capsys.readouterr()
    assert heading in printed.out
    assert "stored as detached" in printed.err


def test_a_variable_is_trained_and_comes_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--pairs", "pairs.jsonl", "--rank", "2", "--max-steps", "3", "--layers", "1", "--seed", "4"]
    assert main(["vectors", "subspace", "sign", *options, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["artifact"]["tags"] == ["sign"]
    assert found["artifact"]["provenance"]["parameters"]["rank"] == 2
    assert found["layers"][0]["steps"] == 3
    assert found["layers"][0]["full_accuracy"] == 1.0


def test_a_file_of_pytorch_is_stored_as_what_it_holds(capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"weight": torch.eye(WIDTH), "bias": torch.ones(WIDTH)}, "map.pt")
    options = ["--torch", "affine", "--layer", "1", "--site", "resid_pre", "--name", "map"]
    assert main(["vectors", "put", "map.pt", *options, "--json"]) == 0
    stored = json.loads(capsys.readouterr().out)
    assert (stored["kind"], stored["site"], stored["layers"]) == ("affine_map", "resid_pre", [1])
    assert stored["provenance"] == {"method": "imported", "format": "torch"}
    for refused in (["affine"], ["loreft", "--layer", "1"], ["lm_steer", "--layer", "1"]):
        assert main(["vectors", "put", "map.pt", "--torch", *refused]) != 0
        assert f"--torch {refused[0]}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--pairs", "bad.jsonl"], "bad.jsonl:1"),
        (["--cycle", "digits.jsonl", "--rank", "2"], "for --pairs"),
        (["--pairs", "pairs.jsonl", "--components", "3"], "for --cycle"),
        ([], "--cycle"),
    ],
)
def test_options_that_do_not_go_together_are_refused(
    options: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        status: object = main(["vectors", "subspace", "x", *options])
    except SystemExit as end:
        status = end.code
    assert status
    assert told in capsys.readouterr().err

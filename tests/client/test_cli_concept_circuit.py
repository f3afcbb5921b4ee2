"""patchclamp vectors circuit against a whole server: what it finds, prints, draws and refuses."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from live import LiveServer
from planted_circuit import TEXTS, save_planted_circuit

from patchclamp.cli import main
from patchclamp_server.model.load import load_model

OPTIONS = ["--scenarios", "scenarios.jsonl", "--target", "joy", "--layers", "1", "--neurons", "2", "--heads", "2"]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    directory: Path = tmp_path_factory.mktemp("planted")
    save_planted_circuit(directory)
    with LiveServer(load_model(str(directory)), tmp_path_factory.mktemp("artifacts")) as live:
        yield live


@pytest.fixture(autouse=True)
def files(server: LiveServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATCHCLAMP_ADDRESS", server.address)
    monkeypatch.chdir(tmp_path)
    Path("scenarios.jsonl").write_text("\n".join(map(json.dumps, TEXTS)))
    Path("bad.jsonl").write_text('{"joy": 3}')


def test_a_circuit_is_printed_with_what_zeroing_leaves(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    assert main(["vectors", "circuit", "joy", *OPTIONS, "--random-sets", "2", "--picture", "circuit.png"]) == 0
    printed = capsys.readouterr()
    for told in ("held-out separation", "random sets", "both", "writes"):
        assert told in printed.out
    for kind in ("vector", "neurons", "heads"):
        assert f"stored as joy-{kind}" in printed.err
    assert Path("circuit.png").stat().st_size > 1000


def test_it_comes_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--random-sets", "3", "--seed", "4", "--pooling", "mean", "--holdout-fraction", "0.4"]
    assert main(["vectors", "circuit", "glad", *OPTIONS, *options, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["heads"]["tags"] == ["glad-heads"]
    assert found["vector"]["evidence"]["heldout_scenarios"] == 3
    assert found["vector"]["provenance"]["parameters"]["pooling"] == "mean"
    assert len(found["both_zeroed"]["random_separations"]) == 3


def test_a_job_of_it_is_followed_to_what_the_command_would_print(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["vectors", "circuit", "later", *OPTIONS, "--random-sets", "1", "--detach"]) == 0
    job = capsys.readouterr().out.strip()
    assert main(["jobs", "follow", job]) == 0
    assert "held-out separation" in capsys.readouterr().out


@pytest.mark.parametrize("options", [["--scenarios", "bad.jsonl", "--target", "joy"], ["--target", "joy"]])
def test_what_is_no_scenario_is_refused(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["vectors", "circuit", "x", *options])
    assert "--scenarios" in capsys.readouterr().err

"""Tags that move and artifacts that go, from the client and the command line: nothing does so unasked or unsaid."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from live import LiveServer
from numpy import float32, full
from safetensors.numpy import save_file

from patchclamp import Client, PatchclampError
from patchclamp.cli import main
from patchclamp.results import DeletedArtifact
from patchclamp_server.model.load import load_model


@pytest.fixture(scope="module")
def server(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    with LiveServer(load_model(str(tiny_llama_dir)), tmp_path_factory.mktemp("tag_artifacts")) as live:
        yield live


@pytest.fixture
def client(server: LiveServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[Client]:
    """Of an empty store."""
    monkeypatch.setenv("PATCHCLAMP_ADDRESS", server.address)
    with Client(server.address) as client:
        for artifact in client.list_artifacts():
            client.delete_artifact(artifact.id)
        yield client


@pytest.fixture
def vectors(tmp_path: Path) -> list[Path]:
    """Two files of different vectors."""
    files = [tmp_path / f"{number}.safetensors" for number in (1, 2)]
    for number, file in enumerate(files, start=1):
        save_file({"layer.1": full(32, number, float32)}, file)
    return files


def json_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    assert main([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_tag_moves_only_when_asked_and_says_from_where(client: Client, vectors: list[Path]):
    first, second = (client.put_artifact(file) for file in vectors)
    client.tag_artifact("joy", first.id)
    with pytest.raises(PatchclampError, match=f"ALREADY_EXISTS: .*{first.id}"):
        client.tag_artifact("joy", second.id)
    moved = client.tag_artifact("joy", second.id, replace=True)
    assert (moved.tags, moved.replaced_tags) == (("joy",), {"joy": first.id})
    assert client.get_artifact("joy").replaced_tags == {}


def test_what_is_stored_takes_a_tag_only_when_asked(client: Client, vectors: list[Path]):
    first = client.put_artifact(vectors[0], tags=["joy"])
    with pytest.raises(PatchclampError, match="ALREADY_EXISTS"):
        client.put_artifact(vectors[1], tags=["joy"])
    assert client.put_artifact(vectors[1], tags=["joy"], replace_tags=True).replaced_tags == {"joy": first.id}


def test_deleting_says_what_went(client: Client, vectors: list[Path]):
    stored = client.put_artifact(vectors[0], tags=["joy", "joy_old"])
    with pytest.raises(PatchclampError, match=stored.id):
        client.delete_artifact("joy")
    assert client.delete_artifact(stored.id) == DeletedArtifact(stored.id, ("joy", "joy_old"))


def test_the_command_line_refuses_a_taken_name_and_says_how_to_take_it(
    client: Client, vectors: list[Path], capsys: pytest.CaptureFixture[str]
):
    first = client.put_artifact(vectors[0], tags=["joy"])
    put = ["vectors", "put", str(vectors[1]), "--name", "joy"]
    assert main(put) == 1
    said = capsys.readouterr().err
    assert first.id in said
    assert said.endswith("\n  --replace takes the name\n")
    assert main([*put, "--replace"]) == 0
    assert f"moved joy from {first.id} (still stored)\n" in capsys.readouterr().err
    assert main(["vectors", "tag", "joy", first.id]) == 1
    assert json_of(capsys, "vectors", "tag", "joy", first.id, "--replace")["tags"] == ["joy"]


def test_rm_prints_the_id_and_all_tags_that_went(
    client: Client, vectors: list[Path], capsys: pytest.CaptureFixture[str]
):
    first = client.put_artifact(vectors[0], tags=["joy", "joy_old"])
    second = client.put_artifact(vectors[1], tags=["fear"])
    # What went before a refusal is said too.
    assert main(["vectors", "rm", "fear", "joy"]) == 1
    assert capsys.readouterr().err == (
        f"deleted {second.id} (fear)\n"
        f"error: FAILED_PRECONDITION: ref: 'joy' is also tagged 'joy_old': "
        f"remove a tag, or delete all of it as {first.id}\n"
    )
    gone = json_of(capsys, "vectors", "rm", first.id)
    assert gone == {"deleted": [{"id": first.id, "tags": ["joy", "joy_old"]}]}


def test_a_watch_takes_a_name_that_is_taken_only_when_it_is_told_to(client: Client, capsys: pytest.CaptureFixture[str]):
    assert main(["watch", "create", "safety", "--neurons", "L0N1"]) == 0
    create = ["watch", "create", "safety", "--neurons", "L0N2"]
    assert main(create) == 1
    assert "--replace takes the name" in capsys.readouterr().err
    assert main([*create, "--replace"]) == 0
    assert "moved safety from sha256:" in capsys.readouterr().err

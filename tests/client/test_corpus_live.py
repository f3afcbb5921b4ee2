"""Corpora from the client and the command line, against a whole server of a tiny random llama."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from live import LiveServer

from patchclamp import Client, PatchclampError
from patchclamp.cli import main
from patchclamp_server.model.load import load_model

LINES = '{"text": "a dog", "label": "en"}\n{"text": "ein Hund", "label": "de"}\n{"text": "?"}\n'


@pytest.fixture(scope="module")
def server(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    with LiveServer(load_model(str(tiny_llama_dir)), tmp_path_factory.mktemp("corpora")) as live:
        yield live


def test_a_file_of_json_lines_is_stored_as_a_corpus_and_exported_again(
    server: LiveServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATCHCLAMP_ADDRESS", server.address)
    monkeypatch.chdir(tmp_path)
    Path("mine.jsonl").write_text(LINES)
    assert main(["vectors", "put", "mine.jsonl", "--name", "mine", "--json"]) == 0
    stored = json.loads(capsys.readouterr().out)
    assert (stored["kind"], stored["model_fingerprint"]) == ("corpus", "")
    assert stored["provenance"]["labels"] == ["en", "de"]
    assert main(["vectors", "export", "mine", "-o", "back.jsonl"]) == 0
    assert Path("back.jsonl").read_text() == LINES
    assert main(["vectors", "list", "--kind", "corpus", "--json"]) == 0
    assert "mine" in capsys.readouterr().out


def test_a_bad_line_is_refused_with_its_number(server: LiveServer) -> None:
    with Client(server.address) as client, pytest.raises(PatchclampError, match="line 2: unknown key 'lable'"):
        client.put_artifact(b'{"text": "a"}\n{"text": "b", "lable": "x"}', kind="corpus", format="text_json_lines")

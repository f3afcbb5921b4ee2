"""The examples of docs/user/file-formats.md make files that a server of the embedded model takes."""

import re
from pathlib import Path

import pytest
from live import LiveServer

from patchclamp import Client

GUIDE = Path(__file__).parents[2] / "docs" / "user" / "file-formats.md"
TAGS = {
    "mine": "vector",
    "mine_gguf": "vector",
    "suspects": "neuron_set",
    "listed": "neuron_set",
    "heads": "head_set",
    "heads_json": "head_set",
    "renamed": "vector",
    "of_torch": "vector",
    "duo": "head_set",
    "qr": "head_set",
    "my_set": "sparsity_profile",
    "by_hand": "watch",
    "by_hand_usual": "watch_reference",
    "corpus": "corpus",
    "corpus_by_hand": "corpus",
    "sae_by_hand": "autoencoder",
    "names_by_hand": "feature_labels",
}


def test_every_example_of_the_guide_is_stored_as_its_kind(
    embedded_server: LiveServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    examples = "\n".join(re.findall(r"```python\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL))
    exec(examples.replace("localhost:50051", embedded_server.address), {})
    with Client(embedded_server.address) as client:
        assert {tag: client.get_artifact(tag).kind for tag in TAGS} == TAGS

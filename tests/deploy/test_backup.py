"""The backup of deploy/README.md, taken while artifacts are stored: tags and watches in it have their objects."""

import re
import subprocess
import threading
from pathlib import Path

import torch
from deployed import DEPLOY

from patchclamp_server.artifacts.store import ArtifactStore
from patchclamp_server.artifacts.types import ArtifactKind, Tags
from patchclamp_server.model.sites import Site

COPIED = re.compile(r"-C /var/lib/patchclamp/artifacts -cf - (.+) > artifacts\.tar")


def put(store: ArtifactStore, number: int) -> None:
    tensors = {"layer.0": torch.full((4,), float(number))}
    store.put(
        ArtifactKind.VECTOR,
        tensors,
        model_fingerprint="f" * 64,
        site=Site.RESID_POST,
        tags=Tags((f"vector-{number}", "last"), replace=True),
    )


def test_every_tag_of_a_backup_of_a_running_store_has_its_object(tmp_path: Path):
    source, target = tmp_path / "artifacts", tmp_path / "restored"
    store = ArtifactStore(source)
    for number in range(50):
        put(store, number)
    store.records("watches/model").create("safety", {"watch": store.resolve("last")})
    ended = threading.Event()

    def write() -> None:
        number = 50
        while not ended.is_set():
            put(store, number)
            number += 1

    writer = threading.Thread(target=write)
    writer.start()
    with_compose, with_kubectl = COPIED.findall((DEPLOY / "README.md").read_text())
    # Objects never change: one that is missing when tags are copied is never tagged by them.
    assert with_compose == with_kubectl
    assert with_compose.endswith(" . objects")
    backup = subprocess.run(
        ["tar", "-C", source, "-cf", "-", *with_compose.split()], stdout=subprocess.PIPE, check=False
    )
    ended.set()
    writer.join()
    # 1: a file changed while it was read, which objects do not and a tag does by being replaced.
    assert backup.returncode in (0, 1)
    target.mkdir()
    subprocess.run(["tar", "-C", target, "-xf", "-"], input=backup.stdout, check=True)
    # What was being written is no part of it.
    assert not (target / "tmp").exists()
    restored = ArtifactStore(target)
    tags = sorted(path.name for path in (target / "tags").iterdir())
    assert "last" in tags
    restored.get(restored.records("watches/model").read()["safety"]["watch"])
    for tag in tags:
        restored.get(tag)

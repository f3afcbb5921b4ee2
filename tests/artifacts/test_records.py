"""Records of a store: read as they are now, and created by one of several that try at once."""

import os
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from patchclamp_server.artifacts.records import Records
from patchclamp_server.artifacts.store import ArtifactStore


def url_of(kind: str, directory: Path) -> str:
    return str(directory) if kind == "local" else f"memory://{uuid.uuid4().hex}"


@pytest.mark.parametrize("kind", ["local", "memory"])
def test_a_record_is_there_for_every_store_of_the_place_until_it_is_removed(kind: str, tmp_path: Path) -> None:
    url = url_of(kind, tmp_path)
    one, other = (ArtifactStore(url).records("watches/m") for _ in range(2))
    assert one.read() == {}
    assert one.create("a", {"n": 1})
    assert not other.create("a", {"n": 2})
    assert other.read() == {"a": {"n": 1}}
    other.write("a", {"n": 3})
    assert one.read() == {"a": {"n": 3}}
    one.remove("a")
    one.remove("a")
    assert other.read() == {}


@pytest.mark.parametrize("kind", ["local", "memory"])
def test_of_many_that_create_one_name_at_once_one_does(kind: str, tmp_path: Path) -> None:
    url = url_of(kind, tmp_path)
    records: list[Records] = [ArtifactStore(url).records("watches/m") for _ in range(8)]
    with ThreadPoolExecutor(8) as pool:
        for name in "abcdefgh":
            created = list(pool.map(lambda pair: pair[1].create(name, {"by": pair[0]}), enumerate(records)))  # noqa: B023
            assert sum(created) == 1
            assert records[0].read()[name] == {"by": created.index(True)}


def test_a_place_without_hard_links_still_refuses_what_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_links(source: str, target: str) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    records = ArtifactStore(tmp_path).records("watches/m")
    assert records.create("a", {"n": 1})
    assert not records.create("a", {"n": 2})
    assert records.read() == {"a": {"n": 1}}
    assert not list((tmp_path / "tmp").iterdir())


def test_records_are_no_artifacts_and_what_is_no_json_is_none(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    store.records("watches/m").create("a", {"n": 1})
    (tmp_path / "watches" / "m" / "b").write_bytes(b"\xff{")
    assert store.records("watches/m").read() == {"a": {"n": 1}, "b": None}
    assert store.list() == ([], "")

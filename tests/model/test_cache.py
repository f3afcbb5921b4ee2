import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from patchclamp_server.model.cache import MANIFEST, cached_model, is_sound
from patchclamp_server.model.progress import Silent


def write_one_file(directory: Path) -> None:
    (directory / "weights").write_bytes(b"0123456789")


def test_an_entry_is_built_once(own_cache: Path) -> None:
    built = []

    def build(directory: Path) -> None:
        built.append(directory)
        write_one_file(directory)

    first = cached_model("key", build, Silent())
    second = cached_model("key", build, Silent())
    assert first == second == own_cache / "models" / "key"
    assert len(built) == 1
    assert (first / "weights").read_bytes() == b"0123456789"


def test_a_build_that_raises_leaves_nothing_behind(own_cache: Path) -> None:
    def build(directory: Path) -> None:
        write_one_file(directory)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cached_model("key", build, Silent())
    assert [path.name for path in (own_cache / "models").iterdir()] == [".key.lock"]


@pytest.mark.parametrize("damaged", [b"012345678X", b"01234", b""])
def test_a_changed_or_cut_file_makes_the_entry_be_built_again(own_cache: Path, damaged: bytes) -> None:
    entry = cached_model("key", write_one_file, Silent())
    (entry / "weights").write_bytes(damaged)
    assert not is_sound(entry)
    assert cached_model("key", write_one_file, Silent()) == entry
    assert (entry / "weights").read_bytes() == b"0123456789"


@pytest.mark.parametrize("manifest", [None, "", "[]", '{"files": {}}', '{"files": {"weights": 3}}'])
def test_an_entry_without_a_whole_manifest_is_not_sound(own_cache: Path, manifest: str | None) -> None:
    entry = cached_model("key", write_one_file, Silent())
    if manifest is None:
        (entry / MANIFEST).unlink()
    else:
        (entry / MANIFEST).write_text(manifest)
    assert not is_sound(entry)


def test_what_a_killed_builder_left_is_removed(own_cache: Path) -> None:
    leftover = own_cache / "models" / ".key.1234.partial"
    leftover.mkdir(parents=True)
    write_one_file(leftover)
    cached_model("key", write_one_file, Silent())
    assert not leftover.exists()


def test_several_at_once_build_one_entry(own_cache: Path) -> None:
    together = threading.Barrier(4)
    built = []

    def build(directory: Path) -> None:
        built.append(directory)
        write_one_file(directory)

    def ask() -> Path:
        together.wait()
        return cached_model("key", build, Silent())

    with ThreadPoolExecutor(4) as pool:
        entries = {future.result() for future in [pool.submit(ask) for _ in range(4)]}
    assert len(entries) == 1
    assert len(built) == 1

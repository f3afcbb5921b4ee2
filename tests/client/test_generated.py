"""The synchronous client is generated from the asynchronous one, and nobody forgets to."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = "clients/python/generate_sync.py"
MODULES = {
    "aio.py": "client.py",
    "async_streams.py": "streams.py",
    "async_stubs.py": "stubs.py",
    "async_transport.py": "transport.py",
}


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the client's source and what generates from it."""
    shutil.copytree(ROOT / "clients/python", tmp_path / "clients/python", ignore=shutil.ignore_patterns("v1"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def run(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, root / SCRIPT, *arguments], capture_output=True, text=True)


def test_the_synchronous_client_is_what_the_asynchronous_one_generates() -> None:
    checked = run(ROOT, "--check")
    assert (checked.returncode, checked.stderr) == (0, "")


def test_a_change_of_one_client_alone_is_found_and_says_what_to_run(copy: Path) -> None:
    source = copy / "clients/python/patchclamp/aio.py"
    source.write_text(source.read_text().replace("Removes a tag; the artifact stays.", "Removes a tag."))
    checked = run(copy, "--check")
    assert checked.returncode == 1
    assert checked.stderr == "clients/python/patchclamp/client.py is not what aio.py generates: run make generated\n"


def test_what_is_generated_again_is_no_longer_found(copy: Path) -> None:
    target = copy / "clients/python/patchclamp/streams.py"
    target.unlink()
    assert run(copy).returncode == 0
    assert target.read_text() == (ROOT / "clients/python/patchclamp/streams.py").read_text()
    assert run(copy, "--check").returncode == 0


def test_a_phrase_that_the_source_no_longer_has_is_refused(copy: Path) -> None:
    source = copy / "clients/python/patchclamp/async_transport.py"
    source.write_text(source.read_text().replace("It is the base of AsyncClient.", "It is a base."))
    refused = run(copy)
    assert refused.returncode == 1
    assert "async_transport.py has no longer the words" in refused.stderr


@pytest.mark.parametrize("module", MODULES)
def test_every_generated_module_names_its_source_in_the_first_line(module: str) -> None:
    first = (ROOT / "clients/python/patchclamp" / MODULES[module]).read_text().partition("\n")[0]
    assert first == f"# Generated from {module} by {SCRIPT}; change {module}."


@pytest.mark.parametrize("module", MODULES.values())
def test_nothing_of_an_event_loop_is_left_in_a_generated_module(module: str) -> None:
    text = (ROOT / "clients/python/patchclamp" / module).read_text()
    code = text.partition("\n")[2].replace("asynchronous one, without `await`", "")
    assert [word for word in ("Async", "async", "await", "aio", "event loop") if word in code] == []

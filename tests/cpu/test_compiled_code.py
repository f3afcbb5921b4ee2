"""What numba compiled is found again while nothing that takes part has changed, and never after."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

import patchclamp_server
from patchclamp_server.cpu.compiled_code import keep_compiled_code, sources

PACKAGE = Path(patchclamp_server.__file__).parent
# It defines nothing that is compiled by itself, and compiled functions take its numbers.
CALLEE = "model/compiled/job.py"


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return Path(
        shutil.copytree(PACKAGE, tmp_path / "server" / PACKAGE.name, ignore=shutil.ignore_patterns("__pycache__"))
    )


def directory_of(copy: Path, cache: Path) -> Path:
    """Returns where a process that imports this copy keeps compiled code."""
    program = (
        "import os; from patchclamp_server.cpu.compiled_code import keep_compiled_code; keep_compiled_code();"
        "print(os.environ['NUMBA_CACHE_DIR'])"
    )
    environment = {name: value for name, value in os.environ.items() if name != "NUMBA_CACHE_DIR"}
    environment |= {"PYTHONPATH": str(copy.parent), "PATCHCLAMP_CACHE": str(cache)}
    output = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    return Path(output.stdout.strip())


def test_modules_that_are_compiled_and_what_they_take_are_counted() -> None:
    names = {path.relative_to(PACKAGE).as_posix() for path in sources()}
    assert {"cpu/products.py", "cpu/formats/blocks.py", "model/compiled/stages.py", CALLEE} <= names
    assert "rpc/server.py" not in names


def test_a_changed_callee_gets_a_directory_of_its_own_and_another_module_does_not(copy: Path, tmp_path: Path) -> None:
    before = directory_of(copy, tmp_path / "cache")
    with (copy / "errors.py").open("a") as file:
        file.write("\n# Not compiled.\n")
    assert directory_of(copy, tmp_path / "cache") == before
    with (copy / CALLEE).open("a") as file:
        file.write("\n# Compiled into others.\n")
    after = directory_of(copy, tmp_path / "cache")
    assert after != before
    assert before.parent == after.parent == tmp_path / "cache" / "numba"


def test_code_that_nobody_asked_for_in_a_month_is_removed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATCHCLAMP_CACHE", str(tmp_path))
    old, recent = tmp_path / "numba" / "old", tmp_path / "numba" / "recent"
    for directory, days in ((old, 31), (recent, 29)):
        directory.mkdir(parents=True)
        then = time.time() - days * 24 * 3600
        os.utime(directory, (then, then))
    monkeypatch.delenv("NUMBA_CACHE_DIR", raising=False)
    keep_compiled_code()
    assert not old.exists()
    assert recent.exists()


def test_a_directory_that_the_operator_names_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NUMBA_CACHE_DIR", "elsewhere")
    keep_compiled_code()
    assert os.environ["NUMBA_CACHE_DIR"] == "elsewhere"


def test_whoever_waits_for_the_first_start_is_told_that_it_compiles(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATCHCLAMP_CACHE", str(tmp_path))
    told = []
    for _ in range(2):
        monkeypatch.delenv("NUMBA_CACHE_DIR", raising=False)
        told.append(keep_compiled_code())
    assert told[0].startswith("the first start compiles, which takes a minute or more; later ones find it in ")
    assert told[1] == ""


def test_whoever_starts_where_nothing_can_be_kept_is_told_each_time(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "numba").write_text("in the way of the directory")
    monkeypatch.setenv("PATCHCLAMP_CACHE", str(tmp_path))
    for _ in range(2):
        monkeypatch.delenv("NUMBA_CACHE_DIR", raising=False)
        assert keep_compiled_code().startswith(f"{tmp_path / 'numba'} cannot be written: every start compiles anew")

"""What numba compiled is found again while nothing that takes part has changed, and never after."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from patience import PATIENCE_SECONDS

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
        said = keep_compiled_code()
        assert said.startswith("every start compiles anew, which takes a minute or more: ")
        assert str(tmp_path / "numba") in said


# It compiles a function whose closure says what it returns, and waits for a line before it does what it is told of.
FUNCTION = """
import sys
from patchclamp_server.cpu.compiled_code import keep_compiled_code
keep_compiled_code()
import numba
from numba.core.caching import IndexDataCacheFile
def wait_before(name):
    method = getattr(IndexDataCacheFile, name)
    def waiting(*arguments):
        print(name, flush=True)
        sys.stdin.readline()
        return method(*arguments)
    setattr(IndexDataCacheFile, name, waiting)
def adder_of(own):
    @numba.cfunc(numba.int64(numba.int64), cache=True)
    def added(x):
        return x + own
    return added
for name in sys.argv[2:]:
    wait_before(name)
print(adder_of(int(sys.argv[1])).ctypes(0), flush=True)
"""


class Compiling:
    """A process that compiles the function of a number, and stops before it does what `stops` name."""

    def __init__(self, program: Path, cache: Path, own: int, *stops: str) -> None:
        program.write_text(FUNCTION)
        self._process = subprocess.Popen(
            [sys.executable, str(program), str(own), *stops],
            env=os.environ | {"NUMBA_CACHE_DIR": str(cache)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def goes_on_to(self, stop: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        self.stops_at(stop)

    def stops_at(self, stop: str) -> None:
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == f"{stop}\n"

    def result(self) -> str:
        return self._process.communicate("\n", timeout=PATIENCE_SECONDS)[0].split()[-1]


def test_two_processes_that_compile_at_once_do_not_get_the_code_of_each_other(tmp_path: Path) -> None:
    program, cache = tmp_path / "program.py", tmp_path / "code"
    one, other = (Compiling(program, cache, own, "_save_index", "_save_data") for own in (1, 2))
    for process in (one, other):
        # Both have read that there is no code yet.
        process.stops_at("_save_index")
    for process in (one, other):
        process.goes_on_to("_save_data")
    assert [process.result() for process in (other, one)] == ["2", "1"]
    assert [Compiling(program, cache, own).result() for own in (2, 1)] == ["2", "1"]


@pytest.mark.parametrize(("kind", "kept"), [("nbi", 0), ("nbc", 20)])
def test_code_of_which_a_crash_left_a_part_is_compiled_again(kind: str, kept: int, tmp_path: Path) -> None:
    program, cache = tmp_path / "program.py", tmp_path / "code"
    assert Compiling(program, cache, 5).result() == "5"
    (file,) = cache.rglob(f"*.{kind}")
    file.write_bytes(file.read_bytes()[:kept])
    assert Compiling(program, cache, 5).result() == "5"


def test_a_full_disk_keeps_nothing_and_stops_nothing(tmp_path: Path) -> None:
    program, cache = tmp_path / "program.py", tmp_path / "code"
    program.write_text("import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))\n" + FUNCTION)
    process = subprocess.run(
        [sys.executable, str(program), "7"],
        env=os.environ | {"NUMBA_CACHE_DIR": str(cache), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.stdout.split() == ["7"], process.stderr
    assert "compiled code cannot be kept, and is compiled at every start" in process.stderr

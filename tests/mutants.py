"""Plants one defect after another in a copy of the server and sees whether the tests named for it go red.

    python tests/mutants.py [--only NAME …] [--list]

The defects are in planted/. Exits with 1 when one survives, when its old text is not there exactly once, or when its
tests do not run or are red without it. NAME is a defect, or the beginning of a module's dotted name. Each is planted in
a process that begins where libraries have been imported, so that it costs little more than its tests.
"""

import argparse
import contextlib
import importlib
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# `mutate` plants in the kernels, and says what can come of it.
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "kernels")]

from mutate import Verdict  # noqa: E402
from planted import MUTANTS, Mutant  # noqa: E402

# Of all tests of a defect, and of one of them: what hangs sees the defect. Where nothing has been compiled yet,
# numba takes its time on a busy machine.
TIMEOUT_SECONDS = 1800
TEST_SECONDS, COMPILING_SECONDS = 60, 300
COPIED = ("server", "clients", "kernels", "tests", "benchmarks", "docs", "proto", "README.md", "pyproject.toml")
# What takes long to import, and none of it ours.
LIBRARIES = (
    "torch",
    "triton",
    "numba",
    "sklearn.cluster",
    "sklearn.linear_model",
    "transformers.modeling_utils",
    "transformers.models.llama.modeling_llama",
    "grpc_status.rpc_status",
    "google.protobuf.json_format",
    "safetensors.torch",
    "hypothesis",
    "pytest",
)
ENVIRONMENT = {
    "PYTHONDONTWRITEBYTECODE": "1",
    "TRITON_INTERPRET": "1",
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "passive",
    "PATIENCE_SECONDS": "30",
    "HYPOTHESIS_STORAGE_DIRECTORY": tempfile.gettempdir(),
}


def source(mutant: Mutant, root: Path = ROOT) -> Path:
    """The file of its module, whether that is a package or not."""
    path = root / "server" / Path(*mutant.module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def occurrences(mutant: Mutant, root: Path = ROOT) -> int:
    file = source(mutant, root)
    return file.read_text().count(mutant.old) if file.is_file() else 0


def copied(directory: Path) -> Path:
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, directory / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy2(ROOT / name, directory / name)
    return directory


@contextlib.contextmanager
def planted(mutant: Mutant, copy: Path) -> Iterator[None]:
    file = source(mutant, copy)
    text = file.read_text()
    file.write_text(text.replace(mutant.old, mutant.new))
    try:
        yield
    finally:
        file.write_text(text)


def verdict_of(copy: Path, tests: Sequence[str], log: Path, compiled: Path) -> Verdict:
    """`compiled`: where numba keeps what it has compiled."""
    process = multiprocessing.get_context("fork").Process(target=_run_tests, args=(copy, tests, log, compiled))
    process.start()
    process.join(TIMEOUT_SECONDS)
    if process.exitcode is None:
        process.kill()
        process.join()
        return Verdict.HANGS
    if process.exitcode < 0:
        return Verdict.CRASHED
    # 2 to 5: interrupted, usage, nothing collected, …
    return {0: Verdict.SURVIVED, 1: Verdict.CAUGHT}.get(process.exitcode, Verdict.BROKEN)


def _run_tests(copy: Path, tests: Sequence[str], log: Path, compiled: Path) -> None:
    import pytest

    with log.open("w") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    packages = [str(copy / name) for name in ("server", "clients/python", "kernels")]
    os.environ["PYTHONPATH"] = os.pathsep.join(packages)
    os.environ["NUMBA_CACHE_DIR"] = str(compiled)
    sys.path[:] = [*packages, *(path for path in sys.path if not path.startswith(str(ROOT)))]
    for name in ("mutate", "mutations", *(name for name in sys.modules if name.partition(".")[0] == "planted")):
        sys.modules.pop(name, None)
    os.chdir(copy)
    seconds = TEST_SECONDS if compiled.is_dir() and any(compiled.iterdir()) else COMPILING_SECONDS
    options = ["-x", "-q", "-p", "no:cacheprovider", "-o", f"timeout={seconds}", "--hypothesis-profile", "unshrunk"]
    status = pytest.main([*options, *(f"tests/{test}" for test in tests)])
    sys.stdout.flush()
    os._exit(int(status))


def verdict(mutant: Mutant, copy: Path, log: Path, compiled: Path) -> Verdict:
    """Of one that is planted in the copy for as long."""
    if occurrences(mutant, copy) != 1:
        return Verdict.STALE
    with planted(mutant, copy):
        if "numba" not in source(mutant, copy).read_text():
            return verdict_of(copy, mutant.tests, log, compiled)
        # What calls a compiled function was compiled with it: numba does not see that the function has changed.
        with tempfile.TemporaryDirectory() as fresh:
            return verdict_of(copy, mutant.tests, log, Path(fresh))


def run(mutants: Iterable[Mutant]) -> bool:
    """Prints a line a mutant. False if anything is not as it should be."""
    os.environ.update(ENVIRONMENT)
    for library in LIBRARIES:
        importlib.import_module(library)
    mutants, good = list(mutants), True
    with tempfile.TemporaryDirectory() as directory:
        copy, log, compiled = copied(Path(directory) / "copy"), Path(directory) / "log", Path(directory) / "compiled"
        tests = sorted({test for mutant in mutants for test in mutant.tests})
        start = time.monotonic()
        if verdict_of(copy, tests, log, compiled) is not Verdict.SURVIVED:
            print(f"the tests are red without a defect:\n{log.read_text()[-4000:]}", flush=True)
            return False
        print(f"{len(tests)} tests are green without a defect: {time.monotonic() - start:.0f} s", flush=True)
        for mutant in mutants:
            start, found = time.monotonic(), verdict(mutant, copy, log, compiled)
            seconds = time.monotonic() - start
            print(f"{found.value:<10} {seconds:4.0f} s  {mutant.name:<36} {mutant.why}", flush=True)
            if not found.caught:
                good = False
                print(f"    {mutant.module}: {' '.join(mutant.tests)}", flush=True)
                if found is Verdict.BROKEN:
                    print(log.read_text()[-2000:], flush=True)
    return good


def main() -> int:
    parser = argparse.ArgumentParser(description="Plants defects in a copy of the server.")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="of defects, or how modules' names begin")
    parser.add_argument("--list", action="store_true", help="only say what would be planted")
    arguments = parser.parse_args()
    names = tuple(arguments.only)
    wanted = [m for m in MUTANTS if not names or m.name in names or f"{m.module}.".startswith(names)]
    if not wanted:
        parser.error("no defect has that name or is in that module")
    if arguments.list:
        for mutant in wanted:
            print(f"{mutant.name:<36} {mutant.module}: {mutant.why}")
        return 0
    start = time.monotonic()
    good = run(wanted)
    print(f"{len(wanted)} defects in {time.monotonic() - start:.0f} s: {'all caught' if good else 'NOT all caught'}")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())

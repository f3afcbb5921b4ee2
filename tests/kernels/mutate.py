"""Plants one bug after another in a copy of the kernels and sees whether the tests named for it go red.

    python tests/kernels/mutate.py [NAME …] [--jobs N]

The bugs are in mutations.py. Exits with 1 if one survives, if its old text is not there exactly once, or if its tests
do not run or are red without it.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from enum import Enum
from pathlib import Path

from mutations import MUTATIONS, Mutation

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_SECONDS = 300

# The copy's own: without it pytest could find the repository's, and tests would run on kernels that have no bug.
_INI = "[pytest]\npythonpath = tests/kernels\naddopts = -q -x --import-mode=importlib -p no:cacheprovider\n"
_CONFTEST = """\
from pathlib import Path
import patchclamp_kernels
assert Path(__file__).resolve().parents[2] in Path(patchclamp_kernels.__file__).resolve().parents
"""


class Verdict(Enum):
    CAUGHT = "caught"
    CRASHED = "caught: the tests crash"
    HANGS = "caught: the tests hang"
    SURVIVED = "SURVIVED"
    STALE = "STALE: the old text is not there exactly once"
    BROKEN = "BROKEN: the tests do not run"

    @property
    def caught(self) -> bool:
        return self in (Verdict.CAUGHT, Verdict.CRASHED, Verdict.HANGS)


def occurrences(mutation: Mutation, root: Path = ROOT) -> int:
    file = root / "kernels" / "patchclamp_kernels" / mutation.file
    return file.read_text().count(mutation.old) if file.is_file() else 0


def plant(mutation: Mutation) -> Verdict:
    """Runs the mutation's tests against a copy that has the bug."""
    if occurrences(mutation) != 1:
        return Verdict.STALE
    with tempfile.TemporaryDirectory() as directory:
        copy = copied(Path(directory))
        file = copy / "kernels" / "patchclamp_kernels" / mutation.file
        file.write_text(file.read_text().replace(mutation.old, mutation.new))
        return run_tests(copy, mutation.tests)


def without_bug(tests: Sequence[str]) -> Verdict:
    """Survived, if the tests are worth anything: they are green on a copy that nobody touched."""
    with tempfile.TemporaryDirectory() as directory:
        return run_tests(copied(Path(directory)), tests)


def copied(directory: Path) -> Path:
    for part in ("kernels", "tests/kernels"):
        shutil.copytree(ROOT / part, directory / part, ignore=shutil.ignore_patterns("__pycache__"))
    (directory / "pytest.ini").write_text(_INI)
    (directory / "tests" / "kernels" / "conftest.py").write_text(_CONFTEST)
    return directory


def run_tests(copy: Path, tests: Sequence[str]) -> Verdict:
    environment = {
        **os.environ,
        "PYTHONPATH": str(copy / "kernels"),
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        "TRITON_INTERPRET": "1",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "pytest", "-c", str(copy / "pytest.ini")]
    command += [str(copy / "tests" / "kernels" / test) for test in tests]
    try:
        done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, timeout=TIMEOUT_SECONDS)
    except subprocess.TimeoutExpired:
        return Verdict.HANGS
    if done.returncode < 0:
        return Verdict.CRASHED
    # 2 to 5: interrupted, usage, nothing collected, …
    return {0: Verdict.SURVIVED, 1: Verdict.CAUGHT}.get(done.returncode, Verdict.BROKEN)


def run(mutations: Iterable[Mutation], jobs: int) -> bool:
    """Prints a line a mutation. False if anything is not as it should be."""
    mutations = list(mutations)
    selections = sorted({mutation.tests for mutation in mutations})
    good = True
    with ThreadPoolExecutor(jobs) as pool:
        for tests, verdict in zip(selections, pool.map(without_bug, selections), strict=True):
            if verdict is not Verdict.SURVIVED:
                print(f"without a bug: {verdict.value}: {' '.join(tests)}", flush=True)
                good = False
        for mutation, (verdict, seconds) in zip(mutations, pool.map(_timed, mutations), strict=True):
            print(f"{verdict.value:<10} {seconds:4.0f} s  {mutation.name:<36} {mutation.why}", flush=True)
            good = good and verdict.caught
    return good


def _timed(mutation: Mutation) -> tuple[Verdict, float]:
    start = time.monotonic()
    return plant(mutation), time.monotonic() - start


def main() -> int:
    parser = argparse.ArgumentParser(description="Plants bugs in a copy of the kernels.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="of mutations, or of files in the package")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    wanted = [m for m in MUTATIONS if not arguments.names or {m.name, m.file} & set(arguments.names)]
    if not wanted:
        parser.error("no mutation has that name or is in that file")
    good = run(wanted, arguments.jobs)
    print(f"{len(wanted)} mutations: {'all caught' if good else 'NOT all caught'}")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())

"""The kernels are of use without the server: torch and Triton are all they import."""

import os
import subprocess
import sys

import pytest

BLOCKED = ("grpc", "google", "transformers", "numba", "patchclamp", "patchclamp_server")

BLOCKER = f"""
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {BLOCKED!r}:
            raise ImportError(f"{{name}} is blocked")
sys.meta_path.insert(0, Blocker())
"""


def run(code: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    return subprocess.run([sys.executable, "-c", BLOCKER + code], env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("name", BLOCKED)
def test_the_blocker_blocks(name: str) -> None:
    done = run(f"import {name}")
    assert "is blocked" in done.stderr


def test_the_package_and_every_op_import_without_the_server() -> None:
    done = run(
        "import patchclamp_kernels\nfrom patchclamp_kernels import ops\nfor name in ops.OPS: ops.op_module(name)"
    )
    assert done.returncode == 0, done.stderr


def test_an_op_is_imported_by_its_name() -> None:
    done = run("from patchclamp_kernels import paged_attention\nassert callable(paged_attention)")
    assert done.returncode == 0, done.stderr

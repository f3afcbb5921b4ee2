"""How many threads a step has, and where they stay: set once for a process, before torch is imported."""

import json
import os
import subprocess
import sys

import pytest

PROGRAM = """
import json, os, sys, threading
from patchclamp_server.cpu.compiled_code import keep_compiled_code
from patchclamp_server.threads import configure_threads, pin
threads, pinned = json.loads(sys.argv[1])
configure_threads(threads, pinned=pinned)
keep_compiled_code()
import torch
from patchclamp_server.model.compiled.team import team_of
team = team_of(torch.get_num_threads())
pin(0)
own = sorted(os.sched_getaffinity(0))
helpers = [t.native_id for t in threading.enumerate() if t.name.startswith("blocks-")]
import time
deadline = time.monotonic() + 30
while pinned and any(len(os.sched_getaffinity(i)) > 1 for i in helpers) and time.monotonic() < deadline:
    time.sleep(0.01)
print(json.dumps([torch.get_num_threads(), own, [sorted(os.sched_getaffinity(i)) for i in helpers]]))
"""
CORES = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
pytestmark = pytest.mark.skipif(not CORES, reason="the system has no affinities")


def process(threads: int | None, *, pinned: bool) -> tuple[int, list[int], list[list[int]]]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_", "KMP_"))}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    command = [sys.executable, "-c", PROGRAM, json.dumps([threads, pinned])]
    output = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    number, own, helpers = json.loads(output.splitlines()[-1])
    return number, own, helpers


@pytest.mark.parametrize("threads", range(1, len(CORES) + 1))
def test_a_step_has_as_many_threads_as_asked_for_and_they_wander(threads: int) -> None:
    assert process(threads, pinned=False) == (threads, CORES, [CORES] * (threads - 1))


def test_pinned_threads_stay_on_a_core_each() -> None:
    assert process(None, pinned=True) == (len(CORES), CORES[:1], [[core] for core in CORES[1:]])

"""Tasks that a process does not survive, for tests of benchmarks/gpu/processes.py."""

import os
import time


def counted(n):
    for i in range(n):
        yield "rows", {"i": i}


def crash():
    yield "rows", {"i": "before the crash"}
    time.sleep(0.2)
    os._exit(139)


def hang():
    yield "rows", {"i": "before the hang"}
    time.sleep(600)


def fail():
    yield "rows", {"i": "before the error"}
    raise ValueError("wrong")

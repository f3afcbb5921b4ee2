"""Work is shared among threads, in a process and in those that it forks."""

import os
import signal

import pytest
import torch

from patchclamp_server.cpu.memory import in_parts

MUCH = 1 << 30
SECONDS = 60


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_child_has_threads_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    done: list[int] = []
    in_parts(lambda start, end: done.extend(range(start, end)), 10, 1, MUCH)
    assert sorted(done) == list(range(10))
    child = os.fork()
    if not child:
        # Whoever waits for threads that are not there is ended.
        signal.alarm(SECONDS)
        in_parts(lambda start, end: done.extend(range(start, end)), 10, 1, MUCH)
        os._exit(len(done))
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 20

"""Threads that help with the stages of a job, and sleep in between.

A job is opened, worked on and closed by the thread that has it. Helpers look for one for some microseconds after they
have worked on the last, because a step that is visited in Python comes in pieces, and sleep at a semaphore then: they
hold no processor that they have no work for, and wake without the interpreter's lock.
"""

# What numba compiles has no types for mypy, and an intrinsic's first argument is not its caller's to give.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, no-any-return, call-arg, var-annotated"

import os
import threading
from functools import cache
from typing import Any

import numba
import numpy as np
from numba import types
from numpy.typing import NDArray

from patchclamp_server.cpu.atomics import add_to, call, exchange, relax, value_at
from patchclamp_server.model.compiled.job import Job
from patchclamp_server.model.compiled.stages import run_stages
from patchclamp_server.threads import pin

# Entries of the board, each in a cache line of its own: the number of the open job or 0, the address of the job, and
# how many helpers work on one; then of each helper whether it sleeps.
_OPEN, _JOB, _ACTIVE, _ASLEEP, _LINE = 0, 8, 16, 24, 8
# A semaphore is at most so many int64.
_SEMAPHORE = 8
# A helper waits so many pauses for the next job, some 100 microseconds, before it sleeps.
_PATIENCE = 4000
_STAGES = run_stages.address

_sem_init: Any = types.ExternalFunction("sem_init", types.int32(types.int64, types.int32, types.uint32))
_sem_wait: Any = types.ExternalFunction("sem_wait", types.int32(types.int64))
_sem_post: Any = types.ExternalFunction("sem_post", types.int32(types.int64))

_compiled = numba.njit(nogil=True, cache=True)


@_compiled
def _serve(board, semaphores, helper, work):
    """Works on one job after another, for as long as the process lives."""
    last = 0
    while True:
        waited = 0
        while True:
            number = value_at(board, _OPEN)
            if number != 0 and number != last:
                break
            waited += 1
            if waited < _PATIENCE:
                relax(waited)
                continue
            exchange(board, _ASLEEP + helper * _LINE, 1)
            number = value_at(board, _OPEN)
            if number == 0 or number == last:
                _sem_wait(semaphores + helper * (_SEMAPHORE * 8))
            exchange(board, _ASLEEP + helper * _LINE, 0)
            waited = 0
        add_to(board, _ACTIVE, 1)
        # It may have been closed since: then its memory may be gone.
        number = value_at(board, _OPEN)
        if number != 0 and number != last:
            last = number
            call(work, board[_JOB])
        add_to(board, _ACTIVE, -1)


@_compiled
def _share(board, semaphores, helpers, number, work, job):
    board[_JOB] = job
    exchange(board, _OPEN, number)
    for helper in range(helpers):
        if exchange(board, _ASLEEP + helper * _LINE, 0) == 1:
            _sem_post(semaphores + helper * (_SEMAPHORE * 8))
    call(work, job)
    exchange(board, _OPEN, 0)
    waited = 0
    while value_at(board, _ACTIVE) != 0:
        relax(waited)
        waited += 1


@_compiled
def _do_alone(work, job):
    call(work, job)


@_compiled
def _make_semaphore(address):
    return _sem_init(address, 0, 0)


class Team:
    """A thread that has a job, and others that help it."""

    def __init__(self, threads: int) -> None:
        self._board = np.zeros(_ASLEEP + threads * _LINE, dtype=np.int64)
        self._semaphores = np.zeros(threads * _SEMAPHORE, dtype=np.int64)
        self._lock = threading.Lock()
        self._number = 0
        self._helpers = 0
        address = self._semaphores.ctypes.data
        for helper in range(threads - 1):
            if _make_semaphore(address + helper * _SEMAPHORE * 8):
                # macOS has none without names: jobs are done by the thread that has them.
                break
            thread = threading.Thread(target=self._help, args=(helper, address), name=f"blocks-{helper}", daemon=True)
            thread.start()
            self._helpers += 1

    def _help(self, helper: int, semaphores: int) -> None:
        # The thread that has a job is at place 0.
        pin(1 + helper)
        _serve(self._board, semaphores, helper, _STAGES)

    def run(self, job: NDArray[np.int64]) -> None:
        """Runs the stages of a job, without help where another thread has one. Raises RuntimeError if one failed."""
        if not self._helpers or not self._lock.acquire(blocking=False):
            _do_alone(_STAGES, job.ctypes.data)
        else:
            self._run_with_help(job)
        if job[Job.FAILED]:
            raise RuntimeError("a stage of the compiled blocks has failed")

    def _run_with_help(self, job: NDArray[np.int64]) -> None:
        """The lock is held, and let go of."""
        try:
            self._number += 1
            semaphores = self._semaphores.ctypes.data
            _share(self._board, semaphores, self._helpers, self._number, _STAGES, job.ctypes.data)
        finally:
            self._lock.release()


@cache
def team_of(threads: int) -> Team:
    return Team(threads)


# Threads do not live on in a child.
os.register_at_fork(after_in_child=team_of.cache_clear)

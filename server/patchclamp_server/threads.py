"""This sets how the process uses its cores, before torch is imported, since OpenMP reads its environment once."""

import logging
import os
import sys

logger = logging.getLogger(__name__)

# Workers that spin while they wait starve the event loop and each other on small or shared machines.
ENVIRONMENT = {
    "OMP_WAIT_POLICY": "passive",
    "GOMP_SPINCOUNT": "0",
    "KMP_BLOCKTIME": "0",
}


# The cores that threads of steps are kept on, one each; none when they may wander.
_cores: list[int] = []


def configure_threads(threads: int | None = None, *, pinned: bool = False) -> None:
    """Sets what the operator has not set. Once torch is imported it only logs that it is too late.

    `threads`: of a step; by default torch's choice, a thread a core. `pinned`: each of them stays on a core of its own.
    """
    if "torch" in sys.modules:
        logger.warning("torch is imported already: the OpenMP settings of Patchclamp are not applied")
        return
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(threads)
    if pinned and hasattr(os, "sched_getaffinity"):
        _cores[:] = sorted(os.sched_getaffinity(0))
        # Threads of OpenMP begin on the core of the thread that makes them, and would stay there.
        os.environ |= {"OMP_PROC_BIND": "true", "OMP_PLACES": "cores"}


def pin(place: int) -> None:
    """Keeps the calling thread on a core, the same for the same place, if threads are pinned."""
    if _cores:
        os.sched_setaffinity(0, {_cores[place % len(_cores)]})

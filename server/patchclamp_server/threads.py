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


def configure_threads(threads: int | None = None) -> None:
    """Sets what the operator has not set, and that work of the CPU is shared by so many threads; with None torch
    decides. Once torch is imported it only logs that it is too late."""
    if "torch" in sys.modules:
        logger.warning("torch is imported already: the OpenMP settings of Patchclamp are not applied")
        return
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(threads)

"""This allocates arrays whose records begin at cache lines, and shares work among threads."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from patchclamp_server.cpu.vector import LINE

# A second thread is woken for at least so many bytes of weights: they take some hundred microseconds to read.
_WORTH_A_THREAD = 4 << 20


def aligned_records(n: int, size: int) -> NDArray[np.uint8]:
    """Returns zeros [n, size rounded up to whole cache lines]. One more line follows, which a vector may reach into."""
    size = -(-size // LINE) * LINE
    memory = np.zeros(n * size + 2 * LINE, dtype=np.uint8)
    start = -memory.ctypes.data % LINE
    return memory[start : start + n * size].reshape(n, size)


def in_parts(work: Callable[[int, int], Any], n: int, multiple: int, read_bytes: int) -> None:
    """Calls work(start, end) over 0..n, in a part for each thread of torch that starts at a multiple of `multiple`."""
    parts = torch.get_num_threads() if read_bytes >= _WORTH_A_THREAD else 1
    step = max(multiple, -(-n // parts // multiple) * multiple)
    if parts == 1 or n <= step:
        work(0, n)
        return
    others = [_workers().submit(work, start, min(n, start + step)) for start in range(step, n, step)]
    work(0, step)
    for other in others:
        other.result()


@cache
def _workers() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(thread_name_prefix="sparse")


# Threads do not live on in a child.
os.register_at_fork(after_in_child=_workers.cache_clear)

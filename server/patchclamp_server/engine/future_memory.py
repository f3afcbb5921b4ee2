"""Decides whether running sequences will have the blocks that they need to their ends, if one more sequence starts.
(The future memory of Gong et al., "Past-Future Scheduler", ASPLOS 2025.)"""

from collections.abc import Callable

import numpy as np

from patchclamp_server.engine.kv_cache import KvCache
from patchclamp_server.engine.sequence import Sequence


def can_finish(
    cache: KvCache,
    running: list[Sequence],
    sequence: Sequence,
    hit: list[int],
    expected_length: Callable[[Sequence], int],
) -> bool:
    """Whether it and those that run before it are expected to come to their ends with the blocks there are; those in
    `hit` are known already.

    Each grows by a token a step and is gone when it ends, so most blocks are needed at one of the ends. Those of a
    lower priority give up theirs when it comes to it. A follower need not wait: its leader's predictions are kept
    until it comes.
    """
    before = [s for s in running if s.request.priority <= sequence.request.priority]
    if not before or sequence.leader is not None:
        return True
    together = [*before, sequence]
    lengths = np.array([len(s.tokens) for s in together])
    left = np.array([max(1, expected_length(s) - len(s.tokens)) for s in together])
    # This is [end, sequence]: what each that has not ended before holds at that end.
    held = -(-(lengths + left[:, None]) // cache.block_size) * (left >= left[:, None])
    shared = sum(not cache.is_idle(block) for block in hit)
    there = cache.n_free + shared + sum(len(s.blocks) for s in running)
    return int(held.sum(axis=1).max()) <= there

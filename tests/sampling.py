"""Which cases of a wide product of parameters run: a sample by default, all of them with `--all`.

A test says with `@pytest.mark.drawn(share)` that its cases are many and alike. Of these a share is drawn by `--seed`,
the same for the same seed, so that every value of every parameter is in it. Other tests are left alone.
"""

import random
from collections import defaultdict
from collections.abc import Mapping, Sequence

import pytest


def drawn(cases: Sequence[Mapping[str, object]], share: float, seed: str) -> list[int]:
    """Indices, ascending, of a `share` of the cases, and of as many more as it takes to have every value of every
    parameter at least once. `cases`: by parameter its value."""
    order = list(range(len(cases)))
    random.Random(seed).shuffle(order)
    wanted = round(share * len(cases))
    seen: set[tuple[str, object]] = set()
    # The first of these bring a value that was not there before; the others fill up.
    bringing = []
    for index in order:
        if not seen.issuperset(cases[index].items()):
            seen.update(cases[index].items())
            bringing.append(index)
    filling = [index for index in order if index not in set(bringing)]
    return sorted((bringing + filling)[: max(wanted, len(bringing))])


def split(items: Sequence[pytest.Item], seed: int) -> tuple[list[pytest.Item], list[pytest.Item]]:
    """Those that run, in their order, and those that are left out."""
    wide: dict[str, list[pytest.Item]] = defaultdict(list)
    for item in items:
        if item.get_closest_marker("drawn") is not None:
            wide[item.nodeid.partition("[")[0]].append(item)
    left_out: set[pytest.Item] = set()
    for name, cases in wide.items():
        (share,) = cases[0].get_closest_marker("drawn").args  # type: ignore[union-attr]
        parameters = [case.callspec.params for case in cases]  # type: ignore[attr-defined]
        # By their text: values need not be hashable.
        values = [{parameter: repr(value) for parameter, value in case.items()} for case in parameters]
        kept = set(drawn(values, share, f"{seed} {name}"))
        left_out.update(case for index, case in enumerate(cases) if index not in kept)
    return [item for item in items if item not in left_out], [item for item in items if item in left_out]

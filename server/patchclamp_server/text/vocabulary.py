"""Ids are checked before the embedding, so that one without a row in the model cannot fail a shared step."""

from collections.abc import Sequence

from patchclamp_server.errors import InvalidArgument


def first_outside(ids: Sequence[int], size: int) -> int | None:
    """Returns the index of the first id outside the vocabulary [0, size); None where the model has a row for each."""
    if not ids or (min(ids) >= 0 and max(ids) < size):
        return None
    return next(i for i, id in enumerate(ids) if not 0 <= id < size)


def check_ids(ids: Sequence[int], size: int, field: str) -> None:
    """Raises InvalidArgument at ``field[i]`` for the first id outside the vocabulary [0, size)."""
    i = first_outside(ids, size)
    if i is not None:
        raise InvalidArgument(f"{field}[{i}]", f"{ids[i]} is outside the vocabulary [0, {size})")

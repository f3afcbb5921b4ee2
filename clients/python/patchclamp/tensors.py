"""Numbers of any common kind → the message Tensor, without importing numpy or torch.

Accepted, in this order: anything with the buffer protocol (numpy, array, memoryview), anything with ``tolist``
(torch on every device and dtype), anything with ``__array__`` (pandas, jax), and nested sequences of floats.
"""

from array import array
from collections.abc import Iterator, Sequence
from math import prod
from sys import byteorder
from typing import Any, Protocol, TypeAlias, cast

from patchclamp.fields import shown
from patchclamp.v1.tensor_pb2 import DATA_TYPE_FLOAT16, DATA_TYPE_FLOAT32, DATA_TYPE_FLOAT64, DataType, Tensor


class SupportsArray(Protocol):
    """Offers numpy's array protocol, which torch, jax and pandas implement as well."""

    def __array__(self) -> Any: ...


NestedFloats = Sequence[float] | Sequence[Sequence[float]] | Sequence[Sequence[Sequence[float]]]
Numbers: TypeAlias = NestedFloats | SupportsArray | memoryview

# struct format character of a buffer → type that travels unchanged; integers and bools are sent as float32
_BUFFER_TYPES: dict[str, DataType.ValueType] = {
    "e": DATA_TYPE_FLOAT16,
    "f": DATA_TYPE_FLOAT32,
    "d": DATA_TYPE_FLOAT64,
}


def tensor(numbers: Numbers, field: str) -> Tensor:
    """Returns a dense row-major little-endian Tensor.

    Raises TypeError for what holds no numbers, ValueError for ragged rows; both begin with `field`, the name of the
    argument.
    """
    if not isinstance(numbers, str | bytes | bytearray):
        try:
            return _tensor(numbers)
        except _NoNumber as error:
            raise TypeError(f"{field}: expected numbers, got {error}") from None
        except (ValueError, OverflowError) as error:
            raise ValueError(f"{field}: {error}") from None
    raise TypeError(f"{field}: expected numbers, got {shown(numbers)}")


class _NoNumber(Exception):
    """Says what stands where a number should."""


def _tensor(numbers: Numbers) -> Tensor:
    view = _buffer(numbers)
    if view is not None:
        dtype = _BUFFER_TYPES.get(view.format.lstrip("@=<"))
        if dtype is not None and byteorder == "little":
            return Tensor(dtype=dtype, shape=list(view.shape or ()), data=view.tobytes())
    to_list = getattr(numbers, "tolist", None)
    if to_list is not None:
        return _from_nested(to_list())
    to_array = getattr(numbers, "__array__", None)
    if to_array is not None:
        return _tensor(to_array())
    return _from_nested(numbers)


def _buffer(numbers: object) -> memoryview | None:
    try:
        return memoryview(cast(Any, numbers))
    except (TypeError, ValueError, BufferError):  # no buffer, or one that is not ours to read this way
        return None


def _from_nested(numbers: object) -> Tensor:
    shape = tuple(_shape(numbers))
    values = array("f", _flatten(numbers, shape))
    if len(values) != prod(shape):
        raise ValueError("rows of different length")
    if byteorder != "little":
        values.byteswap()
    return Tensor(dtype=DATA_TYPE_FLOAT32, shape=shape, data=values.tobytes())


def _shape(numbers: object) -> Iterator[int]:
    while isinstance(numbers, Sequence) and not isinstance(numbers, str):
        yield len(numbers)
        if not numbers:
            return
        numbers = numbers[0]


def _flatten(numbers: object, shape: tuple[int, ...]) -> Iterator[float]:
    if not shape:
        if not isinstance(numbers, int | float):
            raise _NoNumber(shown(numbers))
        yield numbers
        return
    if not isinstance(numbers, Sequence):
        raise ValueError("rows of different depth")
    if len(numbers) != shape[0]:
        raise ValueError("rows of different length")
    for row in numbers:
        yield from _flatten(row, shape[1:])

"""Decodes Tensor messages into torch tensors. The bytes are little-endian, dense and row-major."""

import math
import sys
from typing import TYPE_CHECKING

import torch

from patchclamp_server.errors import InvalidArgument
from patchclamp_server.interventions.field_checks import known

if TYPE_CHECKING:
    # The engine, whose programs are decoded here, runs where the messages are not installed.
    from patchclamp.v1 import tensor_pb2

_DTYPES: dict[str, torch.dtype] = {
    "DATA_TYPE_FLOAT32": torch.float32,
    "DATA_TYPE_FLOAT16": torch.float16,
    "DATA_TYPE_BFLOAT16": torch.bfloat16,
    "DATA_TYPE_FLOAT64": torch.float64,
    "DATA_TYPE_INT64": torch.int64,
    "DATA_TYPE_INT32": torch.int32,
}

if sys.byteorder != "little":
    raise ImportError("tensors on the wire are little-endian; this machine is not")


def decode_tensor(proto: "tensor_pb2.Tensor", field: str, *, ndims: tuple[int, ...]) -> torch.Tensor:
    """Returns the numbers of `proto` in float32, with one of `ndims` dimensions.

    Raises InvalidArgument for an unknown dtype, a dimension below 1, another number of dimensions, bytes that do not
    fill the shape, and NaN or Inf (also a float64 beyond the range of float32).
    """
    enum = proto.DESCRIPTOR.fields_by_name["dtype"].enum_type
    assert enum is not None
    dtypes = {enum.values_by_name[name].number: dtype for name, dtype in _DTYPES.items()}
    dtype = known(proto.dtype, dtypes, f"{field}.dtype", [value.name for value in enum.values][1:])
    shape = tuple(proto.shape)
    if len(shape) not in ndims:
        expected = " or ".join(str(n) for n in ndims)
        raise InvalidArgument(f"{field}.shape", f"expected {expected} dimension(s), got {list(shape)}")
    for i, size in enumerate(shape):
        if size < 1:
            raise InvalidArgument(f"{field}.shape[{i}]", f"expected at least 1, got {size}")
    expected_bytes = math.prod(shape) * dtype.itemsize
    if len(proto.data) != expected_bytes:
        name = str(dtype).removeprefix("torch.")
        raise InvalidArgument(
            f"{field}.data",
            f"expected {expected_bytes} bytes for {name} {list(shape)}, got {len(proto.data)}",
        )
    # torch needs a writable buffer, so the bytes are copied into a bytearray and the message keeps its own.
    values = torch.frombuffer(bytearray(proto.data), dtype=dtype).reshape(shape).to(torch.float32)
    finite = torch.isfinite(values)
    if not finite.all():
        index = (~finite).nonzero()[0].tolist()
        raise InvalidArgument(field, f"expected finite float32 numbers, got {values[tuple(index)]} at {index}")
    return values

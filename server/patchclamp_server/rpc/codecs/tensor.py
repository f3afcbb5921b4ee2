"""Tensor messages ↔ torch tensors. Little-endian, dense, row-major."""

import math
import sys

import torch

from patchclamp.v1 import tensor_pb2
from patchclamp_server.errors import InvalidArgument
from patchclamp_server.rpc.codecs.checks import known

TORCH_DTYPES: dict[int, torch.dtype] = {
    tensor_pb2.DATA_TYPE_FLOAT32: torch.float32,
    tensor_pb2.DATA_TYPE_FLOAT16: torch.float16,
    tensor_pb2.DATA_TYPE_BFLOAT16: torch.bfloat16,
    tensor_pb2.DATA_TYPE_FLOAT64: torch.float64,
    tensor_pb2.DATA_TYPE_INT64: torch.int64,
    tensor_pb2.DATA_TYPE_INT32: torch.int32,
}

if sys.byteorder != "little":
    raise ImportError("tensors on the wire are little-endian; this machine is not")


def decode_tensor(proto: tensor_pb2.Tensor, field: str, *, ndims: tuple[int, ...]) -> torch.Tensor:
    """The numbers of `proto` in float32, with one of `ndims` dimensions.

    Raises InvalidArgument: dtype not known, a dimension below 1, another number of dimensions, bytes that do not
    fill the shape, NaN or Inf (also a float64 beyond the range of float32).
    """
    dtype = known(proto.dtype, TORCH_DTYPES, f"{field}.dtype", tensor_pb2.DataType.keys()[1:])
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
    # bytearray: torch wants a writable buffer, and the message keeps its own.
    values = torch.frombuffer(bytearray(proto.data), dtype=dtype).reshape(shape).to(torch.float32)
    finite = torch.isfinite(values)
    if not finite.all():
        index = (~finite).nonzero()[0].tolist()
        raise InvalidArgument(field, f"expected finite float32 numbers, got {values[tuple(index)]} at {index}")
    return values


def encode_tensor(values: torch.Tensor) -> tensor_pb2.Tensor:
    """`values` as a float32 message."""
    data = values.detach().to("cpu", torch.float32).contiguous()
    return tensor_pb2.Tensor(dtype=tensor_pb2.DATA_TYPE_FLOAT32, shape=list(data.shape), data=data.numpy().tobytes())

"""Turns torch tensors into tensor messages; interventions/tensor_messages.py reads them."""

import torch

from patchclamp.v1 import tensor_pb2
from patchclamp_server.interventions.field_checks import known

DTYPES: dict[torch.dtype, "tensor_pb2.DataType.ValueType"] = {
    torch.float32: tensor_pb2.DATA_TYPE_FLOAT32,
    torch.float16: tensor_pb2.DATA_TYPE_FLOAT16,
    torch.bfloat16: tensor_pb2.DATA_TYPE_BFLOAT16,
    torch.int32: tensor_pb2.DATA_TYPE_INT32,
}
# What activations are sent and stored in.
ACTIVATION_DTYPES: dict[int, torch.dtype] = {
    DTYPES[dtype]: dtype for dtype in (torch.float32, torch.float16, torch.bfloat16)
}


def encode_tensor(values: torch.Tensor, dtype: torch.dtype = torch.float32) -> tensor_pb2.Tensor:
    """Returns `values` as a message of a type in DTYPES."""
    data = values.detach().to("cpu", dtype).contiguous()
    # bfloat16 is no type of numpy.
    content = data.view(-1).view(torch.uint8).numpy().tobytes()
    return tensor_pb2.Tensor(dtype=DTYPES[dtype], shape=list(data.shape), data=content)


def decode_activation_dtype(number: int, field: str) -> torch.dtype:
    """Returns the type, float32 where none is named."""
    accepted = (f"DATA_TYPE_{str(dtype).removeprefix('torch.').upper()}" for dtype in ACTIVATION_DTYPES.values())
    return known(number, ACTIVATION_DTYPES, field, accepted) if number else torch.float32

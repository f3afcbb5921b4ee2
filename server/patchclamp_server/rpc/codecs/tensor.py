"""Turns torch tensors into tensor messages; interventions/tensor_messages.py reads them."""

import torch

from patchclamp.v1 import tensor_pb2


def encode_tensor(values: torch.Tensor) -> tensor_pb2.Tensor:
    """Returns `values` as a float32 message."""
    data = values.detach().to("cpu", torch.float32).contiguous()
    return tensor_pb2.Tensor(dtype=tensor_pb2.DATA_TYPE_FLOAT32, shape=list(data.shape), data=data.numpy().tobytes())

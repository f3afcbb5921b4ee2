"""torch tensors → tensor messages, and what reads them under the name by which the codecs of rpc know it."""

import torch

from patchclamp.v1 import tensor_pb2
from patchclamp_server.interventions.tensor_messages import decode_tensor

__all__ = ["decode_tensor", "encode_tensor"]


def encode_tensor(values: torch.Tensor) -> tensor_pb2.Tensor:
    """`values` as a float32 message."""
    data = values.detach().to("cpu", torch.float32).contiguous()
    return tensor_pb2.Tensor(dtype=tensor_pb2.DATA_TYPE_FLOAT32, shape=list(data.shape), data=data.numpy().tobytes())

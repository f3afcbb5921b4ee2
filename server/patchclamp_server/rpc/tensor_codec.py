"""Tensor messages under the name by which the codecs of rpc know them."""

from patchclamp_server.tensor_messages import TORCH_DTYPES, decode_tensor, encode_tensor

__all__ = ["TORCH_DTYPES", "decode_tensor", "encode_tensor"]

"""What a head writes of what it attends to: the factors of its OV circuit, from the weights.

    out_h = W_O^h W_V^h x      for a head that gives all its attention to one token, whose normalised residual is x

Biases are left out: those of values add the same vector for every token, and those of outputs belong to no head.
"""

import torch
from torch import Tensor

from patchclamp_server.model.decoder import Decoder
from patchclamp_server.sparsity.mlp import matrix


@torch.inference_mode()
def ov_weights(decoder: Decoder, layer: int) -> tuple[Tensor, Tensor]:
    """Returns W_V [n_heads, head_dim, d_model], alike for heads of one group, and W_O [n_heads, d_model, head_dim]."""
    spec, block = decoder.spec, decoder.blocks[layer]
    values = matrix(block.qkv)[(spec.n_heads + spec.n_kv_heads) * spec.head_dim :]
    by_kv_head = values.view(spec.n_kv_heads, spec.head_dim, spec.d_model)
    outputs = matrix(block.attn_output).view(spec.d_model, spec.n_heads, spec.head_dim)
    return by_kv_head.repeat_interleave(spec.n_heads // spec.n_kv_heads, 0), outputs.transpose(0, 1)

"""Tiny models whose weights are codes, as files hold them, with products that round activations."""

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, quantize
from tiny_models import tiny_model

from patchclamp_server.cpu.linear import Linear
from patchclamp_server.cpu.stored import Format, Part, StoredMatrix
from patchclamp_server.model.decoder import Block, Decoder
from patchclamp_server.model.weights import decoder_from_transformers

# Widths that are whole blocks.
_SIZES = {"hidden_size": 64, "intermediate_size": 96}
_FORMATS = {"qkv": Format.Q5_1, "attn_output": Format.Q8_0, "mlp_input": Format.Q4_1, "mlp_output": Format.Q5_0}


def coded(linear: Linear, format: Format, *, mixed: bool = False) -> Linear:
    """The projection in blocks of a format, its first 16 outputs in float32 where it is `mixed`."""
    weight = linear.dense().numpy()
    floats = 16 if mixed else 0
    blocks = quantize(weight[floats:], GGMLQuantizationType(format))
    parts = [Part.whole(format, np.ascontiguousarray(blocks).reshape(-1), weight.shape[1])]
    if floats:
        parts = [*StoredMatrix.of(torch.from_numpy(weight[:floats])).parts, *parts]
    return Linear(StoredMatrix(tuple(parts)), linear.bias, batch_invariant=True)


def rounding_decoder(family: str) -> Decoder:
    """A decoder of a family with blocks in several formats that takes activations in 8 bits."""
    plain = decoder_from_transformers(tiny_model(family, **_SIZES), dtype=torch.float32, device="cpu")

    def of(block: Block) -> Block:
        own: dict[str, Any] = {name: coded(getattr(block, name), format) for name, format in _FORMATS.items()}
        return replace(block, **own)

    blocks = [of(block) for block in plain.blocks]
    blocks[1] = replace(blocks[1], attn_output=plain.blocks[1].attn_output)
    unembedding = coded(plain.unembedding, Format.Q8_0, mixed=True)
    decoder = Decoder(
        plain.spec, plain.embedding, plain.position_embedding, plain.rotary, blocks, plain.final_norm, unembedding
    )
    decoder.round_activations()
    return decoder

"""Matrix products with gradients with respect to what is multiplied, whatever the weights are kept as.

    y = x Wᵀ + b        ∂F/∂x = (∂F/∂y) W        x [T, in], W [out, in]

The first product is the decoder's own. For the second a part of W at a time is float32: at most PART_BYTES, where it is
stored as blocks (cpu/stored.py) or in 16 bits. Weights have no gradients. All is float32, so that gradients are as
precise for a model that is served in 16 bits; its activations are then those of float32, not of serving.
"""

from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from patchclamp_server.cpu.linear import Linear
from patchclamp_server.engine.exclusive import Slice, Sliced
from patchclamp_server.model.decoder import Block, BlockProducts, Decoder
from patchclamp_server.model.row_operators import HeadNorms, Norm

# Of weights that are made float32 at a time.
PART_BYTES = 8 << 20
# Outputs of a part.
_MULTIPLE = 16


@dataclass(frozen=True, eq=False)
class DifferentiableProduct:
    """A product of a decoder, for x in float32."""

    linear: Linear

    def __call__(self, x: Tensor) -> Tensor:
        if not x.requires_grad:
            return self.multiply(x)
        y: Tensor = _Multiply.apply(x, self)  # type: ignore[no-untyped-call]
        return y

    def multiply(self, x: Tensor) -> Tensor:
        """x [T, in] -> [T, out], without a gradient."""
        linear = self.linear
        if linear.weight is None or linear.weight.dtype == torch.float32:
            return linear(x)
        y = torch.cat([F.linear(x, part) for _, part in self.parts()], dim=1)
        return y if linear.bias is None else y.add_(linear.bias)

    def multiply_back(self, gradient: Tensor) -> Tensor:
        """∂F/∂y [T, out] -> ∂F/∂x [T, in]."""
        weight = self.linear.weight
        if weight is not None and weight.dtype == torch.float32:
            return gradient @ weight
        return torch.stack([gradient[:, outputs] @ part for outputs, part in self.parts()]).sum(0)

    def multiply_back_in_slices(self, gradient: Tensor) -> Sliced[Tensor]:
        """The same, a part of the weights a slice: for an unembedding, which is as large as many blocks."""
        total: Tensor | None = None
        for outputs, part in self.parts():
            of_part = gradient[:, outputs] @ part
            total = of_part if total is None else total + of_part
            yield Slice(1)
        assert total is not None
        return total

    def parts(self) -> Iterator[tuple[slice, Tensor]]:
        """Outputs, and their rows of W in float32; together all of W."""
        out, width = self.linear.shape
        step = max(_MULTIPLE, PART_BYTES // (4 * width) // _MULTIPLE * _MULTIPLE)
        for start in range(0, out, step):
            end = min(out, start + step)
            yield slice(start, end), self.linear.rows(torch.arange(start, end))


class _Multiply(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, product: DifferentiableProduct) -> Tensor:
        ctx.product = product
        return product.multiply(x.detach())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        product: DifferentiableProduct = ctx.product
        return product.multiply_back(gradient), None


@dataclass(frozen=True, eq=False)
class _Products:
    """Those of a block."""

    qkv: DifferentiableProduct
    attn_output: DifferentiableProduct
    mlp_input: DifferentiableProduct
    mlp_output: DifferentiableProduct


@dataclass(frozen=True, eq=False)
class DifferentiableModel:
    """A decoder as gradients go through it: `Decoder.run_blocks` of `decoder`, with these `products`.

    Everything of `decoder` is float32 but the matrices, which are those that serve. No weight is copied.
    """

    decoder: Decoder
    products: tuple[BlockProducts, ...]
    unembedding: DifferentiableProduct

    @classmethod
    def of(cls, decoder: Decoder) -> "DifferentiableModel":
        blocks = decoder.blocks
        products = tuple(
            _Products(*map(DifferentiableProduct, (b.qkv, b.attn_output, b.mlp_input, b.mlp_output))) for b in blocks
        )
        return cls(_in_float32(decoder), products, DifferentiableProduct(decoder.unembedding))


# Works at the exclusive door begin in inference mode, whose tensors take no part in a backward pass.
@torch.inference_mode(False)
def _in_float32(decoder: Decoder) -> Decoder:
    if decoder.dtype == torch.float32:
        return decoder
    wide = copy(decoder)
    wide.dtype = torch.float32
    wide.final_norm = _wide_norm(decoder.final_norm)
    wide.rotary = {kind: (cos.float(), sin.float()) for kind, (cos, sin) in decoder.rotary.items()}
    wide.blocks = [_wide_block(block) for block in decoder.blocks]
    return wide


def _wide_norm(norm: Norm) -> Norm:
    return Norm(norm.weight.float(), None if norm.bias is None else norm.bias.float(), norm.eps)


def _wide_block(block: Block) -> Block:
    heads = block.head_norms
    if heads is not None:
        heads = HeadNorms(_wide_norm(heads.q), _wide_norm(heads.k), heads.weights.float())
    return replace(
        block,
        attn_norm=_wide_norm(block.attn_norm),
        head_norms=heads,
        post_attn_norm=None if block.post_attn_norm is None else _wide_norm(block.post_attn_norm),
        mlp_norm=_wide_norm(block.mlp_norm),
        post_mlp_norm=None if block.post_mlp_norm is None else _wide_norm(block.post_mlp_norm),
    )

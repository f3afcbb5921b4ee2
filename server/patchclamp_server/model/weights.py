"""Takes over the weights of a transformers model, fused: q, k, v in one matrix, gate and up in one."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from patchclamp_server.cpu.linear import Linear, can_be_invariant
from patchclamp_server.model.architectures import NormKind, QkvLayout
from patchclamp_server.model.decoder import Block, Decoder
from patchclamp_server.model.progress import Progress, Silent, Stage
from patchclamp_server.model.quantization.quantizer import Quantizer, stored_tensor
from patchclamp_server.model.row_operators import HeadNorms, Norm
from patchclamp_server.model.spec import read_spec


def decoder_from_transformers(
    model: PreTrainedModel,
    *,
    dtype: torch.dtype,
    device: str,
    batch_invariant: bool | None = None,
    use_codes: bool = True,
    quantizer: Quantizer | None = None,
    progress: Progress | None = None,
) -> Decoder:
    """Returns the decoder of a causal LM. Raises FailedPrecondition for an architecture that is not in the table.

    For `batch_invariant` see Decoder; None sets it where that is possible. For `use_codes` see Linear.
    `quantizer` makes blocks of the matrices.
    """
    if batch_invariant is None:
        batch_invariant = can_be_invariant(dtype, device)
    return _Builder(model, dtype, device, batch_invariant, use_codes, quantizer, progress or Silent()).build()


class _Builder:
    """Reads modules by the paths of the architecture table."""

    def __init__(
        self,
        model: PreTrainedModel,
        dtype: torch.dtype,
        device: str,
        batch_invariant: bool,
        use_codes: bool,
        quantizer: Quantizer | None,
        progress: Progress,
    ) -> None:
        self.model = model
        self.products = {"batch_invariant": batch_invariant, "use_codes": use_codes}
        self.quantizer = quantizer
        self.progress = progress
        self.spec = read_spec(model.config)
        self.dtype = dtype
        self.device = device

    def build(self) -> Decoder:
        family = self.spec.family
        layers = self._module(family.layers)
        embedding = self._end(family.embedding)
        positions = None
        if family.position_embedding is not None:
            table = self._module(family.position_embedding).weight
            positions = self._tensor(table[family.position_offset :])
        blocks: list[Block] = []
        for layer in layers.children():
            self.progress.update(Stage.PREPARE, len(blocks), self.spec.n_layers)
            blocks.append(self._block(f"{family.layers}.{len(blocks)}", layer))
        unembedding = self._module(family.unembedding)
        tied = unembedding.weight is self._module(family.embedding).weight
        weight = embedding if tied else self._end(family.unembedding)
        bias = None if getattr(unembedding, "bias", None) is None else self._tensor(unembedding.bias)
        return Decoder(
            self.spec,
            embedding,
            positions,
            self._rotary(),
            blocks,
            self._norm(self._module(family.final_norm)),
            Linear(weight, bias, **self.products),
        )

    def _end(self, path: str) -> Tensor:
        """The embedding or the unembedding."""
        return self._tensor(self._in_blocks(path, self._module(path).weight, is_end=True))

    def _in_blocks(self, path: str, weight: Tensor, *, is_end: bool = False) -> Tensor:
        """Returns a matrix as the quantizer leaves it."""
        if self.quantizer is None:
            return weight
        return self.quantizer.matrix(f"{path}.weight", stored_tensor(weight), is_end=is_end).dense()

    def _block(self, path: str, layer: nn.Module) -> Block:
        family, spec = self.spec.family, self.spec

        def norm(path: str | None) -> Norm | None:
            return None if path is None else self._norm(_submodule(layer, path))

        attn_norm, mlp_norm = norm(family.attn_norm), norm(family.mlp_norm)
        assert attn_norm is not None
        assert mlp_norm is not None
        order = None
        if family.qkv_layout is QkvLayout.PER_HEAD:
            rows = torch.arange(3 * spec.n_heads * spec.head_dim).view(spec.n_heads, 3, spec.head_dim)
            order = rows.transpose(0, 1).reshape(-1)
        q_norm, k_norm = norm(family.q_norm), norm(family.k_norm)
        head_norms = None
        if q_norm is not None and k_norm is not None:
            head_norms = HeadNorms.of(q_norm, k_norm, spec.n_heads, spec.n_kv_heads)
        return Block(
            attn_norm=attn_norm,
            qkv=self._linear(path, layer, family.qkv, order),
            head_norms=head_norms,
            attn_output=self._linear(path, layer, (family.attn_output,)),
            post_attn_norm=norm(family.post_attn_norm),
            mlp_norm=mlp_norm,
            mlp_input=self._linear(path, layer, family.mlp_input),
            mlp_output=self._linear(path, layer, (family.mlp_output,), input_major=True),
            post_mlp_norm=norm(family.post_mlp_norm),
        )

    def _linear(
        self,
        path: str,
        layer: nn.Module,
        paths: tuple[str, ...],
        order: Tensor | None = None,
        *,
        input_major: bool = False,
    ) -> Linear:
        """Stacks the modules at `paths`, of the block at `path`, along their outputs, and reorders these by `order`."""
        modules = [_submodule(layer, path) for path in paths]
        weights = [m.weight.t() if self.spec.family.transposed else m.weight for m in modules]
        weight = torch.cat([self._in_blocks(f"{path}.{own}", w) for own, w in zip(paths, weights, strict=True)])
        bias = None
        if getattr(modules[0], "bias", None) is not None:
            bias = torch.cat([m.bias for m in modules])
        if order is not None:
            weight = weight[order]
            bias = None if bias is None else bias[order]
        weight = self._tensor(weight)
        bias = None if bias is None else self._tensor(bias)
        return Linear(weight, bias, input_major=input_major, **self.products)

    def _module(self, path: str) -> Any:
        return _submodule(self.model, path)

    def _norm(self, module: Any) -> Norm:
        kind = self.spec.family.norm
        eps = self.spec.eps if kind is not NormKind.LAYER else float(module.eps)
        if kind is not NormKind.LAYER:
            weight = module.weight.float() + 1.0 if kind is NormKind.RMS_ONE_PLUS else module.weight
            return Norm(self._tensor(weight), None, eps)
        # OPT's norms may lack both weight and bias: they only normalise.
        weight = torch.ones(module.normalized_shape) if module.weight is None else module.weight
        bias = torch.zeros(module.normalized_shape) if module.bias is None else module.bias
        return Norm(self._tensor(weight), self._tensor(bias), eps)

    def _rotary(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Takes the tables by position from the family's own module, so that every fixed scaling is taken over."""
        path = self.spec.family.rotary
        if path is None:
            return {}
        module = self._module(path)
        positions = torch.arange(self.spec.context_length)[None]
        like = torch.empty(1, dtype=torch.float32)
        tables = {}
        for kind in sorted(set(self.spec.rotary_kinds)):
            cos, sin = module(like, positions, kind) if kind else module(like, positions)
            half = cos.shape[-1] // 2
            signed = torch.cat((-sin[0, :, :half], sin[0, :, half:]), dim=-1)
            tables[kind] = (self._tensor(cos[0]), self._tensor(signed))
        return tables

    def _tensor(self, value: Tensor) -> Tensor:
        return value.detach().to(device=self.device, dtype=self.dtype).contiguous()


def _submodule(module: nn.Module, path: str) -> Any:
    # The architecture table knows which attributes it has; the type checker does not.
    return module.get_submodule(path)

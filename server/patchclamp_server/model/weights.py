"""Builds a decoder of the tensors of files by the paths of the architecture table, q, k, v as one and gate, up as one.

On a CPU in float32 matrices stay as they are stored; elsewhere they become dense, in the dtype of activations.
"""

from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedConfig

from patchclamp_server.cpu.linear import Linear, can_be_invariant
from patchclamp_server.cpu.stored import Part, StoredMatrix
from patchclamp_server.model.architectures import NormKind, QkvLayout
from patchclamp_server.model.decoder import Block, Decoder
from patchclamp_server.model.embedding import Embedding
from patchclamp_server.model.file_tensors import FileTensors, tensors_of
from patchclamp_server.model.parameters import parameters_of
from patchclamp_server.model.progress import Progress, Silent, Stage
from patchclamp_server.model.quantization.quantizer import Quantizer
from patchclamp_server.model.rotary import rotary_tables
from patchclamp_server.model.row_operators import HeadNorms, Norm
from patchclamp_server.model.spec import read_spec

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def decoder_of(
    config: PreTrainedConfig,
    tensors: FileTensors,
    *,
    dtype: torch.dtype,
    device: str,
    batch_invariant: bool | None = None,
    use_codes: bool = True,
    quantizer: Quantizer | None = None,
    progress: Progress | None = None,
) -> Decoder:
    """Returns the decoder of a causal LM. Raises FailedPrecondition for an architecture that is not in the table.

    `tensors` has every parameter, in its shape, but for one of two that are tied (parameters.py).
    For `batch_invariant` see Decoder; None sets it where that is possible. For `use_codes` see load_model.
    `quantizer` makes blocks of the matrices.
    """
    if batch_invariant is None:
        batch_invariant = can_be_invariant(dtype, device)
    return _Builder(config, tensors, dtype, device, batch_invariant, use_codes, quantizer, progress or Silent()).build()


def decoder_from_transformers(
    model: "PreTrainedModel",
    *,
    dtype: torch.dtype,
    device: str,
    batch_invariant: bool | None = None,
) -> Decoder:
    """Returns the decoder of a transformers model in memory, whose weights it may share."""
    return decoder_of(
        model.config,
        tensors_of(model),
        dtype=dtype,
        device=device,
        batch_invariant=batch_invariant,
    )


class _Builder:
    """Reads tensors by the paths of the architecture table."""

    def __init__(
        self,
        config: PreTrainedConfig,
        tensors: FileTensors,
        dtype: torch.dtype,
        device: str,
        batch_invariant: bool,
        use_codes: bool,
        quantizer: Quantizer | None,
        progress: Progress,
    ) -> None:
        self.config = config
        self.tensors = tensors
        self.batch_invariant, self.use_codes = batch_invariant, use_codes
        self.quantizer = quantizer
        self.progress = progress
        self.spec = read_spec(config)
        self.parameters = parameters_of(config, self.spec)
        self.dtype = dtype
        self.device = device

    def build(self) -> Decoder:
        family = self.spec.family
        positions = None
        if family.position_embedding is not None:
            table = self.tensors[f"{family.position_embedding}.weight"].dense()
            positions = self._tensor(table[family.position_offset :])
        blocks: list[Block] = []
        for layer in range(self.spec.n_layers):
            self.progress.update(Stage.PREPARE, layer, self.spec.n_layers)
            blocks.append(self._block(f"{family.layers}.{layer}"))
        embedding, unembedding = self._ends()
        return Decoder(
            self.spec,
            Embedding(embedding),
            positions,
            {
                kind: (self._tensor(cos), self._tensor(sin))
                for kind, (cos, sin) in rotary_tables(self.config, self.spec).items()
            },
            blocks,
            self._norm(family.final_norm),
            self._product(unembedding, self._bias((family.unembedding,))),
        )

    def _ends(self) -> tuple[Tensor | StoredMatrix, Tensor | StoredMatrix]:
        """Returns the weights of embedding and unembedding: one object where they are tied."""
        family, tensors = self.spec.family, self.tensors
        names = [f"{path}.weight" for path in (family.embedding, family.unembedding)]
        there = [name for name in names if name in tensors]
        # A file may have both although its configuration ties them: they are two where they differ.
        if len(there) == 1 or (self.parameters.tied and tensors.same(*names)):
            embedding = self._end(there[0])
            return embedding, embedding
        embedding, unembedding = (self._end(name) for name in names)
        return embedding, unembedding

    def _end(self, name: str) -> Tensor | StoredMatrix:
        return self._weight(StoredMatrix((self._in_blocks(name, self.tensors[name].part(), is_end=True),)))

    def _block(self, layer: str) -> Block:
        family, spec = self.spec.family, self.spec

        def norm(path: str | None) -> Norm | None:
            return None if path is None else self._norm(f"{layer}.{path}")

        def linear(*paths: str, order: NDArray[np.int64] | None = None, input_major: bool = False) -> Linear:
            return self._linear([f"{layer}.{path}" for path in paths], order, input_major=input_major)

        attn_norm, mlp_norm = norm(family.attn_norm), norm(family.mlp_norm)
        assert attn_norm is not None
        assert mlp_norm is not None
        order = None
        if family.qkv_layout is QkvLayout.PER_HEAD:
            rows = np.arange(3 * spec.n_heads * spec.head_dim, dtype=np.int64).reshape(spec.n_heads, 3, spec.head_dim)
            order = rows.swapaxes(0, 1).reshape(-1)
        q_norm, k_norm = norm(family.q_norm), norm(family.k_norm)
        head_norms = None
        if q_norm is not None and k_norm is not None:
            head_norms = HeadNorms.of(q_norm, k_norm, spec.n_heads, spec.n_kv_heads)
        return Block(
            attn_norm=attn_norm,
            qkv=linear(*family.qkv, order=order),
            head_norms=head_norms,
            attn_output=linear(family.attn_output),
            post_attn_norm=norm(family.post_attn_norm),
            mlp_norm=mlp_norm,
            mlp_input=linear(*family.mlp_input),
            mlp_output=linear(family.mlp_output, input_major=True),
            post_mlp_norm=norm(family.post_mlp_norm),
        )

    def _linear(self, paths: list[str], order: NDArray[np.int64] | None, *, input_major: bool) -> Linear:
        """Puts the outputs of the modules at `paths` one above the other, and reorders them by `order`."""
        parts = [self._part(f"{path}.weight") for path in paths]
        bias = self._bias(tuple(paths))
        if order is not None:
            (part,) = parts
            parts = [part.reordered(order)]
            bias = None if bias is None else bias[torch.from_numpy(order)]
        return self._product(self._weight(StoredMatrix(tuple(parts))), bias, input_major=input_major)

    def _part(self, name: str) -> Part:
        tensor = self.tensors[name]
        transposed = self.spec.family.transposed and self.tensors.products_transposed
        return self._in_blocks(name, tensor.transposed() if transposed else tensor.part())

    def _in_blocks(self, name: str, part: Part, *, is_end: bool = False) -> Part:
        """Returns a matrix as the quantizer leaves it."""
        if self.quantizer is None:
            return part
        (quantized,) = self.quantizer.matrix(name, StoredMatrix((part,)), is_end=is_end).parts
        return quantized

    def _bias(self, paths: tuple[str, ...]) -> Tensor | None:
        if f"{paths[0]}.bias" not in self.parameters.shapes:
            return None
        return self._tensor(torch.cat([self.tensors[f"{path}.bias"].dense() for path in paths]))

    def _weight(self, matrix: StoredMatrix) -> Tensor | StoredMatrix:
        stays_stored = torch.device(self.device).type == "cpu" and self.dtype == torch.float32
        if stays_stored and not self.use_codes:
            return StoredMatrix.of(matrix.dense())
        return matrix if stays_stored else self._tensor(matrix.dense())

    def _product(self, weight: Tensor | StoredMatrix, bias: Tensor | None, *, input_major: bool = False) -> Linear:
        return Linear(weight, bias, input_major=input_major, batch_invariant=self.batch_invariant)

    def _norm(self, path: str) -> Norm:
        kind, d_model = self.spec.family.norm, self.spec.d_model
        if kind is not NormKind.LAYER:
            weight = self.tensors[f"{path}.weight"].dense()
            if kind is NormKind.RMS_ONE_PLUS:
                weight = weight + 1.0
            return Norm(self._tensor(weight), None, self.spec.eps)
        weight, bias = torch.ones(d_model), torch.zeros(d_model)
        if f"{path}.weight" in self.parameters.shapes:
            weight, bias = (self.tensors[f"{path}.{part}"].dense() for part in ("weight", "bias"))
        return Norm(self._tensor(weight), self._tensor(bias), self.spec.eps)

    def _tensor(self, value: Tensor) -> Tensor:
        return value.detach().to(device=self.device, dtype=self.dtype).contiguous()

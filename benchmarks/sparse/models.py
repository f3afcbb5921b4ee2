"""The models that benchmarks/sparse runs on: the embedded one, and random weights of other shapes."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from patchclamp_server.model.load import load_model
from patchclamp_server.model.progress import RichProgress
from patchclamp_server.model.weights import decoder_from_transformers
from patchclamp_server.sparsity.mlp import SparseModel


def embedded_model() -> tuple[Callable[[str], Sequence[int]], SparseModel]:
    """Its tokenizer, and the model."""
    with RichProgress() as progress:
        loaded = load_model(progress=progress)

    def tokenize(text: str) -> list[int]:
        ids: list[int] = loaded.tokenizer(text).input_ids
        return ids

    return tokenize, SparseModel(loaded.info.fingerprint, loaded.decoder)


def random_model(
    d_model: int, d_ff: int, *, n_layers: int = 1, dtype: torch.dtype = torch.float32, four_bits: bool = False
) -> SparseModel:
    """A llama of random weights: `four_bits` are found again by cpu/quantized.py."""
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=d_model,
        intermediate_size=d_ff,
        num_hidden_layers=n_layers,
        num_attention_heads=d_model // 32,
        num_key_value_heads=d_model // 32,
        max_position_embeddings=512,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    if four_bits:
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.data = _four_bits(parameter.data)
    return SparseModel("random weights", decoder_from_transformers(model, dtype=dtype, device="cpu"))


def _four_bits(weight: Tensor) -> Tensor:
    """The nearest matrix whose groups of 32 inputs have 16 values between their least and their largest."""
    groups = weight.view(len(weight), -1, 32)
    low, high = groups.amin(2, keepdim=True), groups.amax(2, keepdim=True)
    step = (high - low) / 15
    return (((groups - low) / step).round() * step + low).view_as(weight)

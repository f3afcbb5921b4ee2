"""The models that benchmarks/sparse runs on: the embedded one, and random weights of other shapes."""

from dataclasses import replace

import torch
from gguf import GGMLQuantizationType, quantize
from tokenizers import Tokenizer, decoders, models
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from patchclamp_server.cpu.stored import Format
from patchclamp_server.model.file_tensors import FileTensor, tensors_of
from patchclamp_server.model.info import ModelInfo
from patchclamp_server.model.load import LoadedModel, load_model
from patchclamp_server.model.progress import RichProgress
from patchclamp_server.model.weights import decoder_of
from patchclamp_server.sparsity.mlp import SparseModel

WORDS = 256


def embedded_model() -> LoadedModel:
    with RichProgress() as progress:
        return load_model(progress=progress)


def random_loaded_model(d_model: int, d_ff: int, *, n_layers: int) -> LoadedModel:
    """`random_model` as an engine takes it."""
    model = random_model(d_model, d_ff, n_layers=n_layers)
    spec = model.spec
    info = ModelInfo(
        name="random weights",
        fingerprint=model.fingerprint,
        architecture=spec.architecture,
        n_layers=spec.n_layers,
        d_model=spec.d_model,
        d_ff=spec.d_ff,
        n_heads=spec.n_heads,
        n_kv_heads=spec.n_kv_heads,
        head_dim=spec.head_dim,
        vocab_size=spec.vocab_size,
        context_length=spec.context_length,
        dtype="float32",
        device="cpu",
        sites=dict(spec.sites),
    )
    backend = Tokenizer(models.WordLevel(vocab={f"word{i}": i for i in range(WORDS)}, unk_token="word0"))
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)  # type: ignore[no-untyped-call]
    return LoadedModel(info, model.decoder, tokenizer, eos_token_ids=frozenset())


def random_model(
    d_model: int, d_ff: int, *, n_layers: int = 1, dtype: torch.dtype = torch.float32, four_bits: bool = False
) -> SparseModel:
    """A llama of random weights, whose matrices have `four_bits` as Q4_1 has them."""
    config = LlamaConfig(
        vocab_size=WORDS,
        hidden_size=d_model,
        intermediate_size=d_ff,
        num_hidden_layers=n_layers,
        num_attention_heads=d_model // 32,
        num_key_value_heads=d_model // 32,
        max_position_embeddings=512,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    tensors = tensors_of(model)
    if four_bits:
        tensors = replace(tensors, tensors={name: _four_bits(own) for name, own in tensors.tensors.items()})
    return SparseModel("random weights", decoder_of(model.config, tensors, dtype=dtype, device="cpu"))


def _four_bits(tensor: FileTensor) -> FileTensor:
    if len(tensor.shape) != 2:
        return tensor
    blocks = quantize(tensor.dense().numpy(), GGMLQuantizationType.Q4_1)
    return FileTensor(Format.Q4_1, tensor.shape, blocks.reshape(-1))

"""Decoders of random weights, generated where they run, and a tokenizer of the size of their vocabulary."""

import math
from functools import cache
from itertools import islice, product

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, PreTrainedConfig, PreTrainedTokenizerFast, Qwen3Config

from gpu.setting import Shape

CONFIGS = {"llama": LlamaConfig, "qwen3": Qwen3Config}
EPS = {"llama": 1e-5, "qwen3": 1e-6}


def config_of(shape: Shape) -> PreTrainedConfig:
    return CONFIGS[shape.architecture](
        vocab_size=shape.vocab_size,
        hidden_size=shape.d_model,
        intermediate_size=shape.d_ff,
        num_hidden_layers=shape.n_layers,
        num_attention_heads=shape.n_heads,
        num_key_value_heads=shape.n_kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=shape.context_length,
        rms_norm_eps=EPS[shape.architecture],
        rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
        tie_word_embeddings=shape.tied,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )


def rotary_table(shape: Shape, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and signed sin [context, head_dim]: rotate_half's sign is in the first half of the sine."""
    exponent = torch.arange(0, shape.head_dim, 2, dtype=torch.float64) / shape.head_dim
    angle = torch.arange(shape.context_length, dtype=torch.float64)[:, None] * shape.rope_theta**-exponent
    cos, sin = torch.cat((angle.cos(), angle.cos()), 1), torch.cat((-angle.sin(), angle.sin()), 1)
    return cos.to(device, dtype), sin.to(device, dtype)


def random_decoder(shape: Shape, dtype: torch.dtype, device: torch.device):
    """A Decoder of weights of variance 1 / inputs: activations neither vanish nor overflow."""
    from patchclamp_server.cpu.linear import Linear
    from patchclamp_server.model.decoder import Block, Decoder
    from patchclamp_server.model.embedding import Embedding
    from patchclamp_server.model.row_operators import HeadNorms, Norm
    from patchclamp_server.model.spec import read_spec

    torch.manual_seed(0)
    spec = read_spec(config_of(shape))

    def matrix(rows: int, columns: int, gain: float = 1.0) -> Tensor:
        return torch.empty(rows, columns, dtype=dtype, device=device).normal_(0.0, gain / math.sqrt(columns))

    def norm(width: int) -> Norm:
        return Norm(torch.ones(width, dtype=dtype, device=device), None, spec.eps)

    def head_norms() -> HeadNorms:
        return HeadNorms.of(norm(shape.head_dim), norm(shape.head_dim), shape.n_heads, shape.n_kv_heads)

    heads = shape.n_heads * shape.head_dim
    blocks = [
        Block(
            attn_norm=norm(shape.d_model),
            qkv=Linear(matrix(heads + 2 * shape.n_kv_heads * shape.head_dim, shape.d_model), None),
            head_norms=head_norms() if shape.qk_norm else None,
            attn_output=Linear(matrix(shape.d_model, heads), None),
            post_attn_norm=None,
            mlp_norm=norm(shape.d_model),
            mlp_input=Linear(matrix(2 * shape.d_ff, shape.d_model), None),
            mlp_output=Linear(matrix(shape.d_model, shape.d_ff), None, input_major=True),
            post_mlp_norm=None,
        )
        for _ in range(shape.n_layers)
    ]
    embedding = matrix(shape.vocab_size, shape.d_model, gain=math.sqrt(shape.d_model))
    unembedding = embedding if shape.tied else matrix(shape.vocab_size, shape.d_model)
    rotary = {"": rotary_table(shape, dtype, device)}
    return Decoder(spec, Embedding(embedding), None, rotary, blocks, norm(shape.d_model), Linear(unembedding, None))


def loaded_model(shape: Shape, dtype: torch.dtype, device: torch.device):
    """What the engine is given, without a file."""
    from patchclamp_server.model.load import LoadedModel

    decoder = random_decoder(shape, dtype, device)
    return LoadedModel(model_info(shape, dtype, device), decoder, tokenizer(shape.vocab_size), frozenset())


def model_info(shape: Shape, dtype: torch.dtype, device: torch.device):
    from patchclamp_server.model.architectures import FAMILIES, site_widths
    from patchclamp_server.model.info import ModelInfo

    return ModelInfo(
        name=shape.name,
        fingerprint="random",
        architecture=shape.architecture,
        n_layers=shape.n_layers,
        d_model=shape.d_model,
        d_ff=shape.d_ff,
        n_heads=shape.n_heads,
        n_kv_heads=shape.n_kv_heads,
        head_dim=shape.head_dim,
        vocab_size=shape.vocab_size,
        context_length=shape.context_length,
        dtype=str(dtype).removeprefix("torch."),
        device=str(device),
        sites=site_widths(
            d_model=shape.d_model,
            d_ff=shape.d_ff,
            n_heads=shape.n_heads,
            head_dim=shape.head_dim,
            gated=FAMILIES[shape.architecture].gated,
            parallel_residual=False,
        ),
    )


@cache
def tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level, with a text of one to three characters for every id."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    texts = ("".join(letters) for length in (1, 2, 3) for letters in product(alphabet, repeat=length))
    vocabulary = {text: id for id, text in enumerate(islice(texts, vocab_size))}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend)

"""This module turns what a GGUF file says of its model into a configuration of transformers.

transformers itself reads some keys and silently ignores the rest: scalings, soft caps, windows, scales of attention.
Here every key is mapped, or known to change nothing (metadata.py), or refused by its name.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig

from patchclamp_server.model.config_classes import config_class
from patchclamp_server.model.errors import ModelSourceError
from patchclamp_server.model.gguf.metadata import Metadata
from patchclamp_server.model.gguf.rope import DEFAULT_BASE, rope_parameters

# These map a key of the file to a key of the configuration. All of them are required.
_SHAPES = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
_SHAPES_OF_GPT2 = {
    "context_length": "n_positions",
    "embedding_length": "n_embd",
    "block_count": "n_layer",
    "feed_forward_length": "n_inner",
    "attention.head_count": "n_head",
    "attention.layer_norm_epsilon": "layer_norm_epsilon",
}
# These map the name of a special token in the file to its name in the configuration.
_TOKENS = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}
Fields = dict[str, Any]


@dataclass(frozen=True)
class GgufFamily:
    """`extra` takes what only this family has. `biases`: configuration key -> tensor of block 0 that decides it."""

    model_type: str
    extra: Callable[[Metadata, Fields], None] = lambda metadata, fields: None
    biases: tuple[tuple[str, str], ...] = ()
    partial_rotary: bool = False
    reads_factors: bool = False


def gguf_config(metadata: Metadata) -> PreTrainedConfig:
    """Takes from `metadata` what it reads, tensors of rotary factors too, and leaves the other tensors."""
    family = FAMILIES.get(metadata.architecture)
    if family is None:
        known = ", ".join(FAMILIES)
        raise ModelSourceError(f"{metadata.path}: architecture {metadata.architecture!r} is not supported: {known}")
    fields: Fields = {
        "vocab_size": _vocabulary(metadata),
        "tie_word_embeddings": "output.weight" not in metadata.entries,
    }
    # The defaults of the configuration class would be a guess.
    fields |= dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    fields |= {f"{_TOKENS[kind]}_token_id": token for kind, token in metadata.special_tokens.items() if kind in _TOKENS}
    if family.model_type == "gpt2":
        fields |= {name: metadata.need(key) for key, name in _SHAPES_OF_GPT2.items()}
        if metadata.take("attention.head_count_kv", fields["n_head"]) != fields["n_head"]:
            raise metadata.refusal("attention.head_count_kv", "fewer than the heads is not supported")
    else:
        fields |= {name: metadata.need(key) for key, name in _SHAPES.items()}
        _add_attention(metadata, fields, family)
    layers = fields["n_layer" if family.model_type == "gpt2" else "num_hidden_layers"]
    # What follows makes lists of layers, however many a damaged file says it has.
    if type(layers) is not int or not 0 < layers <= len(metadata.entries):
        raise metadata.refusal(
            "block_count", f"{layers} is not supported: the file has {len(metadata.entries)} tensors"
        )
    family.extra(metadata, fields)
    for name, tensor in family.biases:
        if f"blk.0.{tensor}" in metadata.entries:
            fields[name] = True
    metadata.refuse_rest()
    return config_class(family.model_type)(**fields)


def _vocabulary(metadata: Metadata) -> int:
    embedding = "token_embd.weight"
    if embedding not in metadata.entries:
        raise ModelSourceError(f"{metadata.path} lacks the tensor {embedding}")
    rows = metadata.shape(embedding)[0]
    named = metadata.take("vocab_size", rows)
    if named != rows or metadata.n_tokens > rows:
        raise ModelSourceError(
            f"{metadata.path}: {embedding} has {rows} rows for {metadata.n_tokens} tokens and vocab_size {named}"
        )
    return rows


def _add_attention(metadata: Metadata, fields: Fields, family: GgufFamily) -> None:
    heads = int(fields["num_attention_heads"])
    fields["num_key_value_heads"] = metadata.take("attention.head_count_kv", heads)
    usual = int(fields["hidden_size"]) // max(heads, 1)
    head_dim = int(metadata.take("attention.key_length", usual))
    if (values := metadata.take("attention.value_length", head_dim)) != head_dim:
        raise metadata.refusal("attention.value_length", f"{values} is not supported beside keys of {head_dim}")
    # Qwen2 and Phi-3 have no such field and use the usual value.
    if head_dim != usual or family.model_type not in ("qwen2", "phi3"):
        fields["head_dim"] = head_dim
    rotary_dim = int(metadata.take("rope.dimension_count", head_dim))
    if rotary_dim != head_dim and not family.partial_rotary:
        raise metadata.refusal("rope.dimension_count", f"{rotary_dim} of {head_dim} is not supported")
    parameters = rope_parameters(
        metadata,
        rotary_dim=rotary_dim,
        context=int(fields["max_position_embeddings"]),
        reads_factors=family.reads_factors,
    )
    if rotary_dim != head_dim:
        parameters["partial_rotary_factor"] = rotary_dim / head_dim
    fields["rope_parameters"] = parameters
    scale = float(metadata.take("attention.scale") or 0.0)
    if not scale:
        return
    if family.model_type.startswith("gemma"):
        # The scalar is a whole number d, and the file has 1/sqrt(d) rounded to float32.
        fields["query_pre_attn_scalar"] = round(scale**-2)
        usual_scale = fields["query_pre_attn_scalar"] ** -0.5
    else:
        usual_scale = head_dim**-0.5
    if abs(scale - usual_scale) > 1e-6:
        raise metadata.refusal("attention.scale", f"{scale} is not supported: 1/sqrt(head_dim)")


def _add_window(metadata: Metadata, fields: Fields) -> None:
    fields["sliding_window"] = metadata.take("attention.sliding_window") or None


def _phi3(metadata: Metadata, fields: Fields) -> None:
    _add_window(metadata, fields)
    original = fields["rope_parameters"].get("original_max_position_embeddings")
    # transformers reads this beside the parameters.
    fields["original_max_position_embeddings"] = original or fields["max_position_embeddings"]


def _gemma2(metadata: Metadata, fields: Fields) -> None:
    # Every second layer attends to the whole context; the defaults are those of llama.cpp.
    _add_gemma_attention(metadata, fields, pattern=2, window=4096, wide=46)
    fields["attn_logit_softcapping"] = metadata.take("attn_logit_softcapping", 50.0) or None
    fields["final_logit_softcapping"] = metadata.take("final_logit_softcapping", 30.0) or None


def _gemma3(metadata: Metadata, fields: Fields) -> None:
    _add_gemma_attention(metadata, fields, pattern=6, window=0, wide=62)
    fields["final_logit_softcapping"] = metadata.take("final_logit_softcapping") or None
    # Layers with a window have a rotary base of their own, and no scaling.
    local = metadata.take("rope.freq_base_swa", DEFAULT_BASE)
    if (swa := metadata.take("rope.dimension_count_swa", fields["head_dim"])) != fields["head_dim"]:
        raise metadata.refusal("rope.dimension_count_swa", f"{swa} is not supported")
    fields["rope_parameters"] = {
        "full_attention": fields["rope_parameters"],
        "sliding_attention": {"rope_type": "default", "rope_theta": local},
    }


def _add_gemma_attention(metadata: Metadata, fields: Fields, *, pattern: int, window: int, wide: int) -> None:
    """Sets the layers with a window, and attention's scale, which differs in the largest model (`wide` layers)."""
    n_layers = int(fields["num_hidden_layers"])
    fields["sliding_window"] = metadata.take("attention.sliding_window", window) or None
    given = metadata.take_list("attention.sliding_window_pattern")
    if isinstance(given, list):
        if len(given) != n_layers:
            raise metadata.refusal("attention.sliding_window_pattern", f"has {len(given)} of {n_layers} layers")
        local = [bool(one) for one in given]
    else:
        period = int(given or pattern)
        local = [layer % period < period - 1 for layer in range(n_layers)]
    has_window = fields["sliding_window"] is not None
    fields["layer_types"] = ["sliding_attention" if one and has_window else "full_attention" for one in local]
    width = int(fields["hidden_size"]) // int(fields["num_attention_heads"])
    fields.setdefault("query_pre_attn_scalar", width if n_layers == wide else fields["head_dim"])


_ATTENTION_BIAS = (("attention_bias", "attn_q.bias"),)

FAMILIES: dict[str, GgufFamily] = {
    "llama": GgufFamily("llama", biases=(*_ATTENTION_BIAS, ("mlp_bias", "ffn_up.bias")), reads_factors=True),
    "qwen2": GgufFamily("qwen2"),
    "qwen3": GgufFamily("qwen3", biases=_ATTENTION_BIAS),
    "gemma2": GgufFamily("gemma2", _gemma2, biases=_ATTENTION_BIAS),
    "gemma3": GgufFamily("gemma3_text", _gemma3, biases=_ATTENTION_BIAS),
    "phi3": GgufFamily("phi3", _phi3, partial_rotary=True, reads_factors=True),
    "gpt2": GgufFamily("gpt2"),
}

"""One tiny random model for each family: float32, three layers, weights chosen so that nothing is degenerate.

Every linear map keeps the scale of its input, norm weights differ from one and biases from zero, so an edit that is
lost, doubled or applied at the wrong place changes the logits by far more than the tolerance of any test.
"""

from functools import cache
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

LAYERS = 3
VOCAB = 256
WINDOW = 12
CONTEXT = 640

_LLAMA_LIKE = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
    "tie_word_embeddings": False,
}

# Family (the `model_type` of its configuration, but for gemma3) -> what differs from the defaults of the family.
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "llama": {**_LLAMA_LIKE, "attention_bias": True, "mlp_bias": True},
    "mistral": {**_LLAMA_LIKE, "sliding_window": WINDOW, "head_dim": 16},
    "qwen2": {**_LLAMA_LIKE, "use_sliding_window": False},
    "qwen3": {**_LLAMA_LIKE, "head_dim": 16},
    "gemma2": {
        **_LLAMA_LIKE,
        "head_dim": 16,
        "query_pre_attn_scalar": 24,
        "sliding_window": WINDOW,
        "attn_logit_softcapping": 3.0,
        "final_logit_softcapping": 1.5,
        "tie_word_embeddings": True,
    },
    "gemma3": {
        **_LLAMA_LIKE,
        "head_dim": 16,
        "query_pre_attn_scalar": 24,
        "sliding_window": WINDOW,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "tie_word_embeddings": True,
    },
    "gpt2": {
        "vocab_size": VOCAB,
        "n_positions": CONTEXT,
        "n_embd": 48,
        "n_inner": 80,
        "n_layer": LAYERS,
        "n_head": 4,
        "bos_token_id": 0,
        "eos_token_id": 1,
    },
    "opt": {
        "vocab_size": VOCAB,
        "hidden_size": 48,
        "word_embed_proj_dim": 48,
        "ffn_dim": 80,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "max_position_embeddings": CONTEXT,
        "do_layer_norm_before": True,
        "activation_function": "relu",
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
    },
    "gpt_neox": {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 80,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "max_position_embeddings": CONTEXT,
        "rotary_pct": 0.25,
        "use_parallel_residual": True,
        "bos_token_id": 0,
        "eos_token_id": 1,
    },
    "phi3": {**_LLAMA_LIKE, "sliding_window": WINDOW, "hidden_size": 64},
}
FAMILIES = tuple(CONFIGURATIONS)
# Seeds with which a model with tied embeddings does not repeat one token for ever.
_SEEDS = {"gemma2": 6, "gemma3": 2}


@cache
def tiny_model(family: str, **other: int) -> PreTrainedModel:
    """The tiny model of a family, with eager attention; the same object at every call, so do not change it.

    `other` replaces sizes of its configuration.
    """
    model_type = "gemma3_text" if family == "gemma3" else family
    config = CONFIG_MAPPING[model_type](**{**CONFIGURATIONS[family], **other})
    model: PreTrainedModel = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
        config, attn_implementation="eager", dtype=torch.float32
    )
    _randomise(model, torch.Generator().manual_seed(_SEEDS.get(family, 100)))
    model.train(False)
    return model


@torch.no_grad()
def _randomise(model: PreTrainedModel, generator: torch.Generator) -> None:
    def normal(like: torch.Tensor, std: float) -> torch.Tensor:
        return std * torch.randn(like.shape, generator=generator)

    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if isinstance(module, nn.Embedding):
                # Gemma multiplies by sqrt(d): a small table keeps what the blocks add visible beside the embedding.
                parameter.copy_(normal(parameter, 1.0 / float(getattr(module, "scalar_embed_scale", 1.0))))
            elif parameter.ndim == 2:
                # GPT-2's Conv1D stores [in, out].
                fan_in = parameter.shape[0] if type(module).__name__ == "Conv1D" else parameter.shape[1]
                # A large tied unembedding would repeat the last token for ever.
                gain = 0.5 if path == "lm_head" and model.config.tie_word_embeddings else 1.5
                parameter.copy_(normal(parameter, gain * float(fan_in) ** -0.5))
            elif name == "weight":
                # Gemma's norms multiply by 1 + weight, the others by weight; those after a block are made strong.
                centre = 0.0 if "Gemma" in type(module).__name__ and "post_" not in path else 1.0
                parameter.copy_(centre + normal(parameter, 0.2))
            else:
                parameter.copy_(normal(parameter, 0.2))
    model.tie_weights()

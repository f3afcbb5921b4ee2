"""A spec says what a decoder computes, read from a transformers configuration and the architecture table."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig

from patchclamp_server.errors import FailedPrecondition
from patchclamp_server.model.architectures import FAMILIES, Family, site_widths
from patchclamp_server.model.sites import Site

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "relu": "relu",
    # This is one formula under three names: 0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))).
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
# The frequencies of these do not depend on the length of the running sequence, within `_context_length`.
ROTARY_SCALINGS = frozenset({"default", "linear", "yarn", "llama3", "longrope"})


@dataclass(frozen=True)
class DecoderSpec:
    """Shapes and constants of a decoder. A window or soft cap of 0 means none."""

    architecture: str
    n_layers: int
    d_model: int
    d_ff: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    vocab_size: int
    context_length: int
    eps: float
    activation: str
    attention_scale: float
    attention_soft_cap: float
    final_soft_cap: float
    embedding_scale: float
    parallel_residual: bool
    # This is the sliding window of each layer.
    windows: tuple[int, ...]
    # This names the rotary table of each layer ("" when the family has one).
    rotary_kinds: tuple[str, ...]
    sites: dict[Site, int]

    @property
    def family(self) -> Family:
        return FAMILIES[self.architecture]


def read_spec(config: PreTrainedConfig) -> DecoderSpec:
    """Reads the spec. Raises FailedPrecondition for a family or a variant that is not in the table."""
    config = config.get_text_config()
    architecture: str = config.model_type
    family = FAMILIES.get(architecture)
    if family is None:
        raise FailedPrecondition("model", f"architecture {architecture!r} is not supported: {', '.join(FAMILIES)}")
    for key, wanted in family.requires:
        if getattr(config, key, wanted) != wanted:
            raise FailedPrecondition("model", f"{architecture} with {key}={getattr(config, key)!r} is not supported")
    d_model: int = config.hidden_size
    if getattr(config, "word_embed_proj_dim", d_model) != d_model:
        raise FailedPrecondition("model", f"{architecture} with projected word embeddings is not supported")
    n_heads: int = config.num_attention_heads
    given: int | None = getattr(config, "head_dim", None)
    head_dim = d_model // n_heads if given is None else given
    n_layers: int = config.num_hidden_layers
    d_ff: int = _first(config, ("intermediate_size", "n_inner", "ffn_dim")) or 4 * d_model
    activation = ACTIVATIONS.get(getattr(config, family.activation_key))
    if activation is None:
        raise FailedPrecondition("model", f"activation {getattr(config, family.activation_key)!r} is not supported")
    n_kv_heads: int = getattr(config, "num_key_value_heads", None) or n_heads
    context_length = _context_length(config)
    sizes = {
        "channels": d_model,
        "layers": n_layers,
        "heads": n_heads,
        "key-value heads": n_kv_heads,
        "channels of a head": head_dim,
        "neurons": d_ff,
        "positions": context_length,
    }
    for name, size in sizes.items():
        if size < 1:
            raise FailedPrecondition("model", f"{architecture} with {size} {name} is not supported")
    for name, value, least in _constants(config, family):
        if not least <= value < math.inf:
            raise FailedPrecondition("model", f"{architecture} with {name}={value} is not supported")
    if n_heads % n_kv_heads:
        raise FailedPrecondition("model", f"{n_heads} heads cannot share {n_kv_heads} key-value heads")
    parallel = architecture == "gpt_neox" and bool(config.use_parallel_residual)
    scalar = getattr(config, "query_pre_attn_scalar", None)
    return DecoderSpec(
        architecture=architecture,
        n_layers=n_layers,
        d_model=d_model,
        d_ff=d_ff,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        vocab_size=config.vocab_size,
        context_length=context_length,
        eps=float(getattr(config, family.eps_key)) if family.eps_key else 1e-5,
        activation=activation,
        attention_scale=float(scalar if scalar else head_dim) ** -0.5,
        attention_soft_cap=_soft_cap(config, family, "attn_logit_softcapping"),
        final_soft_cap=float(getattr(config, "final_logit_softcapping", None) or 0.0),
        embedding_scale=d_model**0.5 if family.scale_embedding else 1.0,
        parallel_residual=parallel,
        windows=_windows(config, n_layers),
        rotary_kinds=_rotary_kinds(config, n_layers),
        sites=site_widths(
            d_model=d_model,
            d_ff=d_ff,
            n_heads=n_heads,
            head_dim=head_dim,
            gated=family.gated,
            parallel_residual=parallel,
        ),
    )


def _constants(config: Any, family: Family) -> Iterator[tuple[str, float, float]]:
    """Yields the constants that are numbers, by the keys of the configuration, with the least that each may be."""
    keys = ["attn_logit_softcapping", "final_logit_softcapping", "query_pre_attn_scalar", "sliding_window"]
    for key in [*keys, *([family.eps_key] if family.eps_key else [])]:
        yield key, float(getattr(config, key, None) or 0.0), 0.0
    for parameters in _rotary_parameters(config).values():
        for key, value in parameters.items():
            if isinstance(value, int | float):
                yield key, float(value), -math.inf


def _first(config: Any, keys: tuple[str, ...]) -> int | None:
    return next((value for key in keys if (value := getattr(config, key, None))), None)


def _soft_cap(config: Any, family: Family, key: str) -> float:
    # gemma3 keeps the key of gemma2 and does not use it.
    return float(getattr(config, key, None) or 0.0) if family.has_soft_caps else 0.0


def _windows(config: Any, n_layers: int) -> tuple[int, ...]:
    window = int(getattr(config, "sliding_window", None) or 0)
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        return (window,) * n_layers
    return tuple(window if kind == "sliding_attention" else 0 for kind in kinds)


def _rotary_parameters(config: Any) -> dict[str, dict[str, Any]]:
    """Returns rotary parameters by kind of layer; the key is "" where all layers share one set."""
    parameters = getattr(config, "rope_parameters", None) or {}
    if parameters and all(isinstance(value, dict) for value in parameters.values()):
        return dict(parameters)
    return {"": parameters} if parameters else {}


def _rotary_kinds(config: Any, n_layers: int) -> tuple[str, ...]:
    if "" in _rotary_parameters(config) or not _rotary_parameters(config):
        return ("",) * n_layers
    return tuple(config.layer_types)


def _context_length(config: Any) -> int:
    """Returns the positions that one rotary table describes. Raises FailedPrecondition for a scaling without one.

    LongRoPE has frequencies for contexts up to the training length, and others for longer ones, which would rotate
    every token anew. The context of the first is served, unless both are the same (as for Llama 3's factors from GGUF).
    """
    length: int = config.max_position_embeddings
    for parameters in _rotary_parameters(config).values():
        kind = parameters.get("rope_type", "default")
        if kind not in ROTARY_SCALINGS:
            raise FailedPrecondition(
                "model", f"rotary scaling {kind!r} is not supported: {', '.join(sorted(ROTARY_SCALINGS))}"
            )
        if kind == "longrope" and parameters["short_factor"] != parameters["long_factor"]:
            length = min(length, parameters["original_max_position_embeddings"])
    return length

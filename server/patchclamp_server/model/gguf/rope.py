"""This module turns the rotary scaling of a GGUF file into rotary parameters of transformers.

    frequency_i = base^(-2i/d) · scale_i                cos and sin are multiplied by an attention factor

Names and defaults are those of llama.cpp: a factor without a type is linear; YaRN multiplies the attention factor by
1 + ln(factor) / 10. Factors computed at conversion are tensors: `rope_freqs.weight` (Llama 3: frequencies are divided
by it), `rope_factors_short.weight` and `rope_factors_long.weight` (Phi-3: by one of them, see model/spec.py).
"""

import math
from typing import Any

from patchclamp_server.model.errors import ModelSourceError
from patchclamp_server.model.gguf.metadata import Metadata

LLAMA3_FACTORS = "rope_freqs.weight"
SHORT_FACTORS, LONG_FACTORS = "rope_factors_short.weight", "rope_factors_long.weight"
DEFAULT_BASE = 10000.0


def rope_parameters(metadata: Metadata, *, rotary_dim: int, context: int, reads_factors: bool) -> dict[str, Any]:
    """Returns rotary parameters of all layers, or of those without a window; takes the keys and tensors it reads.

    Raises ModelSourceError for a scaling that transformers has no equivalent of.
    """
    base = metadata.take("rope.freq_base", DEFAULT_BASE)
    if not base > 0:
        raise metadata.refusal("rope.freq_base", f"{base} is not supported: above 0")
    parameters: dict[str, Any] = {"rope_type": "default", "rope_theta": base}
    factor = float(metadata.take("rope.scaling.factor") or metadata.take("rope.scale_linear") or 1.0)
    kind = str(metadata.take("rope.scaling.type", "linear"))
    # This key matters only for YaRN and factors, but files without a scaling have it too.
    original = int(metadata.take("rope.scaling.original_context_length") or context)
    attention = float(metadata.take("rope.scaling.attn_factor", 1.0))
    factors = _factors(metadata, rotary_dim) if reads_factors else None
    if factors is not None:
        if factor != 1.0:
            raise metadata.refusal("rope.scaling.factor", f"{factor} beside tensors of factors is not supported")
        short, long = factors
        parameters |= {"rope_type": "longrope", "short_factor": short, "long_factor": long}
        return parameters | {"attention_factor": attention, "original_max_position_embeddings": original}
    if kind == "yarn":
        attention *= float(metadata.take("rope.scaling.yarn_attn_factor", 1.0))
        parameters |= {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
        parameters["beta_fast"] = metadata.take("rope.scaling.yarn_beta_fast", 32.0)
        parameters["beta_slow"] = metadata.take("rope.scaling.yarn_beta_slow", 1.0)
        return parameters | {"attention_factor": attention * (0.1 * math.log(factor) + 1.0)}
    if kind not in ("none", "linear"):
        raise metadata.refusal("rope.scaling.type", f"{kind!r} is not supported: none, linear, yarn")
    if attention != 1.0:
        raise metadata.refusal("rope.scaling.attn_factor", f"{attention} is not supported without yarn or factors")
    if kind == "linear" and factor != 1.0:
        parameters |= {"rope_type": "linear", "factor": factor}
    return parameters


def _factors(metadata: Metadata, rotary_dim: int) -> tuple[list[float], list[float]] | None:
    """Returns what frequencies are divided by in a short and in a long context; None where the file does not say."""
    names = [name for name in (LLAMA3_FACTORS, SHORT_FACTORS, LONG_FACTORS) if name in metadata.entries]
    if not names:
        return None
    if names not in ([LLAMA3_FACTORS], [SHORT_FACTORS, LONG_FACTORS]):
        raise ModelSourceError(f"{metadata.path} has {', '.join(names)}, which do not go together")
    values = []
    for name in names:
        if metadata.shape(name) != (rotary_dim // 2,):
            shape = list(metadata.shape(name))
            raise ModelSourceError(f"{metadata.path}: {name} has shape {shape}, expected [{rotary_dim // 2}]")
        values.append([float(factor) for factor in metadata.floats(name)])
        del metadata.entries[name]
    return values[0], values[-1]

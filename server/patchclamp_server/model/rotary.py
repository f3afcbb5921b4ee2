"""Rotary tables by position, computed as the rotary modules of all families compute them in transformers.

    angle[p, i] = p · f_i,  f_i = base^(-2i/d) where nothing is scaled;  cos and sin are multiplied by a factor

transformers' own functions say what each kind of scaling makes of the frequencies and of the factor.
"""

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from patchclamp_server.model.spec import DecoderSpec

Table = tuple[Tensor, Tensor]


def rotary_tables(config: PreTrainedConfig, spec: DecoderSpec) -> dict[str, Table]:
    """Returns cos and signed sin [context, rotary_dim] by the kinds of `spec.rotary_kinds`; none where positions are
    learned. The sign of the first half is that of rotate_half."""
    if spec.family.position_embedding is not None:
        return {}
    return {kind: _table(config.get_text_config(), spec, kind) for kind in sorted(set(spec.rotary_kinds))}


def _table(config: PreTrainedConfig, spec: DecoderSpec, kind: str) -> Table:
    parameters = config.rope_parameters[kind] if kind else config.rope_parameters
    scaling = parameters["rope_type"]
    if scaling == "default":
        rotary_dim = int(spec.head_dim * parameters.get("partial_rotary_factor", 1.0))
        exponents = torch.arange(0, rotary_dim, 2, dtype=torch.float32) / rotary_dim
        frequencies, factor = 1.0 / (parameters["rope_theta"] ** exponents), 1.0
    else:
        frequencies, factor = ROPE_INIT_FUNCTIONS[scaling](config, layer_type=kind or None)
    angles = torch.arange(spec.context_length)[:, None].float() * frequencies
    cos, sin = angles.cos() * factor, angles.sin() * factor
    return torch.cat((cos, cos), dim=1), torch.cat((-sin, sin), dim=1)

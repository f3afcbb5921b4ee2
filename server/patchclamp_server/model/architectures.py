"""The architecture table says where each family keeps its weights, and how its blocks are wired.

Adding a family is adding a row. A family with another wiring of its residual stream says so here (`parallel_residual`,
`post_attn_norm`), and its sites follow from that.
"""

from dataclasses import dataclass, replace
from enum import Enum

from patchclamp_server.model.sites import Site


class NormKind(Enum):
    RMS = "rms"
    # Gemma stores w - 1, so the norm multiplies by 1 + w.
    RMS_ONE_PLUS = "rms_one_plus"
    LAYER = "layer"


class QkvLayout(Enum):
    """Tells how the rows of a fused projection are ordered."""

    # All q heads come first, then all k heads, then all v heads.
    CONCATENATED = "concatenated"
    # q, k, v of head 0 come first, then those of head 1, ... (gpt_neox).
    PER_HEAD = "per_head"


@dataclass(frozen=True)
class Family:
    """Has module paths below the causal-LM model (`layers` to `position_embedding`) and below a block (the rest)."""

    layers: str = "model.layers"
    embedding: str = "model.embed_tokens"
    final_norm: str = "model.norm"
    unembedding: str = "lm_head"
    # A family with learned positions has no rotary embedding.
    position_embedding: str | None = None
    # OPT's table starts with two unused rows.
    position_offset: int = 0

    attn_norm: str = "input_layernorm"
    mlp_norm: str = "post_attention_layernorm"
    # Sandwich norms apply to what attention and MLP add to the residual stream.
    post_attn_norm: str | None = None
    post_mlp_norm: str | None = None
    qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    qkv_layout: QkvLayout = QkvLayout.CONCATENATED
    q_norm: str | None = None
    k_norm: str | None = None
    attn_output: str = "self_attn.o_proj"
    # Gated MLPs have one or two modules (gate rows first), ungated ones have one.
    mlp_input: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    gated: bool = True
    mlp_output: str = "mlp.down_proj"
    # gpt2 stores its matrices [in, out].
    transposed: bool = False
    # Whether products have biases, and layer norms weights and biases, or the configuration key that says so.
    qkv_bias: bool | str = False
    attn_output_bias: bool | str = False
    mlp_bias: bool | str = False
    norm_weights: bool | str = True
    # What old checkpoints call modules, and patterns of their buffers, which are no parameters.
    old_paths: tuple[tuple[str, str], ...] = ()
    old_buffers: tuple[str, ...] = (r"rotary_emb\.inv_freq$",)

    norm: NormKind = NormKind.RMS
    scale_embedding: bool = False
    has_soft_caps: bool = False
    # These are the configuration keys of the activation function and of the norm's epsilon.
    activation_key: str = "hidden_act"
    eps_key: str = "rms_norm_eps"
    # The row describes the model only under these configuration values; anything else is refused.
    requires: tuple[tuple[str, object], ...] = ()


_GEMMA = Family(
    mlp_norm="pre_feedforward_layernorm",
    post_attn_norm="post_attention_layernorm",
    post_mlp_norm="post_feedforward_layernorm",
    norm=NormKind.RMS_ONE_PLUS,
    scale_embedding=True,
    activation_key="hidden_activation",
    qkv_bias="attention_bias",
    attn_output_bias="attention_bias",
)

FAMILIES: dict[str, Family] = {
    "llama": Family(qkv_bias="attention_bias", attn_output_bias="attention_bias", mlp_bias="mlp_bias"),
    "mistral": Family(),
    "qwen2": Family(qkv_bias=True),
    "qwen3": Family(
        q_norm="self_attn.q_norm",
        k_norm="self_attn.k_norm",
        qkv_bias="attention_bias",
        attn_output_bias="attention_bias",
    ),
    "gemma2": replace(_GEMMA, has_soft_caps=True),
    "gemma3_text": replace(
        _GEMMA,
        q_norm="self_attn.q_norm",
        k_norm="self_attn.k_norm",
        requires=(("use_bidirectional_attention", False),),
    ),
    "phi3": Family(qkv=("self_attn.qkv_proj",), mlp_input=("mlp.gate_up_proj",)),
    "gpt2": Family(
        layers="transformer.h",
        embedding="transformer.wte",
        final_norm="transformer.ln_f",
        position_embedding="transformer.wpe",
        attn_norm="ln_1",
        mlp_norm="ln_2",
        qkv=("attn.c_attn",),
        attn_output="attn.c_proj",
        mlp_input=("mlp.c_fc",),
        gated=False,
        mlp_output="mlp.c_proj",
        transposed=True,
        qkv_bias=True,
        attn_output_bias=True,
        mlp_bias=True,
        old_buffers=(r"attn\.(masked_)?bias$",),
        norm=NormKind.LAYER,
        activation_key="activation_function",
        eps_key="layer_norm_epsilon",
        requires=(("scale_attn_weights", True), ("scale_attn_by_inverse_layer_idx", False)),
    ),
    "opt": Family(
        layers="model.decoder.layers",
        embedding="model.decoder.embed_tokens",
        final_norm="model.decoder.final_layer_norm",
        position_embedding="model.decoder.embed_positions",
        position_offset=2,
        attn_norm="self_attn_layer_norm",
        mlp_norm="final_layer_norm",
        attn_output="self_attn.out_proj",
        mlp_input=("fc1",),
        gated=False,
        mlp_output="fc2",
        qkv_bias="enable_bias",
        attn_output_bias="enable_bias",
        mlp_bias="enable_bias",
        norm_weights="layer_norm_elementwise_affine",
        old_buffers=(),
        norm=NormKind.LAYER,
        activation_key="activation_function",
        eps_key="",
        requires=(("do_layer_norm_before", True), ("_remove_final_layer_norm", False)),
    ),
    "gpt_neox": Family(
        layers="gpt_neox.layers",
        embedding="gpt_neox.embed_in",
        final_norm="gpt_neox.final_layer_norm",
        qkv=("attention.query_key_value",),
        qkv_layout=QkvLayout.PER_HEAD,
        attn_output="attention.dense",
        mlp_input=("mlp.dense_h_to_4h",),
        gated=False,
        mlp_output="mlp.dense_4h_to_h",
        qkv_bias="attention_bias",
        attn_output_bias="attention_bias",
        mlp_bias=True,
        old_paths=(("embed_out", "lm_head"),),
        old_buffers=(r"rotary_emb\.inv_freq$", r"attention\.(masked_)?bias$"),
        norm=NormKind.LAYER,
        eps_key="layer_norm_eps",
    ),
}


def site_widths(
    *, d_model: int, d_ff: int, n_heads: int, head_dim: int, gated: bool, parallel_residual: bool
) -> dict[Site, int]:
    """Returns the sites of a model with their widths. A parallel residual stream has none between attention and MLP; an
    MLP without a gate has the pre-activations of `up` alone."""
    widths = {
        Site.RESID_PRE: d_model,
        Site.RESID_MID: d_model,
        Site.RESID_POST: d_model,
        Site.ATTN_Z: n_heads * head_dim,
        Site.ATTN_OUT: d_model,
        Site.MLP_GATE: d_ff,
        Site.MLP_UP: d_ff,
        Site.MLP_POST: d_ff,
        Site.MLP_OUT: d_model,
    }
    if parallel_residual:
        del widths[Site.RESID_MID]
    if not gated:
        del widths[Site.MLP_GATE]
    return widths

"""Where the oracle puts its hooks: a table of module paths for each family, and nothing of the server's own."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import eager_mask

from patchclamp_server.model.sites import Site


@dataclass(frozen=True)
class Family:
    """Where the sites of a family are. Paths are relative to a block, `final_norm` and `blocks` to the model."""

    blocks: str
    final_norm: str
    # Norm whose input is the residual stream between attention and MLP; None where both run in parallel.
    mid_norm: str | None
    o_proj: str
    # Module whose output attention adds to the residual stream.
    attn_out: str
    # Modules whose outputs are gate and up; one that gives both, gates first, or one that is up where there is no gate.
    mlp_input: tuple[str, ...]
    down_proj: str
    # Module whose output the MLP adds to the residual stream.
    mlp_out: str


_LLAMA = Family(
    blocks="model.layers",
    final_norm="model.norm",
    mid_norm="post_attention_layernorm",
    o_proj="self_attn.o_proj",
    attn_out="self_attn",
    mlp_input=("mlp.gate_proj", "mlp.up_proj"),
    down_proj="mlp.down_proj",
    mlp_out="mlp",
)
_GEMMA = Family(
    blocks="model.layers",
    final_norm="model.norm",
    mid_norm="pre_feedforward_layernorm",
    o_proj="self_attn.o_proj",
    attn_out="post_attention_layernorm",
    mlp_input=("mlp.gate_proj", "mlp.up_proj"),
    down_proj="mlp.down_proj",
    mlp_out="post_feedforward_layernorm",
)
_FAMILIES: dict[str, Family] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "phi3": replace(_LLAMA, mlp_input=("mlp.gate_up_proj",)),
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
    "gpt2": Family(
        "transformer.h", "transformer.ln_f", "ln_2", "attn.c_proj", "attn", ("mlp.c_fc",), "mlp.c_proj", "mlp"
    ),
    "opt": Family(
        blocks="model.decoder.layers",
        final_norm="model.decoder.final_layer_norm",
        mid_norm="final_layer_norm",
        o_proj="self_attn.out_proj",
        attn_out="self_attn",
        mlp_input=("fc1",),
        down_proj="fc2",
        mlp_out="fc2",
    ),
    "gpt_neox": Family(
        blocks="gpt_neox.layers",
        final_norm="gpt_neox.final_layer_norm",
        mid_norm=None,
        o_proj="attention.dense",
        attn_out="attention",
        mlp_input=("mlp.dense_h_to_4h",),
        down_proj="mlp.dense_4h_to_h",
        mlp_out="mlp",
    ),
}
_UNGATED = ("gpt2", "opt", "gpt_neox")


def family_of(model: PreTrainedModel) -> Family:
    return _FAMILIES[model.config.model_type]


def logit_lens(model: PreTrainedModel, h: Tensor) -> Tensor:
    """Log-probabilities [vocab] of a residual state [d_model] read by the final norm and the unembedding."""
    family = family_of(model)
    # Hooks sit on blocks only, so these modules can be called in the middle of a pass.
    norm, unembedding = model.get_submodule(family.final_norm), model.get_submodule("lm_head")
    logits = unembedding(norm(h.view(1, 1, -1)))[0, 0]
    cap = getattr(model.config, "final_logit_softcapping", None)
    if cap is not None:
        logits = cap * torch.tanh(logits / cap)
    return torch.log_softmax(logits.double(), dim=-1)


def contributions(model: PreTrainedModel, part: Tensor, end: Tensor) -> Tensor:
    """What a summand [d_model] of the residual stream `end` adds to the logits [vocab], before a soft cap."""
    final, unembedding = model.get_submodule(_family(model).final_norm), model.get_submodule("lm_head")
    return _share(final, part, end) @ unembedding.weight.double().t()  # type: ignore[operator, union-attr]


def neuron_vectors(model: PreTrainedModel, layer: int, neurons: Tensor) -> Tensor:
    """What each neuron adds to the residual stream [d_ff, d_model], given the neurons [d_ff] of a token."""
    family = _family(model)
    block = model.get_submodule(f"{family.blocks}.{layer}")
    down = block.get_submodule(family.down_proj)
    bias = down(torch.zeros_like(neurons))
    added = down(torch.diag(neurons)) - bias
    norm = block.get_submodule(family.mlp_out) if family.mlp_out == "post_feedforward_layernorm" else None
    if norm is None:
        return added
    return torch.stack([_share(norm, row, down(neurons)) for row in added])


def _share(norm: nn.Module, part: Tensor, whole: Tensor) -> Tensor:
    """The norm of the whole is its centred numbers times a scale, which the part has too. float64."""
    part, whole, normed = part.double(), whole.double(), norm(whole[None])[0].double()
    bias = getattr(norm, "bias", None)
    if bias is None:
        return part * (normed / whole)
    return (part - part.mean()) * ((normed - bias.double()) / (whole - whole.mean()))


def _family(model: PreTrainedModel) -> Family:
    return _FAMILIES[model.config.model_type]


Visit = Callable[[Site, int, Tensor], Tensor]


def attach(model: PreTrainedModel, visit: Visit) -> list[Any]:
    """Hooks that pass every site of every block through `visit`, in the order of the forward pass."""
    family = family_of(model)
    hooks: list[Any] = []

    def on_input(module: nn.Module, site: Site, layer: int) -> None:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            return (visit(site, layer, args[0]), *args[1:])

        hooks.append(module.register_forward_pre_hook(hook))

    def on_input_in_place(module: nn.Module, site: Site, layer: int) -> None:
        # The block kept this very tensor as its residual before it called the norm.
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            args[0].copy_(visit(site, layer, args[0]))

        hooks.append(module.register_forward_pre_hook(hook))

    def on_output(module: nn.Module, site: Site, layer: int) -> None:
        def hook(_: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            if isinstance(output, tuple):
                return (visit(site, layer, output[0]), *output[1:])
            return visit(site, layer, output)

        hooks.append(module.register_forward_hook(hook))

    def on_halves(module: nn.Module, layer: int) -> None:
        def hook(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            gate, up = output.chunk(2, dim=-1)
            return torch.cat((visit(Site.MLP_GATE, layer, gate), visit(Site.MLP_UP, layer, up)), dim=-1)

        hooks.append(module.register_forward_hook(hook))

    gated = model.config.model_type not in _UNGATED
    blocks = model.get_submodule(family.blocks)
    assert isinstance(blocks, nn.ModuleList)
    for layer, block in enumerate(blocks):
        on_input(block, Site.RESID_PRE, layer)
        on_input(block.get_submodule(family.o_proj), Site.ATTN_Z, layer)
        on_output(block.get_submodule(family.attn_out), Site.ATTN_OUT, layer)
        if family.mid_norm is not None:
            on_input_in_place(block.get_submodule(family.mid_norm), Site.RESID_MID, layer)
        projections = [block.get_submodule(path) for path in family.mlp_input]
        if gated and len(projections) == 1:
            on_halves(projections[0], layer)
        else:
            for projection, site in zip(reversed(projections), (Site.MLP_UP, Site.MLP_GATE), strict=False):
                on_output(projection, site, layer)
        on_input(block.get_submodule(family.down_proj), Site.MLP_POST, layer)
        on_output(block.get_submodule(family.mlp_out), Site.MLP_OUT, layer)
        on_output(block, Site.RESID_POST, layer)
    return hooks


_WATCHED = "eager, watched"
# (layer, queries [n_heads, T, head_dim]) -> those used; (layer, weights [n_heads, T, T]).
Queries = Callable[[int, Tensor], Tensor]
Weights = Callable[[int, Tensor], None]
_watchers: list[tuple[Queries, Weights]] = []


def _watched_attention(module: nn.Module, query: Tensor, *args: Any, **options: Any) -> Any:
    on_queries, on_weights = _watchers[-1]
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    eager = sys.modules[type(module).__module__].eager_attention_forward
    output, weights = eager(module, on_queries(layer, query[0])[None], *args, **options)
    on_weights(layer, weights[0])
    return output, weights


AttentionInterface.register(_WATCHED, _watched_attention)
AttentionMaskInterface.register(_WATCHED, eager_mask)


@contextmanager
def watching_attention(model: PreTrainedModel, on_queries: Queries, on_weights: Weights) -> Iterator[None]:
    """Within, the eager attention of the family's own module gets queries from one function and tells its weights,
    all of the matrix, to the other."""
    _watchers.append((on_queries, on_weights))
    model.config._attn_implementation = _WATCHED
    try:
        yield
    finally:
        model.config._attn_implementation = "eager"
        _watchers.pop()

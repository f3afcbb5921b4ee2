"""Parts of a logit difference from the activations and weights of transformers, one at a time, in float64."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from circuit_oracle import recorded
from torch import Tensor, nn
from transformers import PreTrainedModel

from patchclamp_server.model.sites import Site


@dataclass(frozen=True)
class Family:
    """Module paths; `qkv` and `o_proj` below a block. The values are the last outputs of `qkv`."""

    final_norm: str = "model.norm"
    blocks: str = "model.layers"
    qkv: str = "self_attn.v_proj"
    o_proj: str = "self_attn.o_proj"
    post_norm: str | None = None


_GEMMA = Family(post_norm="post_attention_layernorm")
_FAMILIES = {
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
    "phi3": Family(qkv="self_attn.qkv_proj"),
    "gpt2": Family("transformer.ln_f", "transformer.h", "attn.c_attn", "attn.c_proj"),
    "opt": Family("model.decoder.final_layer_norm", "model.decoder.layers", o_proj="self_attn.out_proj"),
    "gpt_neox": Family("gpt_neox.final_layer_norm", "gpt_neox.layers", "attention.query_key_value", "attention.dense"),
}


def frozen(norm: nn.Module, at: Tensor, x: Tensor) -> Tensor:
    """What a norm makes of a part x of its input `at`: without the bias, divided by what `at` is divided by."""
    weight = norm.weight
    assert isinstance(weight, Tensor)
    weight = weight.detach().double()
    if isinstance(norm, nn.LayerNorm):
        return (x - x.mean()) / (at.var(correction=0) + norm.eps).sqrt() * weight
    eps = norm.eps if hasattr(norm, "eps") else norm.variance_epsilon
    assert isinstance(eps, float)
    one = 1.0 if "Gemma" in type(norm).__name__ else 0.0
    return x / (at.square().mean() + eps).sqrt() * (weight + one)


class NaiveAttribution:
    """Of logit(target) - logit(contrast) after the last token, before a soft cap."""

    def __init__(self, model: PreTrainedModel, tokens: Sequence[int], target: int, contrast: int) -> None:
        self.model = model
        self.family = _FAMILIES.get(model.config.model_type, Family())
        self.tokens = torch.tensor([list(tokens)])
        self.seen = recorded(model, tokens)
        self.end = self.row(Site.RESID_POST, model.config.num_hidden_layers - 1)
        unembedding = model.get_output_embeddings()
        assert isinstance(unembedding, nn.Linear)
        self.difference = (unembedding.weight[target] - unembedding.weight[contrast]).detach().double()
        with torch.no_grad():
            self.uncapped = unembedding(model.get_submodule(self.family.final_norm)(self.end.float())).double()

    def row(self, site: Site, layer: int) -> Tensor:
        """The activation at the last position, float64."""
        return self.seen[site, layer][-1].double()

    def part(self, x: Tensor) -> float:
        """Of x [d_model] in the residual stream."""
        return float(self.difference @ frozen(self.model.get_submodule(self.family.final_norm), self.end, x))

    def head(self, layer: int, head: int, z: Tensor) -> float:
        """Of z [head_dim], a part of the output of a head."""
        block = self.model.get_submodule(f"{self.family.blocks}.{layer}")
        projection = block.get_submodule(self.family.o_proj)
        weight = projection.weight
        assert isinstance(weight, Tensor)
        weight = weight.detach().double()
        if type(projection).__name__ == "Conv1D":
            weight = weight.t()
        out = weight[:, head * len(z) : (head + 1) * len(z)] @ z
        if self.family.post_norm is not None:
            out = frozen(block.get_submodule(self.family.post_norm), weight @ self.row(Site.ATTN_Z, layer), out)
        return self.part(out)

    @torch.no_grad()
    def weights(self) -> list[Tensor]:
        """Attention of the last token [n_heads, T], by layer."""
        attentions = self.model(input_ids=self.tokens, output_attentions=True, use_cache=False).attentions
        return [attention[0, :, -1].double() for attention in attentions]

    @torch.no_grad()
    def values(self, layer: int) -> Tensor:
        """[T, n_heads, head_dim]."""
        seen: list[Tensor] = []
        module = self.model.get_submodule(f"{self.family.blocks}.{layer}.{self.family.qkv}")
        hook = module.register_forward_hook(lambda module, args, output: seen.append(output[0]))
        self.model(input_ids=self.tokens, use_cache=False)
        hook.remove()
        config = self.model.config
        n_heads = config.num_attention_heads
        kv_heads = getattr(config, "num_key_value_heads", None) or n_heads
        dim = len(self.row(Site.ATTN_Z, layer)) // n_heads
        (qkv,) = seen
        if config.model_type == "gpt_neox":
            values = qkv.view(-1, n_heads, 3, dim)[:, :, 2]
        else:
            values = qkv[:, -kv_heads * dim :].view(-1, kv_heads, dim)
        return values.double().repeat_interleave(n_heads // kv_heads, dim=1)

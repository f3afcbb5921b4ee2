"""Direct logit attribution: a logit difference as a sum over embedding, MLPs, heads and biases; heads by source token.

    logit(target) - logit(contrast) = norm(r) · u + b,   r = embedding + Σ_l (Σ_h out_lh + mlp_l + bias_l)
    part of x = x · d,   d = (∂ norm(r) · u / ∂ r with the scale of the norm held fixed)
    out_lh = Σ_j a_hj W_O,h v_j                          a_hj: attention of the last token on token j

r is the residual stream after the last block at the last position, u the difference of two rows of the unembedding.
With its scale held at what it is for r (and layer norm's mean subtracted from every part) a norm is linear, so that the
parts sum to the difference. A norm between attention and residual stream (gemma) is held fixed in the same way. Where
logits are soft-capped (gemma2), the difference is that before the cap, which is not linear. Value biases belong to the
source token they are added to, and biases of an MLP to its part.

Source: nostalgebraist 2020, logit lens; Elhage et al. 2021, A Mathematical Framework for Transformer Circuits; by
source token: Chughtai et al. 2024, Summing Up the Facts. The pass is the decoder's own; its activations are decomposed
in float64, so that the parts sum to the difference up to the rounding of the pass.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from patchclamp_server.analysis.documents import forward, inputs_of, pools_for
from patchclamp_server.analysis.heads.attention_mass import attention_mass
from patchclamp_server.engine.exclusive import Sliced
from patchclamp_server.errors import InvalidArgument
from patchclamp_server.model.decoder import Block, Decoder
from patchclamp_server.model.row_operators import Norm
from patchclamp_server.model.sites import Site
from patchclamp_server.sparsity.mlp import matrix


@dataclass(frozen=True)
class HeadAttribution:
    """A head's part, and the parts `sources` by position of the prompt, which sum to `part`. They are empty where they
    were not asked for."""

    layer: int
    head: int
    part: float
    sources: tuple[float, ...] = ()


@dataclass(frozen=True)
class LogitAttribution:
    """`logit_difference` is that of the pass, before a soft cap; `heads` has all heads, the largest |part| first."""

    logit_difference: float
    embedding: float
    mlps: tuple[float, ...]
    # These are the biases of attention outputs, of norms, and of the unembedding.
    biases: float
    heads: tuple[HeadAttribution, ...]

    @property
    def parts_sum(self) -> float:
        return self.embedding + sum(self.mlps) + self.biases + sum(head.part for head in self.heads)


def attribute(
    decoder: Decoder, tokens: Sequence[int], target: int, contrast: int | None = None, top_heads: int = 10
) -> Sliced[LogitAttribution]:
    """Attributes a logit difference, or logit(target) alone without a contrast, as work at the engine's exclusive door.

    The `top_heads` largest heads are split by source token. Raises InvalidArgument for a prompt that does not fit and
    for equal tokens.
    """
    spec = decoder.spec
    if not 1 <= len(tokens) <= spec.context_length:
        raise InvalidArgument("prompt", f"has {len(tokens)} tokens; accepted: 1 to {spec.context_length}")
    if target == contrast:
        raise InvalidArgument("contrast", "starts with the same token as target: the difference is 0 by definition")
    document = torch.tensor([tokens])
    step, pools, kept = inputs_of(document, 0, len(tokens), decoder), pools_for(decoder, document), _LastRow()
    end = (yield from forward(decoder, step, pools, kept))[-1]

    def difference(by_token: Tensor) -> Tensor:
        """Maps by_token [vocab, ...] to [...] float64."""
        of_target = by_token[target].double()
        return of_target if contrast is None else of_target - by_token[contrast].double()

    logits = decoder.unembedding(decoder.final_norm(end[None]))[0]
    unembedding = difference(matrix(decoder.unembedding))
    direction, biases = _through(decoder.final_norm, end.double(), unembedding)
    if decoder.unembedding.bias is not None:
        biases += float(difference(decoder.unembedding.bias))

    heads: list[tuple[int, int, Tensor]] = []
    everywhere = torch.arange(len(tokens))[None]
    masses = yield from attention_mass(decoder, document[0], everywhere)
    patterns = masses[:, :, 0].double()  # [n_layers, n_heads, T]
    for layer, block in enumerate(decoder.blocks):
        values = pools[layer].values_at(step.slots).double()  # [T, n_kv_heads, head_dim]
        sources, bias = _head_sources(block, patterns[layer].to(values.device), values, direction)
        biases += bias
        heads += [(layer, head, part) for head, part in enumerate(sources.cpu())]
    heads.sort(key=lambda head: -abs(float(head[2].sum())))
    return LogitAttribution(
        logit_difference=float(difference(logits)),
        embedding=float(kept.embedding.double() @ direction),
        mlps=tuple(float(out.double() @ direction) for out in kept.mlp_out),
        biases=biases,
        heads=tuple(
            HeadAttribution(layer, head, float(part.sum()), tuple(part.tolist()) if rank < top_heads else ())
            for rank, (layer, head, part) in enumerate(heads)
        ),
    )


@dataclass(eq=False)
class _LastRow:
    """Keeps what the embedding and each MLP add to the residual stream at the last position."""

    visited = None

    embedding: Tensor = field(init=False)
    mlp_out: list[Tensor] = field(default_factory=list)

    def visit(self, site: Site, layer: int, x: Tensor) -> None:
        if site is Site.RESID_PRE and layer == 0:
            self.embedding = x[-1].clone()
        elif site is Site.MLP_OUT:
            self.mlp_out.append(x[-1].clone())


def _head_sources(block: Block, pattern: Tensor, values: Tensor, direction: Tensor) -> tuple[Tensor, float]:
    """Returns the parts [n_heads, T] and that of the layer's biases, given pattern [n_heads, T] and values [T,
    n_kv_heads, head_dim]."""
    n_heads = len(pattern)
    values = values.transpose(0, 1).repeat_interleave(n_heads // values.shape[1], 0)  # [n_heads, T, head_dim]
    weight = matrix(block.attn_output).double()  # [d_model, n_heads * head_dim]
    output_bias = torch.zeros_like(direction) if block.attn_output.bias is None else block.attn_output.bias.double()
    bias = 0.0
    if block.post_attn_norm is not None:
        z = (pattern[:, None] @ values).flatten()
        direction, bias = _through(block.post_attn_norm, weight @ z + output_bias, direction)
    seen = (direction @ weight).view(n_heads, -1, 1)  # what the direction is for each head's own output
    return pattern * (values @ seen)[:, :, 0], bias + float(output_bias @ direction)


def _through(norm: Norm, x: Tensor, direction: Tensor) -> tuple[Tensor, float]:
    """Returns d and c with norm(x) · direction = x · d + c, where the scale of the norm is held at that of x."""
    weighted = direction * norm.weight.double()
    if norm.bias is None:
        return weighted / norm.divisor(x), 0.0
    return (weighted - weighted.mean()) / norm.divisor(x), float(norm.bias.double() @ direction)

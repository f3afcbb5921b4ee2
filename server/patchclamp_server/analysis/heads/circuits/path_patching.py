"""Path patching of head → logits: a head has its corrupt output, and only the logits see it.

    change_h = metric(logits(r + attn(z(clean) | z_h ← z_h(corrupt)) - attn(z(clean)))) - metric(clean run)

r is the residual stream at the end of the clean run, last position, attn what attention adds to it (with the norm after
attention, where the family has one). All other heads and all MLPs keep their clean outputs: between the head and the
logits stand only the residual stream and the final norm, which is computed anew from the changed sum, not frozen. So no
pass is needed for a head, and the result is that of the three passes of Wang et al. 2023 (Interpretability in the Wild,
appendix B) and Goldowsky-Dill et al. 2023 (Localizing Model Behavior with Path Patching). Negative for a head that
writes the answer.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from patchclamp_server.analysis.heads.circuits.runs import PairRuns
from patchclamp_server.engine.exclusive import Slice, Sliced
from patchclamp_server.model.decoder import Decoder


def changes(decoder: Decoder, runs: PairRuns, means: Tensor) -> Iterator[Sliced[Tensor]]:
    """Is a CircuitMethod; the means are not used."""
    for layer in range(decoder.spec.n_layers):
        yield _changes(decoder, layer, runs)


def _changes(decoder: Decoder, layer: int, runs: PairRuns) -> Sliced[Tensor]:
    # This needs no pass, but a product with the unembedding for each head.
    yield Slice(decoder.spec.n_heads)
    return runs.pair.metric(decoder, _ends(decoder, layer, runs)) - runs.clean_metric


def _ends(decoder: Decoder, layer: int, runs: PairRuns) -> Tensor:
    """Returns the ends [n_heads, d_model] of the clean run with each head of the layer patched."""
    clean, corrupt = runs.clean.z[layer, -1], runs.corrupt.z[layer, -1]  # [n_heads, head_dim]
    heads = torch.arange(len(clean))
    # Row 0 is the clean output, so that both sides of the difference are rounded alike.
    z = clean.repeat(1 + len(clean), 1, 1)
    z[1 + heads, heads] = corrupt
    attn_out = decoder.attention_output(layer, z.flatten(1))
    return runs.clean.end + (attn_out[1:] - attn_out[0])

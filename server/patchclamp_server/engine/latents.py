"""Probabilities that layers gave to tokens, once these are known: see interventions/kinds/latents.py."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from patchclamp_server.engine.request import LatentPredictions, LayerPrediction
from patchclamp_server.interventions.kinds.latents import LatentRows
from patchclamp_server.interventions.row_arithmetic import row_dots
from patchclamp_server.model.decoder import Decoder
from patchclamp_server.model.row_operators import cap_softly


@torch.inference_mode()
def latent_predictions(
    decoder: Decoder, rows: Sequence[LatentRows], asked: Mapping[tuple[int, int], Sequence[int]]
) -> dict[int, list[LatentPredictions]]:
    """Returns the predictions of sequences, in order of position. `asked`: the tokens, by sequence and position, of
    which the first is the one that came. Rows of others are passed over."""
    owners: list[tuple[int, tuple[int, int]]] = []
    parts: list[Tensor] = []
    tops: list[Tensor] = []
    for own in rows:
        kept = [i for i, owner in enumerate(own.asked) if owner in asked]
        if not kept:
            continue
        owners += [(own.layer, own.asked[i]) for i in kept]
        ids = [token for i in kept for token in asked[own.asked[i]]]
        row = torch.tensor([i for i in kept for _ in asked[own.asked[i]]], device=decoder.device)
        tokens = torch.tensor(ids, device=decoder.device)
        parts.append(_logits(decoder, own.normed.index_select(0, row), tokens) - own.log_sum.index_select(0, row))
        tops.append(own.top.index_select(0, torch.tensor(kept, device=decoder.device)))
    if not owners:
        return {}
    logprobs, top = torch.cat(parts).tolist(), torch.cat(tops).tolist()
    by_owner: dict[tuple[int, int], list[LayerPrediction]] = {}
    at = 0
    for (layer, owner), most_likely in zip(owners, top, strict=True):
        end = at + len(asked[owner])
        by_owner.setdefault(owner, []).append(LayerPrediction(layer, most_likely, tuple(logprobs[at:end])))
        at = end
    found: dict[int, list[LatentPredictions]] = {}
    for (uid, position), layers in sorted(by_owner.items()):
        found.setdefault(uid, []).append(LatentPredictions(position, asked[uid, position][0], tuple(layers)))
    return found


def _logits(decoder: Decoder, normed: Tensor, tokens: Tensor) -> Tensor:
    """Returns the logit of one token for each row [n, d_model], [n] float32, rounded as those of all tokens are."""
    unembedding = decoder.unembedding
    products = row_dots(unembedding.taken(normed.float()), unembedding.rows(tokens))
    if unembedding.bias is not None:
        products = products + unembedding.bias.index_select(0, tokens).float()
    return cap_softly(products.to(normed.dtype).float()[:, None], decoder.spec.final_soft_cap)[:, 0]

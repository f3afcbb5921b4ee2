"""Interventions on heads done naively: transformers with hooks, one prompt and one head at a time, a full pass each."""

from collections.abc import Callable, Sequence

import torch
from oracle_sites import attach
from tiny_models import VOCAB
from torch import Tensor
from transformers import PreTrainedModel

from patchclamp_server.analysis.heads.circuits.runs import CleanCorruptPair
from patchclamp_server.model.sites import Site

# layer, activation [..., T, width] -> activation
Edit = Callable[[Site, int, Tensor], Tensor]
Heads = Sequence[tuple[int, int]]


@torch.no_grad()
def last_logits(model: PreTrainedModel, tokens: Sequence[int], edit: Edit | None = None) -> Tensor:
    """Logits [vocab] after the last token."""
    hooks = attach(model, edit or (lambda site, layer, x: x))
    try:
        return model(input_ids=torch.tensor([list(tokens)]), use_cache=False).logits[0, -1].double()
    finally:
        for hook in hooks:
            hook.remove()


def recorded(model: PreTrainedModel, tokens: Sequence[int]) -> dict[tuple[Site, int], Tensor]:
    """Activations [T, width] of every site and layer."""
    seen: dict[tuple[Site, int], Tensor] = {}

    def record(site: Site, layer: int, x: Tensor) -> Tensor:
        seen[site, layer] = x.reshape(len(tokens), -1).clone()
        return x

    last_logits(model, tokens, record)
    return seen


def with_head(z: Tensor, head: int, value: Tensor, n_heads: int) -> Tensor:
    """z [..., T, width] with the output of one head taken from value [T or 1, width]."""
    width = z.shape[-1] // n_heads
    z = z.clone()
    z[..., head * width : (head + 1) * width] = value[..., head * width : (head + 1) * width]
    return z


def ordinary(z: Tensor) -> Tensor:
    """Of z [T, width], the rows but the first, and but those of more than three times the median norm of the rest."""
    norms = z[1:].norm(dim=1)
    return z[1:][norms <= 3 * norms.median()]


class Naive:
    """What is measured of pairs of prompts of a tiny model."""

    def __init__(self, model: PreTrainedModel, pairs: Sequence[CleanCorruptPair]) -> None:
        self.model = model
        self.pairs = pairs
        self.n_heads = model.config.num_attention_heads
        self.heads = [(layer, head) for layer in range(model.config.num_hidden_layers) for head in range(self.n_heads)]
        self.clean = {pair: recorded(model, pair.clean) for pair in pairs}
        self.corrupt = {pair: recorded(model, pair.corrupt) for pair in pairs}
        self.clean_metric = {pair: self.metric(pair, pair.clean) for pair in pairs}
        self.corrupt_metric = {pair: self.metric(pair, pair.corrupt) for pair in pairs}
        # By layer: of each position [T, width] where all prompts are equally long, else [1, width] of all tokens
        # but the first of each prompt and those of more than three times the median norm.
        self.means: dict[int, Tensor] = {}
        for layer in range(model.config.num_hidden_layers):
            outputs = [self.corrupt[pair][Site.ATTN_Z, layer] for pair in pairs]
            if len({len(z) for z in outputs}) == 1:
                self.means[layer] = torch.stack(outputs).mean(dim=0)
            else:
                self.means[layer] = torch.cat([ordinary(z) for z in outputs]).mean(dim=0, keepdim=True)

    def metric(self, pair: CleanCorruptPair, tokens: Sequence[int], edit: Edit | None = None) -> float:
        logits = last_logits(self.model, tokens, edit)
        return float(logits[pair.clean_answer] - logits[pair.corrupt_answer])

    def effect(self, method: str, head: tuple[int, int]) -> float:
        """Mean over pairs."""
        return sum(self.effects(method, head)) / len(self.pairs)

    def effects(self, method: str, head: tuple[int, int]) -> list[float]:
        effects = []
        for pair in self.pairs:
            clean, corrupt = self.clean_metric[pair], self.corrupt_metric[pair]
            if method == "mean_ablation":
                change = self.ablated(pair, [head]) - clean
            elif method == "activation_patching":
                change = self.patched(pair, head) - corrupt
            else:
                assert method == "path_patching"
                change = self.path_patched(pair, head) - clean
            effects.append(change / (clean - corrupt))
        return effects

    def ablated(self, pair: CleanCorruptPair, heads: Heads) -> float:
        """Metric of the clean prompt with all these heads at their means."""

        def edit(site: Site, layer: int, x: Tensor) -> Tensor:
            for ablated_layer, head in heads:
                if site is Site.ATTN_Z and layer == ablated_layer:
                    x = with_head(x, head, self.means[layer], self.n_heads)
            return x

        return self.metric(pair, pair.clean, edit)

    def patched(self, pair: CleanCorruptPair, head: tuple[int, int]) -> float:
        """Metric of the corrupt prompt with the head at what it is for the clean one."""

        def edit(site: Site, layer: int, x: Tensor) -> Tensor:
            if site is Site.ATTN_Z and layer == head[0]:
                return with_head(x, head[1], self.clean[pair][site, layer], self.n_heads)
            return x

        return self.metric(pair, pair.corrupt, edit)

    def path_patched(self, pair: CleanCorruptPair, head: tuple[int, int]) -> float:
        """A third pass, with every head and MLP held at what it was in the clean one, and the sender in the corrupt."""

        def edit(site: Site, layer: int, x: Tensor) -> Tensor:
            if site not in (Site.ATTN_Z, Site.MLP_OUT):
                return x
            frozen = self.clean[pair][site, layer].view(x.shape)
            if site is Site.ATTN_Z and layer == head[0]:
                return with_head(frozen, head[1], self.corrupt[pair][site, layer], self.n_heads)
            return frozen

        return self.metric(pair, pair.clean, edit)


def random_pair(model: PreTrainedModel, tokens: int, seed: int) -> CleanCorruptPair:
    """Prompts that differ in every third token, and the answers that tell them apart best."""
    generator = torch.Generator().manual_seed(seed)
    clean = torch.randint(3, VOCAB, (tokens,), generator=generator).tolist()
    corrupt = list(clean)
    # Not the last, which would tell them apart without any head.
    for position in range(tokens - 2, -1, -3):
        corrupt[position] = 3 + (corrupt[position] + 41) % (VOCAB - 3)
    told = last_logits(model, clean) - last_logits(model, corrupt)
    return CleanCorruptPair(tuple(clean), tuple(corrupt), int(told.argmax()), int(told.argmin()))

"""Runs of clean/corrupt pairs, and variants of a run in which outputs of heads are replaced.

    metric = logit(clean answer) - logit(corrupt answer)      after the last token
    variant: z_h ← value_h at every position, for the heads h that the variant replaces

Variants of one run have its tokens, so many of them are sequences of one batch. Below the first layer where a batch
replaces anything, all of its variants are the run itself: they start there, from the residual stream of the run. All
passes are work at the exclusive door of the engine.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from patchclamp_server.analysis.documents import forward, inputs_of, pool_for
from patchclamp_server.engine.exclusive import Sliced
from patchclamp_server.model.decoder import Decoder
from patchclamp_server.model.sites import Site
from patchclamp_server.model.spec import DecoderSpec

# A batch has so many rows of tokens. More are no faster on a CPU.
ROWS = 256


@dataclass(frozen=True)
class CleanCorruptPair:
    """The tokens of two prompts, equally many, and the first token of what each is continued by."""

    clean: tuple[int, ...]
    corrupt: tuple[int, ...]
    clean_answer: int
    corrupt_answer: int

    def metric(self, decoder: Decoder, ends: Tensor) -> Tensor:
        """Returns the metrics [n] float64 of residual states [n, d_model] at the last position after the last block."""
        logits = decoder.logits(ends)
        return (logits[:, self.clean_answer] - logits[:, self.corrupt_answer]).double().cpu()


@dataclass(frozen=True, eq=False)
class Run:
    """One pass over a prompt of T tokens."""

    tokens: Tensor  # [T]
    resid_pre: Tensor  # [n_layers, T, d_model]
    z: Tensor  # [n_layers, T, n_heads, head_dim]
    end: Tensor  # [d_model]: the residual stream after the last block, last position


@dataclass(frozen=True, eq=False)
class PairRuns:
    """Both runs of a pair and their metrics."""

    pair: CleanCorruptPair
    clean: Run
    corrupt: Run
    clean_metric: float
    corrupt_metric: float


def run_pair(decoder: Decoder, pair: CleanCorruptPair) -> Sliced[PairRuns]:
    clean, corrupt = (yield from run(decoder, pair.clean)), (yield from run(decoder, pair.corrupt))
    metrics = pair.metric(decoder, torch.stack((clean.end, corrupt.end))).tolist()
    return PairRuns(pair, clean, corrupt, *metrics)


def run(decoder: Decoder, tokens: tuple[int, ...]) -> Sliced[Run]:
    spec = decoder.spec
    document = torch.tensor([tokens])
    kept = _Keep()
    inputs = inputs_of(document, 0, len(tokens), decoder)
    x = yield from forward(decoder, inputs, pool_for(decoder, document), kept)
    z = torch.stack(kept.z).view(spec.n_layers, len(tokens), spec.n_heads, spec.head_dim)
    return Run(document[0], torch.stack(kept.resid_pre), z, x[-1])


def variant_ends(decoder: Decoder, run: Run, replaced: Tensor, values: Tensor) -> Sliced[Tensor]:
    """Returns the residual states [n, d_model] at the end of n variants of a run, as `Run.end`.

    `replaced` [n, n_layers, n_heads] bool says which heads have their output taken from values [n_layers, T or 1,
    n_heads, head_dim].
    """
    layers = replaced.any(dim=2).any(dim=0).nonzero()
    first = int(layers[0]) if len(layers) else 0
    documents = run.tokens.expand(len(replaced), -1)
    rest = range(first, decoder.spec.n_layers)
    start = run.resid_pre[first].repeat(len(replaced), 1)
    step, hooks = inputs_of(documents, 0, len(run.tokens), decoder), _Replace(replaced.to(decoder.device), values)
    x = yield from forward(decoder, step, pool_for(decoder, documents, rest), hooks, start=start, layers=rest)
    return x.view(*documents.shape, -1)[:, -1]


def variants_at_once(tokens: int) -> int:
    return max(1, ROWS // tokens)


def single_heads(spec: DecoderSpec, at_once: int) -> Iterator[Tensor]:
    """Yields every head alone, by layer and head, as masks [n, n_layers, n_heads] with n up to `at_once`."""
    heads = spec.n_layers * spec.n_heads
    for chunk in torch.split(torch.arange(heads), at_once):
        masks = torch.zeros(len(chunk), heads, dtype=torch.bool)
        masks[torch.arange(len(chunk)), chunk] = True
        yield masks.view(-1, spec.n_layers, spec.n_heads)


@dataclass(eq=False)
class _Keep:
    visited = None

    resid_pre: list[Tensor] = field(default_factory=list)
    z: list[Tensor] = field(default_factory=list)

    def visit(self, site: Site, layer: int, x: Tensor) -> None:
        if site is Site.RESID_PRE:
            self.resid_pre.append(x.clone())
        elif site is Site.ATTN_Z:
            self.z.append(x.clone())


@dataclass(frozen=True, eq=False)
class _Replace:
    visited = None

    replaced: Tensor  # [n, n_layers, n_heads]
    values: Tensor  # [n_layers, T or 1, n_heads, head_dim]

    def visit(self, site: Site, layer: int, x: Tensor) -> None:
        if site is Site.ATTN_Z:
            z = x.view(len(self.replaced), -1, *self.values.shape[2:])
            z.copy_(torch.where(self.replaced[:, layer, None, :, None], self.values[layer], z))

"""Runs of clean/corrupt pairs, and variants of a run in which outputs of heads are replaced.

    metric = logit(clean answer) - logit(corrupt answer)      after the last token
    variant: z_h ← value_h at every position, for the heads h that the variant replaces

Variants of one run have its tokens, so many of them are sequences of one batch. Below the first layer where a batch
replaces anything, all of its variants are the run itself: they start there, from the residual stream of the run.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from patchclamp_server.analysis.documents import inputs_of, pools_for
from patchclamp_server.model.decoder import Decoder
from patchclamp_server.model.sites import Site
from patchclamp_server.model.spec import DecoderSpec

# Token rows of a batch. More are no faster on a CPU, and a job can be cancelled between batches only.
ROWS = 256


@dataclass(frozen=True)
class CleanCorruptPair:
    """Tokens of two prompts, equally many, and the first token of what each is continued by."""

    clean: tuple[int, ...]
    corrupt: tuple[int, ...]
    clean_answer: int
    corrupt_answer: int

    def metric(self, decoder: Decoder, ends: Tensor) -> Tensor:
        """Of residual states [n, d_model] at the last position after the last block -> [n] float64."""
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


def run_pair(decoder: Decoder, pair: CleanCorruptPair) -> PairRuns:
    clean, corrupt = run(decoder, pair.clean), run(decoder, pair.corrupt)
    metrics = pair.metric(decoder, torch.stack((clean.end, corrupt.end))).tolist()
    return PairRuns(pair, clean, corrupt, *metrics)


@torch.inference_mode()
def run(decoder: Decoder, tokens: tuple[int, ...]) -> Run:
    spec = decoder.spec
    document = torch.tensor([tokens])
    kept = _Keep()
    x = decoder.forward(inputs_of(document, 0, len(tokens), decoder), pools_for(decoder, document), kept)
    z = torch.stack(kept.z).view(spec.n_layers, len(tokens), spec.n_heads, spec.head_dim)
    return Run(document[0], torch.stack(kept.resid_pre), z, x[-1])


@torch.inference_mode()
def variant_ends(decoder: Decoder, run: Run, replaced: Tensor, values: Tensor) -> Tensor:
    """Residual states [n, d_model] at the end of n variants of a run, as `Run.end`.

    replaced [n, n_layers, n_heads] bool: heads whose output is taken from values [n_layers, T or 1, n_heads, head_dim].
    """
    layers = replaced.any(dim=2).any(dim=0).nonzero()
    first = int(layers[0]) if len(layers) else 0
    documents = run.tokens.expand(len(replaced), -1)
    blocks = _from_layer(decoder, first)
    hooks = _Replace(run.resid_pre[first], replaced[:, first:].to(decoder.device), values[first:])
    x = blocks.forward(inputs_of(documents, 0, len(run.tokens), blocks), pools_for(blocks, documents), hooks)
    return x.view(*documents.shape, -1)[:, -1]


def variants_at_once(tokens: int) -> int:
    return max(1, ROWS // tokens)


def single_heads(spec: DecoderSpec, at_once: int) -> Iterator[Tensor]:
    """Every head alone, by layer and head: masks [n, n_layers, n_heads] with n up to `at_once`."""
    heads = spec.n_layers * spec.n_heads
    for chunk in torch.split(torch.arange(heads), at_once):
        masks = torch.zeros(len(chunk), heads, dtype=torch.bool)
        masks[torch.arange(len(chunk)), chunk] = True
        yield masks.view(-1, spec.n_layers, spec.n_heads)


@dataclass(eq=False)
class _Keep:
    resid_pre: list[Tensor] = field(default_factory=list)
    z: list[Tensor] = field(default_factory=list)

    def visit(self, site: Site, layer: int, x: Tensor) -> None:
        if site is Site.RESID_PRE:
            self.resid_pre.append(x.clone())
        elif site is Site.ATTN_Z:
            self.z.append(x.clone())


@dataclass(frozen=True, eq=False)
class _Replace:
    """Layers count from the first that runs."""

    start: Tensor  # [T, d_model]
    replaced: Tensor  # [n, layers, n_heads]
    values: Tensor  # [layers, T or 1, n_heads, head_dim]

    def visit(self, site: Site, layer: int, x: Tensor) -> None:
        if site is Site.RESID_PRE and layer == 0:
            x.view(-1, *self.start.shape).copy_(self.start)
        elif site is Site.ATTN_Z:
            z = x.view(len(self.replaced), len(self.start), *self.values.shape[2:])
            z.copy_(torch.where(self.replaced[:, layer, None, :, None], self.values[layer], z))


def _from_layer(decoder: Decoder, first: int) -> Decoder:
    """The blocks from `first` on. What it makes of tokens before its first block is to be overwritten."""
    spec = decoder.spec
    return Decoder(
        replace(
            spec,
            n_layers=spec.n_layers - first,
            windows=spec.windows[first:],
            rotary_kinds=spec.rotary_kinds[first:],
        ),
        decoder.embedding,
        decoder.position_embedding,
        decoder.rotary,
        decoder.blocks[first:],
        decoder.final_norm,
        decoder.unembedding,
    )

"""Interchange interventions: pairs of prompts, and what a model gives once a part of one's state stands in the other.

    h' = h_base + Rᵀ R (h_source - h_base)          at chosen tokens of one site and layer, R [rank, width] orthonormal

Nothing before the layer depends on R: states there are computed once, and each intervention begins at the layer
(backward.Replaced). Tokens of an answer follow the prompt as they are.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from patchclamp_server.analysis.neurons.backward import Replaced, activations_at, run_backward, run_forward
from patchclamp_server.analysis.neurons.batches import MAX_BYTES, batches, check_examples
from patchclamp_server.analysis.neurons.products import DifferentiableModel
from patchclamp_server.analysis.neurons.targets import Example, LogitDifference, LogProbability, Target
from patchclamp_server.engine.exclusive import Slice, Sliced
from patchclamp_server.errors import InvalidArgument, fields_as
from patchclamp_server.model.arrays import BoolArray
from patchclamp_server.model.sites import Site
from patchclamp_server.model.spec import DecoderSpec

_FIELDS = {"[0].target.answer": "answer"}


@dataclass(frozen=True, eq=False)
class Pair:
    """Token ids of both prompts and of the answer; the masks say which tokens are exchanged, equally many in both."""

    base: tuple[int, ...]
    source: tuple[int, ...]
    answer: tuple[int, ...]
    base_tokens: BoolArray
    source_tokens: BoolArray
    # Field path of the pair, for refusals.
    field: str = "pairs[0]"


@dataclass(frozen=True, eq=False)
class PreparedPair:
    """A pair at one site and layer: `before` [tokens, d_model] and `states` [tokens, width] of the base and its answer,
    `exchanged` [n], rows of these, and `source` [n, width]. float32, on the model's device."""

    pair: Pair
    before: Tensor
    states: Tensor
    exchanged: Tensor
    source: Tensor

    @property
    def difference(self) -> Tensor:
        """[n, width]."""
        return self.source - self.states[self.exchanged]

    def example(self, target: Target) -> Example:
        return Example(self.pair.base, target)


def _field_of(pair: str, name: str, field: str) -> str:
    """Returns the path of a field of the one example that is made of the base or the source of a pair."""
    return f"{pair}.{_FIELDS.get(field, name)}"


def check_pairs(pairs: Sequence[Pair], spec: DecoderSpec, site: Site, max_bytes: int = MAX_BYTES) -> None:
    """Raises InvalidArgument by field path, before anything is computed, for what cannot run, and for pairs whose
    states of a layer need more than `max_bytes`."""
    for pair in pairs:
        for name, example in (
            ("base", Example(pair.base, LogProbability(pair.answer))),
            ("source", Example(pair.source, LogitDifference(0))),
        ):
            # A list of one example, whose fields are called [0].prompt and [0].target.
            with fields_as(partial(_field_of, pair.field, name)):
                check_examples([example], spec, field="", max_bytes=max_bytes)
    width = spec.sites[site]
    rows = sum(len(pair.base) + len(pair.answer) for pair in pairs)
    needed = 4 * rows * (spec.d_model + width) + 4 * width * sum(int(pair.base_tokens.sum()) for pair in pairs)
    if needed > max_bytes:
        raise InvalidArgument("pairs", f"their states of a layer need {needed} bytes, the bound is {max_bytes}")


def prepared(model: DifferentiableModel, pairs: Sequence[Pair], layer: int, site: Site) -> Sliced[list[PreparedPair]]:
    """Returns the pairs in their order; each token before the layer runs once."""
    spec = model.decoder.spec
    # A source runs up to the site alone: it has no target.
    sources = [Example(pair.source, LogitDifference(0)) for pair in pairs]
    of_sources: dict[int, Tensor] = {}
    for batch in batches(sources, spec):
        _, states = yield from activations_at(model, batch, layer, site)
        for number, span in zip(batch.numbers, batch.spans, strict=True):
            rows = torch.from_numpy(np.flatnonzero(pairs[number].source_tokens)).to(states.device)
            of_sources[number] = states[span][rows].clone()
    bases = [Example(pair.base, LogProbability(pair.answer)) for pair in pairs]
    found: dict[int, PreparedPair] = {}
    for batch in batches(bases, spec):
        before, states = yield from activations_at(model, batch, layer, site)
        for number, span in zip(batch.numbers, batch.spans, strict=True):
            rows = torch.from_numpy(np.flatnonzero(pairs[number].base_tokens)).to(states.device)
            own = (before[span].clone(), states[span].clone())
            found[number] = PreparedPair(pairs[number], *own, rows, of_sources[number])
    return [found[number] for number in range(len(pairs))]


def likeliest_tokens(model: DifferentiableModel, prompts: Sequence[tuple[int, ...]]) -> Sliced[list[int]]:
    """Returns the likeliest token after each prompt."""
    spec, found = model.decoder.spec, [0] * len(prompts)
    for batch in batches([Example(prompt, LogitDifference(0)) for prompt in prompts], spec):
        _, states = yield from activations_at(model, batch, spec.n_layers - 1, Site.RESID_POST)
        ends = torch.tensor([span.stop - 1 for span in batch.spans], device=states.device)
        yield Slice(len(ends))
        logits = model.unembedding.multiply(model.decoder.final_norm(states[ends]))
        for number, token in zip(batch.numbers, logits.argmax(1).tolist(), strict=True):
            found[number] = token
    return found


class Kept(Protocol):
    """A run that is kept up to a site and layer: `before` [tokens, d_model], the residual stream before the layer, and
    `states` [tokens, width] at the site, of at least those tokens that run; `exchanged` [n]: rows that get others."""

    @property
    def before(self) -> Tensor: ...
    @property
    def states(self) -> Tensor: ...
    @property
    def exchanged(self) -> Tensor: ...


@dataclass(frozen=True, eq=False)
class Outcome:
    """F of each run, and the gradients ∂(Σ F)/∂h' [n, width] at its exchanged tokens, where they were asked for."""

    values: list[float]
    gradients: list[Tensor]


def intervened(
    model: DifferentiableModel,
    runs: Sequence[Kept],
    states: Sequence[Tensor],
    examples: Sequence[Example],
    layer: int,
    site: Site,
    *,
    gradients: bool,
) -> Sliced[Outcome]:
    """Returns F of each run with `states` [n, width] at its exchanged tokens. `examples` are what was run, with what F
    is."""
    values, found = [0.0] * len(runs), [torch.empty(0)] * len(runs)
    for batch in batches(examples, model.decoder.spec):
        own = [runs[number] for number in batch.numbers]
        rows = torch.cat([p.exchanged + span.start for p, span in zip(own, batch.spans, strict=True)])
        before = torch.cat([p.before[: len(e.tokens)] for p, e in zip(own, batch.examples, strict=True)])
        at_site = torch.cat([p.states[: len(e.tokens)] for p, e in zip(own, batch.examples, strict=True)])
        at_site[rows] = torch.cat([states[number] for number in batch.numbers])
        run = yield from run_forward(model, batch, Replaced(layer, site, before, at_site))
        for number, value in zip(batch.numbers, run.values.tolist(), strict=True):
            values[number] = value
        if gradients:
            kept: list[Tensor] = []

            def keep(layer: int, activation: Tensor, gradient: Tensor, kept: list[Tensor] = kept) -> None:
                kept.append(gradient)

            yield from run_backward(model, batch, run, site, range(layer, layer + 1), keep)
            [of_batch] = kept
            parts = torch.split(of_batch[rows], [len(p.exchanged) for p in own])
            for number, part in zip(batch.numbers, parts, strict=True):
                found[number] = part.clone()
    return Outcome(values, found)

"""A pass forwards that keeps little, and one backwards, block by block.

    forwards     x_l: the residual stream before each block; F and ∂F/∂(where it enters)
    backwards    ∂F/∂x_l and ∂F/∂a_l of block l, run again from x_l with gradients, from ∂F/∂x_(l+1)

This is activation checkpointing with every block a checkpoint (Chen et al. 2016, Training Deep Nets with Sublinear
Memory Cost), by hand, so that a slice at the exclusive door is one block. Blocks are run by Decoder.run_blocks both
ways. Activations and gradients are float32.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import wraps
from typing import ParamSpec, Protocol, TypeVar

import torch
from torch import Tensor

from patchclamp_server.analysis.documents import forward
from patchclamp_server.analysis.neurons.batches import Batch
from patchclamp_server.analysis.neurons.products import DifferentiableModel
from patchclamp_server.analysis.neurons.targets import Projection
from patchclamp_server.engine.exclusive import Slice, Sliced
from patchclamp_server.model.decoder import StepInputs
from patchclamp_server.model.row_operators import cap_softly
from patchclamp_server.model.sites import Site

P = ParamSpec("P")
T = TypeVar("T")


class OnGradient(Protocol):
    """Told the activation at a site and ∂F/∂activation of each layer, last layer first, both [rows, width]."""

    def __call__(self, layer: int, activation: Tensor, gradient: Tensor, /) -> None: ...


def differentiated(function: Callable[P, T]) -> Callable[P, T]:
    """Gradients within, and none outside: a work at the exclusive door runs in inference mode, and a generator must not
    change that beyond its slice."""

    @wraps(function)
    def run(*args: P.args, **options: P.kwargs) -> T:
        with torch.inference_mode(False), torch.enable_grad():
            return function(*args, **options)

    return run


@dataclass(frozen=True, eq=False)
class Replaced:
    """A run that begins at a layer, from the residual stream before it, with other activations at a site there."""

    layer: int
    site: Site
    x: Tensor  # [rows, d_model]
    values: Tensor  # [rows, width]


@dataclass(frozen=True, eq=False)
class Run:
    """A pass forwards of a batch: F of each example (float64), and ∂F/∂a of all rows at the place where it enters."""

    values: Tensor  # [examples]
    seed: Tensor  # [rows, width of the place]
    # Before each block that ran, by layer.
    states: dict[int, Tensor]
    replaced: Replaced | None


@dataclass(eq=False)
class _Hooks:
    """Keeps what stands at sites, by site and layer, once it is replaced where it is to be."""

    visited = None

    kept: dict[tuple[Site, int], Tensor] = field(default_factory=dict)
    sites: tuple[Site, ...] = ()
    last: tuple[int, Site] | None = None
    replaced: Replaced | None = None
    copies: bool = True

    def visit(self, site: Site, layer: int, x: Tensor) -> None:
        replaced = self.replaced
        if replaced is not None and (site, layer) == (replaced.site, replaced.layer):
            x.copy_(replaced.values)
        if site in self.sites or (layer, site) == self.last:
            self.kept[site, layer] = x.clone() if self.copies else x


def run_forward(model: DifferentiableModel, batch: Batch, replaced: Replaced | None = None) -> Sliced[Run]:
    """The examples of a batch up to where their gradients enter; each token is charged once."""
    decoder, first = model.decoder, 0 if replaced is None else replaced.layer
    top, site = batch.examples[0].place(decoder.spec)
    layers = range(first, top + 1)
    inputs = batch.inputs(decoder, site, *(() if replaced is None else (replaced.site,)))
    x = decoder.embed(inputs.token_ids, inputs.positions).float() if replaced is None else replaced.x
    hooks = _Hooks(sites=(Site.RESID_PRE,), last=(top, site), replaced=replaced)
    pools = [batch.pool(decoder)] * len(layers)
    yield from forward(decoder, inputs, pools, hooks, model.products, start=x.clone(), layers=layers)
    states = {layer: hooks.kept[Site.RESID_PRE, layer] for layer in layers}
    values, seed = yield from _seed(model, batch, hooks.kept[site, top])
    return Run(values, seed, states, replaced)


def activations_at(model: DifferentiableModel, batch: Batch, layer: int, site: Site) -> Sliced[tuple[Tensor, Tensor]]:
    """The residual stream before a layer [rows, d_model], and what stands at a site of it [rows, width]."""
    decoder, inputs = model.decoder, batch.inputs(model.decoder, site)
    x, hooks = decoder.embed(inputs.token_ids, inputs.positions).float(), _Hooks(last=(layer, site))
    layers = range(layer + 1)
    before = yield from forward(
        decoder, inputs, [batch.pool(decoder)] * layer, products=model.products, start=x, layers=layers[:-1]
    )
    pools = [batch.pool(decoder)]
    yield from forward(
        decoder, inputs, pools, hooks, model.products, start=before.clone(), layers=layers[-1:], tokens=0
    )
    return before, hooks.kept[site, layer]


def run_backward(
    model: DifferentiableModel, batch: Batch, run: Run, site: Site, layers: range, tell: OnGradient
) -> Sliced[None]:
    """Tells activations and gradients at a site of all of `layers`, from the last one on. Each token is charged twice:
    a block is run again, and backwards.

    Where activations were replaced, the gradient there is that with respect to what they were replaced by.
    """
    spec = model.decoder.spec
    top, entry = batch.examples[0].place(spec)
    sites = (site, entry) if run.replaced is None else (site, entry, run.replaced.site)
    gradient, inputs = run.seed, _inputs(model, batch, sites)
    charged = 2 * batch.rows
    for layer in reversed(range(layers.start, top + 1)):
        yield Slice(-(-2 * batch.rows // spec.n_layers), charged)
        charged = 0
        own = site if layer in layers else None
        found = _block(model, batch, inputs, run, layer, entry, gradient, own, to_input=layer > layers.start)
        if found.at_site is not None:
            tell(layer, *found.at_site)
        if found.to_input is not None:
            entry, gradient = Site.RESID_POST, found.to_input


@differentiated
def _inputs(model: DifferentiableModel, batch: Batch, sites: tuple[Site, ...]) -> StepInputs:
    return batch.inputs(model.decoder, *sites)


@dataclass(frozen=True, eq=False)
class _Found:
    to_input: Tensor | None
    at_site: tuple[Tensor, Tensor] | None


@differentiated
def _block(
    model: DifferentiableModel,
    batch: Batch,
    inputs: StepInputs,
    run: Run,
    layer: int,
    entry: Site,
    gradient: Tensor,
    site: Site | None,
    *,
    to_input: bool,
) -> _Found:
    """Gradients through one block, which ∂F/∂(activation at `entry`) [rows, width] comes to."""
    # What inference mode has made takes no part in a backward pass, but its copies do.
    x = run.states[layer].clone()
    replaced = run.replaced if run.replaced is not None and run.replaced.layer == layer else None
    if replaced is None:
        x.requires_grad_()
    else:
        values = replaced.values.clone().requires_grad_()
        replaced = Replaced(layer, replaced.site, x, values)
    sites = (entry,) if site is None else (entry, site)
    hooks = _Hooks(sites=sites, replaced=replaced, copies=False)
    pools = [batch.pool(model.decoder)]
    model.decoder.run_blocks(x, range(layer, layer + 1), inputs, pools, hooks, model.products)
    wanted = [x] if to_input else []
    if site is not None:
        wanted.append(hooks.kept[site, layer] if replaced is None or replaced.site is not site else replaced.values)
    entered = hooks.kept[entry, layer]
    # What lies behind the place where the gradient enters has none, nor what does not lead there.
    found = [torch.zeros_like(w) for w in wanted]
    if entered.requires_grad:
        found = list(torch.autograd.grad(entered, wanted, gradient.clone(), allow_unused=True, materialize_grads=True))
    at_site = None if site is None else (wanted[-1].detach(), found.pop())
    return _Found(found.pop() if to_input else None, at_site)


def _seed(model: DifferentiableModel, batch: Batch, activation: Tensor) -> Sliced[tuple[Tensor, Tensor]]:
    """F of each example, and ∂F/∂activation [rows, width] at the place where it enters."""
    if not isinstance(batch.examples[0].target, Projection):
        return (yield from _logit_seed(model, batch, activation))
    values, seed = torch.zeros(len(batch.examples), dtype=torch.float64), torch.zeros_like(activation)
    for i, (example, span) in enumerate(zip(batch.examples, batch.spans, strict=True)):
        assert isinstance(example.target, Projection)
        row = span.start + example.target.row(span.stop - span.start)
        seed[row] = example.target.direction.to(seed.device)
        values[i] = activation[row].double() @ seed[row].double()
    return values, seed


def _logit_seed(model: DifferentiableModel, batch: Batch, x: Tensor) -> Sliced[tuple[Tensor, Tensor]]:
    rows = [batch.logit_rows(i) for i in range(len(batch.examples))]
    wanted = torch.tensor([row for own in rows for row in own], device=x.device)
    yield Slice(len(wanted))
    states, h, values, of_logits = _of_logits(model, batch, x[wanted], [len(own) for own in rows])
    of_norm = yield from model.unembedding.multiply_back_in_slices(of_logits)
    seed = torch.zeros_like(x)
    seed[wanted] = _through_norm(states, h, of_norm)
    return values, seed


@differentiated
def _of_logits(
    model: DifferentiableModel, batch: Batch, ends: Tensor, lengths: list[int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """States before the final norm and after it, F of each example, and ∂F/∂(logits before a soft cap)."""
    states = ends.clone().requires_grad_()
    h = model.decoder.final_norm(states)
    logits = model.unembedding.multiply(h.detach()).requires_grad_()
    capped = torch.split(cap_softly(logits, model.decoder.spec.final_soft_cap), lengths)
    values = []
    for example, own in zip(batch.examples, capped, strict=True):
        assert not isinstance(example.target, Projection)
        values.append(example.target.value(own))
    (of_logits,) = torch.autograd.grad(torch.stack(values).sum(), logits)
    return states, h, torch.stack(values).detach().cpu(), of_logits


@differentiated
def _through_norm(states: Tensor, h: Tensor, gradient: Tensor) -> Tensor:
    (of_states,) = torch.autograd.grad(h, states, gradient.clone())
    return of_states

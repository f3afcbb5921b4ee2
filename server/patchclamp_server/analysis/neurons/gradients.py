"""Gradient x activation: which neurons a model's number F for a prompt depends on, to first order.

    s_i = mean over examples of  Σ_t a_ti ∂F/∂a_ti        or max_t, or at the last token of the prompt

a_ti is neuron i (or another site) at token t. The sum is the first-order estimate of what F loses when the neuron is
set to 0 at every token. `without_controls` then leaves out what stands out for control data too, as the paper on
culture neurons does.

Source: METHODS N3; Yamamoto et al. 2025, Neuron-Level Analysis of Cultural Understanding in Large Language Models
(CULNIG); gradient x input: Shrikumar et al. 2017. Gradients are with respect to activations, never to weights, so that
they go through quantised codes too (products.py): no model that is served is refused.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from patchclamp_server.analysis.neurons.backward import OnGradient, run_backward, run_forward
from patchclamp_server.analysis.neurons.batches import MAX_BYTES, Batch, batches, check_examples
from patchclamp_server.analysis.neurons.products import DifferentiableModel
from patchclamp_server.analysis.neurons.targets import Example
from patchclamp_server.analysis.progress import Progress, Steps
from patchclamp_server.engine.exclusive import Sliced, Telling
from patchclamp_server.errors import InvalidArgument
from patchclamp_server.model.decoder import Decoder
from patchclamp_server.model.sites import Site
from patchclamp_server.model.spec import DecoderSpec


@dataclass(frozen=True, eq=False)
class SiteGradients:
    """Of one example: rows are the tokens that ran, those of the prompt first (targets.py). On the CPU, float32."""

    value: float  # F
    layers: tuple[int, ...]
    activations: Tensor  # [layers, tokens, width]
    gradients: Tensor  # [layers, tokens, width]: ∂F/∂activation


class OverTokens(Enum):
    """How the products of one example become one score: over all tokens that ran, or at the last one of the prompt."""

    SUM = "sum"
    MAX = "max"
    LAST = "last"


@dataclass(frozen=True, eq=False)
class GradientScores:
    """`scores` [layers, width] float32, on the CPU; `values`: F of each example, in their order."""

    layers: tuple[int, ...]
    scores: Tensor
    values: tuple[float, ...]
    # That ran, of all examples.
    tokens: int


def site_gradients(
    decoder: Decoder,
    example: Example,
    *,
    site: Site = Site.MLP_POST,
    layers: Sequence[int] | None = None,
    field: str = "examples",
    max_bytes: int = MAX_BYTES,
) -> Sliced[SiteGradients]:
    """A work at the exclusive door of the engine: activations and their gradients at a site of `layers` (None: of all
    that the target depends on), ascending.

    Raises InvalidArgument for what cannot run, and for tokens x layers that need more than `max_bytes`, before anything
    is computed: `field`[0].prompt, `field`[0].target..., site, layers.
    """
    chosen = _chosen(decoder.spec, [example], site, layers)
    width = decoder.spec.sites[site]
    check_examples([example], decoder.spec, field=field, max_bytes=max_bytes, kept_per_token=8 * width * len(chosen))
    kept: dict[int, tuple[Tensor, Tensor]] = {}

    def keep(layer: int, activation: Tensor, gradient: Tensor) -> None:
        if layer in chosen:
            kept[layer] = activation.cpu(), gradient.cpu()

    values = yield from _gradients(DifferentiableModel.of(decoder), Batch.of([example]), site, chosen, keep)
    activations, gradients = (torch.stack([kept[layer][i] for layer in chosen]) for i in (0, 1))
    return SiteGradients(float(values[0]), chosen, activations, gradients)


def gradient_times_activation(
    decoder: Decoder,
    examples: Sequence[Example],
    *,
    site: Site = Site.MLP_POST,
    layers: Sequence[int] | None = None,
    over_tokens: OverTokens = OverTokens.SUM,
    field: str = "examples",
    max_bytes: int = MAX_BYTES,
) -> Telling[Progress, GradientScores]:
    """A work at the exclusive door of the engine, which tells its progress in examples.

    `layers`: None is all that every target depends on; they come ascending. Memory does not grow with the number of
    examples. A token is charged three times: forwards, and twice for the way back.

    Raises InvalidArgument for what cannot run or needs more than `max_bytes`, before anything is computed, by
    `field`[i].prompt, `field`[i].target..., site, layers.
    """
    chosen = _chosen(decoder.spec, examples, site, layers)
    check_examples(examples, decoder.spec, field=field, max_bytes=max_bytes)
    model = DifferentiableModel.of(decoder)
    total = torch.zeros(len(chosen), decoder.spec.sites[site], dtype=torch.float64)
    values, steps = [0.0] * len(examples), Steps("gradients", len(examples))
    for batch in batches(examples, decoder.spec, max_bytes):

        def add(layer: int, activation: Tensor, gradient: Tensor, batch: Batch = batch) -> None:
            if layer in chosen:
                total[chosen.index(layer)] += _over_tokens(batch, activation * gradient, over_tokens).double().cpu()

        of_batch = yield from _gradients(model, batch, site, chosen, add)
        for number, value in zip(batch.numbers, of_batch.tolist(), strict=True):
            values[number] = value
        yield steps.advance(len(batch.examples))
    scores = (total / len(examples)).float()
    return GradientScores(chosen, scores, tuple(values), sum(len(example.tokens) for example in examples))


def without_controls(
    scores: Tensor,
    control: Tensor | None = None,
    excluded: Sequence[Tensor] = (),
    *,
    fraction: float = 0.01,
    excluded_fraction: float = 0.01,
) -> Tensor:
    """Returns a mask [layers, width] of the neurons that stand out, and not for controls too:

        the top `fraction` of all by scores - control, without the top `excluded_fraction` of any of `excluded`

    All are scores [layers, width]. `control`: of the same task without what is looked for, such as the same questions
    about no culture; `excluded`: of what the neurons should not merely react to, such as names of countries. At least
    one neuron is a top fraction. Source: CULNIG, section on filtering.
    """
    difference = scores if control is None else scores - control
    found = _top(difference, fraction)
    for other in excluded:
        found &= ~_top(other, excluded_fraction)
    return found


def _top(scores: Tensor, fraction: float) -> Tensor:
    n = max(1, round(fraction * scores.numel()))
    mask = torch.zeros(scores.numel(), dtype=torch.bool)
    mask[scores.flatten().sort(descending=True, stable=True).indices[:n].cpu()] = True
    return mask.view(scores.shape)


def _gradients(
    model: DifferentiableModel, batch: Batch, site: Site, layers: tuple[int, ...], tell: OnGradient
) -> Sliced[Tensor]:
    run = yield from run_forward(model, batch)
    yield from run_backward(model, batch, run, site, range(layers[0], layers[-1] + 1), tell)
    return run.values


def _over_tokens(batch: Batch, products: Tensor, over: OverTokens) -> Tensor:
    """[rows, width] -> [width], the sum over the examples of the batch."""
    parts = []
    for example, span in zip(batch.examples, batch.spans, strict=True):
        own = products[span]
        if over is OverTokens.SUM:
            parts.append(own.sum(0))
        elif over is OverTokens.MAX:
            parts.append(own.amax(0))
        else:
            parts.append(own[len(example.prompt) - 1])
    return torch.stack(parts).sum(0)


def _chosen(
    spec: DecoderSpec, examples: Sequence[Example], site: Site, layers: Sequence[int] | None
) -> tuple[int, ...]:
    if site not in spec.sites:
        raise InvalidArgument("site", f"is not of this model; accepted: {', '.join(s.value for s in spec.sites)}")
    last = min((example.place(spec)[0] for example in examples), default=spec.n_layers - 1)
    chosen = tuple(range(last + 1)) if layers is None else tuple(sorted(set(layers)))
    if not chosen or chosen[0] < 0 or chosen[-1] > last:
        raise InvalidArgument("layers", f"are {list(chosen)}; accepted: 0 to {last}, which is where the target is read")
    return chosen

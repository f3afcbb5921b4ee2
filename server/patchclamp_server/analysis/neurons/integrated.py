"""Integrated gradients of the neurons of one layer, with everything before them held fixed.

    attribution_i = Σ_t (a_ti - b_ti) ∫₀¹ ∂F/∂a_ti (b + s (a - b)) ds          t: tokens, i: neurons
    gap = |Σ_i attribution_i - (F(a) - F(b))| / |F(a) - F(b)|                   0 for exact integrals: completeness

a [tokens, width] are the activations of the layer, b the baseline that they start from (0, or a mean), F a number that
the model gives (targets.py) when they stand at that layer. All tokens move along the path together.

The integral is taken by Gauss-Legendre rules on intervals of the path, as many as it takes: of every interval, the
change of F from one end to the other is known, and what the rule misses of it is its error. The worst intervals are
halved until the errors sum to no more than `tolerance` of F(a) - F(b), or `max_steps` gradients have been computed. One
rule does for late layers; what the first ones write decides what all others do with a token, and F changes abruptly
where that is small.

Source: METHODS N6; Sundararajan et al. 2017, Axiomatic Attribution for Deep Networks; layer by layer and for neurons of
MLPs: Dai et al. 2022, Knowledge Neurons in Pretrained Transformers.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from patchclamp_server.analysis.neurons.backward import Replaced, activations_at, run_backward, run_forward
from patchclamp_server.analysis.neurons.batches import MAX_BYTES, ROWS, Batch, check_examples
from patchclamp_server.analysis.neurons.products import DifferentiableModel
from patchclamp_server.analysis.neurons.targets import Example
from patchclamp_server.engine.exclusive import Sliced
from patchclamp_server.errors import InvalidArgument
from patchclamp_server.model.decoder import Decoder
from patchclamp_server.model.sites import Site
from patchclamp_server.model.spec import DecoderSpec

TOLERANCE = 0.01
# What the first layer of the embedded model takes, where all tokens move; one of the last takes 7.
MAX_STEPS = 2048
# Odd, so that one of them is the middle of the interval: where it is halved, F is known there.
_NODES = 7
_RULE = tuple(numbers.tolist() for numbers in np.polynomial.legendre.leggauss(_NODES))


@dataclass(frozen=True, eq=False)
class IntegratedGradients:
    """`attributions` [width], float32 on the CPU: of each neuron, summed over the tokens whose activations moved.

    `value`: F(a); `baseline_value`: F(b). `steps`: gradients that were computed, of which those of intervals that were
    halved did not count in the end.
    """

    attributions: Tensor
    value: float
    baseline_value: float
    steps: int
    tolerance: float

    @property
    def gap(self) -> float:
        """Relative; infinite where F does not change and the attributions do not sum to 0."""
        change = self.value - self.baseline_value
        missed = abs(float(self.attributions.double().sum()) - change)
        return missed / abs(change) if change else (float("inf") if missed else 0.0)

    @property
    def complete(self) -> bool:
        return self.gap <= self.tolerance


def integrated_gradients(
    decoder: Decoder,
    example: Example,
    layer: int,
    *,
    site: Site = Site.MLP_POST,
    baseline: Tensor | None = None,
    positions: Sequence[int] | None = None,
    tolerance: float = TOLERANCE,
    max_steps: int = MAX_STEPS,
    field: str = "examples",
    max_bytes: int = MAX_BYTES,
) -> Sliced[IntegratedGradients]:
    """A work at the exclusive door of the engine.

    `baseline` [width] or [tokens, width]; None is 0. `positions`: tokens whose activations move (None: all), from the
    end where negative; the others keep theirs. A result that is not `complete` had too few `max_steps`, which is for
    the caller to say. A token is charged once for what lies before the layer, and three times a step.

    Raises InvalidArgument for what cannot run or needs more than `max_bytes`, before anything is computed, by
    `field`[0].prompt, `field`[0].target..., site, layer, baseline, positions, tolerance, max_steps.
    """
    spec = decoder.spec
    _check(spec, example, layer, site, baseline, positions, tolerance, max_steps)
    # Activations, baseline and their difference; of each interval and node one row in float64, however long the prompt.
    rows = -(-(max_steps // _NODES + ROWS) // max(1, len(example.tokens)))
    kept = spec.sites[site] * (4 * 6 + 8 * rows)
    check_examples([example], spec, field=field, max_bytes=max_bytes, kept_per_token=kept)
    model = DifferentiableModel.of(decoder)
    x, actual = yield from activations_at(model, Batch.of([example]), layer, site)
    start = _baseline(actual, baseline, positions)
    path = _Path(model, example, layer, site, x, start, actual - start)

    f_start, f_end = yield from path.values((0.0, 1.0))
    allowed = tolerance * abs(f_end - f_start)
    parts = yield from path.integrals([_Interval(0.0, 1.0, f_start, f_end)])
    steps, together = _NODES, max(1, ROWS // (2 * _NODES * len(actual)))
    while sum(part.error for part in parts) > allowed and steps + 2 * _NODES <= max_steps:
        parts.sort(key=lambda part: -part.error)
        affordable = (max_steps - steps) // (2 * _NODES)
        # Where the sum is too large, one at least has more than its share.
        coarse = [part for part in parts if part.error > allowed / len(parts)][: min(together, affordable)]
        halves = [half for part in coarse for half in part.halves()]
        parts = parts[len(coarse) :] + (yield from path.integrals(halves))
        steps += _NODES * len(halves)
    attributions = torch.stack([part.integral for part in parts]).sum(0).float().cpu()
    return IntegratedGradients(attributions, f_end, f_start, steps, tolerance)


@dataclass(frozen=True)
class _Interval:
    """Of the path, from s = start to s = end, with F at both ends."""

    start: float
    end: float
    f_start: float
    f_end: float

    @property
    def nodes(self) -> list[float]:
        return [self.start + (self.end - self.start) * (node + 1) / 2 for node in _RULE[0]]

    @property
    def weights(self) -> list[float]:
        return [(self.end - self.start) / 2 * weight for weight in _RULE[1]]


@dataclass(frozen=True, eq=False)
class _Part:
    """What an interval contributes to the attributions [width], float64, and F in its middle."""

    interval: _Interval
    integral: Tensor
    f_middle: float

    @property
    def error(self) -> float:
        return abs(float(self.integral.sum()) - self.interval.f_end + self.interval.f_start)

    def halves(self) -> tuple[_Interval, _Interval]:
        whole, middle = self.interval, (self.interval.start + self.interval.end) / 2
        first = _Interval(whole.start, middle, whole.f_start, self.f_middle)
        return first, _Interval(middle, whole.end, self.f_middle, whole.f_end)


@dataclass(frozen=True, eq=False)
class _Path:
    """Activations start + s change [tokens, width] of an example at one layer, whose residual stream starts with x."""

    model: DifferentiableModel
    example: Example
    layer: int
    site: Site
    x: Tensor
    start: Tensor
    change: Tensor

    def values(self, at: Sequence[float]) -> Sliced[list[float]]:
        """F at points of the path."""
        values: list[float] = []
        for some in self._batches(at):
            run = yield from run_forward(self.model, self._batch(some), self._replaced(some))
            values += run.values.tolist()
        return values

    def integrals(self, intervals: Sequence[_Interval]) -> Sliced[list[_Part]]:
        """(a - b) ∫ ∂F/∂a ds over each interval, summed over the tokens."""
        values: list[float] = []
        products: list[Tensor] = []  # of each node, [width]
        layers = range(self.layer, self.layer + 1)

        def keep(layer: int, activation: Tensor, gradient: Tensor) -> None:
            by_node = gradient.view(-1, *self.change.shape) * self.change
            products.extend(by_node.sum(1, dtype=torch.float64))

        for some in self._batches([node for interval in intervals for node in interval.nodes]):
            batch = self._batch(some)
            run = yield from run_forward(self.model, batch, self._replaced(some))
            yield from run_backward(self.model, batch, run, self.site, layers, keep)
            values += run.values.tolist()
        parts = []
        for i, interval in enumerate(intervals):
            own = slice(i * _NODES, (i + 1) * _NODES)
            weights = torch.tensor(interval.weights, dtype=torch.float64, device=self.change.device)
            parts.append(_Part(interval, weights @ torch.stack(products[own]), values[own][_NODES // 2]))
        return parts

    def _batches(self, at: Sequence[float]) -> list[Sequence[float]]:
        n = max(1, ROWS // len(self.start))
        return [at[i : i + n] for i in range(0, len(at), n)]

    def _batch(self, at: Sequence[float]) -> Batch:
        return Batch.of([self.example] * len(at))

    def _replaced(self, at: Sequence[float]) -> Replaced:
        values = torch.cat([self.start + s * self.change for s in at])
        return Replaced(self.layer, self.site, self.x.repeat(len(at), 1), values)


def _baseline(actual: Tensor, baseline: Tensor | None, positions: Sequence[int] | None) -> Tensor:
    start = torch.zeros_like(actual) if baseline is None else baseline.to(actual).expand_as(actual).clone()
    if positions is None:
        return start
    kept = actual.clone()
    kept[list(positions)] = start[list(positions)]
    return kept


def _check(
    spec: DecoderSpec,
    example: Example,
    layer: int,
    site: Site,
    baseline: Tensor | None,
    positions: Sequence[int] | None,
    tolerance: float,
    max_steps: int,
) -> None:
    if site not in spec.sites:
        raise InvalidArgument("site", f"is not of this model; accepted: {', '.join(s.value for s in spec.sites)}")
    last, _ = example.place(spec)
    if not 0 <= layer <= last:
        raise InvalidArgument("layer", f"is {layer}; accepted: 0 to {last}, after which the target is read")
    width, n = spec.sites[site], len(example.tokens)
    if baseline is not None and baseline.shape not in ((width,), (n, width)):
        accepted = f"[{width}] or [{n}, {width}]"
        raise InvalidArgument("baseline", f"has the shape {list(baseline.shape)}; accepted: {accepted}")
    if positions is not None and not (positions and all(-n <= position < n for position in positions)):
        raise InvalidArgument("positions", f"are {list(positions)}; accepted: {-n} to {n - 1}, at least one")
    if not 0 < tolerance < 1:
        raise InvalidArgument("tolerance", f"is {tolerance}; accepted: more than 0 and less than 1")
    if max_steps < _NODES:
        raise InvalidArgument("max_steps", f"is {max_steps}; accepted: at least {_NODES}")

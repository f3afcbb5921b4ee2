"""Probes: small models that read a label or a number off activations, as they are stored and as what they compute.

    x_l        (h_l - mean_l) / scale_l                        the state h_l at each layer l of the probe, standardised
    logistic   s_k = Σ_l W_lk · x_l + b_k,  p = softmax(s)
    prototype  s_k = -Σ_l |x_l - c_lk|² / temperature,  p = softmax(s)
    ridge      the number Σ_l W_l · x_l + b
    calibrated logit p'_t = slope · logit p_t + intercept      for the target t; the others share the rest as before

The scores of prototypes are linear as well, since |x|² is the same for every class: W_k = 2 c_k / temperature and
b_k = -|c_k|² / temperature. So every probe is served as one map of the states: s = Σ_l A_l h_l + a.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from patchclamp_server.artifacts.types import Artifact, ArtifactKind
from patchclamp_server.errors import InvalidArgument
from patchclamp_server.model.sites import PUBLIC_SITES, Site

Doubles = NDArray[np.float64]
LOGISTIC, RIDGE, PROTOTYPE = "logistic", "ridge", "prototype"
METHODS = (LOGISTIC, RIDGE, PROTOTYPE)
MAX_CLASSES = 256
LARGEST = float(np.finfo(np.float32).max)
_OF_LAYER = re.compile(r"layer\.(0|[1-9][0-9]{0,5})\.(weight|centres|mean|scale)")
_DIMENSIONS = {"weight": 2, "centres": 2, "mean": 1, "scale": 1, "bias": 1, "temperature": 1, "calibration": 1}
_ACCEPTED = "layer.<l>.weight, layer.<l>.centres, layer.<l>.mean, layer.<l>.scale, bias, temperature and calibration"


def probe_layers(shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
    """Returns the layers of the tensors of a probe. Raises InvalidArgument for names and shapes that none has."""
    layers = set()
    for name, shape in shapes.items():
        match = _OF_LAYER.fullmatch(name)
        kind = match[2] if match else name
        if match is None and name not in ("bias", "temperature", "calibration"):
            raise InvalidArgument("tensors", f"{name!r:.200} is not a tensor of a probe; accepted: {_ACCEPTED}")
        if len(shape) != _DIMENSIONS[kind]:
            message = f"{name} must have {_DIMENSIONS[kind]} dimension(s), not the shape {list(shape)}"
            raise InvalidArgument("tensors", message)
        if match:
            layers.add(int(match[1]))
    if not layers:
        raise InvalidArgument("tensors", "a probe needs at least one layer")
    return tuple(sorted(layers))


def check_probe(tensors: Mapping[str, Tensor]) -> None:
    """Checks that the tensors belong together. Raises InvalidArgument, which names the one that does not."""
    layers = probe_layers({name: tuple(tensor.shape) for name, tensor in tensors.items()})
    prototypes = f"layer.{layers[0]}.centres" in tensors
    matrix = "centres" if prototypes else "weight"
    wanted = {matrix, "mean", "scale"} if f"layer.{layers[0]}.mean" in tensors else {matrix}
    n_classes, width = tensors.get(f"layer.{layers[0]}.{matrix}", torch.empty(0, 0)).shape
    if not 1 <= n_classes <= MAX_CLASSES or not width:
        message = f"layer.{layers[0]}.{matrix} must be [classes, width], with at most {MAX_CLASSES} classes"
        raise InvalidArgument("tensors", message)
    shapes: dict[str, tuple[int, ...]] = {
        f"layer.{layer}.{kind}": (width,) for layer in layers for kind in wanted - {matrix}
    }
    shapes |= {f"layer.{layer}.{matrix}": (n_classes, width) for layer in layers}
    shapes |= {"temperature": (1,)} if prototypes else {"bias": (n_classes,)}
    if "calibration" in tensors:
        shapes["calibration"] = (2,)
    for name, shape in shapes.items():
        tensor = tensors.get(name)
        if tensor is None or tuple(tensor.shape) != shape or not tensor.dtype.is_floating_point:
            has = "is missing" if tensor is None else f"is {str(tensor.dtype).removeprefix('torch.')} {[*tensor.shape]}"
            raise InvalidArgument("tensors", f"{name} {has}; this probe needs floats {list(shape)}")
        if not bool(torch.isfinite(tensor).all()):
            raise InvalidArgument("tensors", f"{name} holds NaN or Inf")
        if (name == "temperature" or name.endswith(".scale")) and float(tensor.min()) <= 0.0:
            raise InvalidArgument("tensors", f"{name} must be above 0")
    if unexpected := tensors.keys() - shapes.keys():
        raise InvalidArgument("tensors", f"{min(unexpected)} does not belong to this probe; it has {', '.join(shapes)}")


@dataclass(frozen=True, eq=False)
class TargetScore:
    """The target of a probe as one number s = Σ_l direction_l · h_l + bias: its calibrated log-odds, or with
    `is_number` the number of a ridge probe itself."""

    directions: Mapping[int, Doubles]
    bias: float
    is_number: bool


@dataclass(frozen=True, eq=False)
class Probe:
    """A probe as it is served: weights[layer] [classes, width] and bias [classes] are of states as they are, and not
    standardised. Ridge has one row, and neither labels nor target. `calibration`: slope and intercept."""

    method: str
    site: Site
    weights: Mapping[int, Doubles]
    bias: Doubles
    labels: tuple[str, ...] = ()
    target: int = 0
    calibration: tuple[float, float] = (1.0, 0.0)

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(sorted(self.weights))

    @property
    def is_number(self) -> bool:
        return self.method == RIDGE

    def scores(self, states: Mapping[int, NDArray[np.floating]]) -> Doubles:
        """Returns s [n, classes] of states [n, width] by layer."""
        total = np.zeros((1, len(self.bias))) + self.bias
        for layer in self.layers:
            total = total + states[layer].astype(np.float64) @ self.weights[layer].T
        return total

    def probabilities(self, scores: Doubles) -> Doubles:
        """Returns the calibrated probability [n, classes] of every label; of ridge the scores themselves."""
        if self.is_number:
            return scores
        others = np.delete(scores, self.target, axis=1)
        target = logistic(self.log_odds(scores))
        rest = np.exp(others - _logsumexp(others)[:, None]) * (1.0 - target)[:, None]
        return np.insert(rest, self.target, target, axis=1)

    def log_odds(self, scores: Doubles) -> Doubles:
        """Returns the calibrated log-odds [n] of the target; of ridge the number."""
        if self.is_number:
            number: Doubles = scores[:, 0]
            return number
        slope, intercept = self.calibration
        return slope * log_odds(scores, self.target) + intercept

    def target_score(self) -> TargetScore | None:
        """Returns the score of a probe of one number or two labels; None for more labels, whose log-odds are no linear
        map of the states."""
        if self.is_number:
            return TargetScore({layer: rows[0] for layer, rows in self.weights.items()}, float(self.bias[0]), True)
        if len(self.labels) != 2:
            return None
        slope, intercept = self.calibration
        own, other = self.target, 1 - self.target
        directions = {layer: slope * (rows[own] - rows[other]) for layer, rows in self.weights.items()}
        return TargetScore(directions, slope * float(self.bias[own] - self.bias[other]) + intercept, False)


def log_odds(scores: Doubles, target: int) -> Doubles:
    """Returns logit p_target [n] of p = softmax(scores [n, classes])."""
    odds: Doubles = scores[:, target] - _logsumexp(np.delete(scores, target, axis=1))
    return odds


def logistic(x: Doubles) -> Doubles:
    """Returns 1 / (1 + exp(-x)), without overflow."""
    small = np.exp(-np.abs(x))
    return np.where(x >= 0, 1.0, small) / (1.0 + small)


def _logsumexp(scores: Doubles) -> Doubles:
    largest = scores.max(axis=1)
    total: Doubles = largest + np.log(np.exp(scores - largest[:, None]).sum(axis=1))
    return total


def probe_of(provenance: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Probe:
    """Returns the probe of tensors that `check_probe` accepted. Raises InvalidArgument on a field of `provenance` that
    does not say, or not of these tensors, what a probe needs: `method`, `site`, `labels` and `target`."""
    layers = probe_layers({name: tuple(tensor.shape) for name, tensor in tensors.items()})
    prototypes = f"layer.{layers[0]}.centres" in tensors
    method = provenance.get("method")
    accepted = (PROTOTYPE,) if prototypes else (LOGISTIC, RIDGE)
    if method not in accepted:
        message = f"expected {' or '.join(accepted)} for these tensors, got {method!r:.80}"
        raise InvalidArgument("provenance.method", message)
    sites = {site.value: site for site in PUBLIC_SITES}
    if (name := provenance.get("site")) not in sites:
        raise InvalidArgument("provenance.site", f"expected one of {', '.join(sites)}, got {name!r:.80}")
    standardised = {layer: _standardised(tensors, layer) for layer in layers}
    matrices = {layer: _doubles(tensors[f"layer.{layer}.{'centres' if prototypes else 'weight'}"]) for layer in layers}
    if prototypes:
        temperature = float(tensors["temperature"][0])
        bias = -sum(np.square(centres).sum(axis=1) for centres in matrices.values()) / temperature
        matrices = {layer: 2.0 * centres / temperature for layer, centres in matrices.items()}
    else:
        bias = _doubles(tensors["bias"])
    weights = {layer: matrix / standardised[layer][1] for layer, matrix in matrices.items()}
    bias = bias - sum(weights[layer] @ standardised[layer][0] for layer in layers)
    labels, target = _labels(provenance, len(bias), str(method))
    slope, intercept = tensors["calibration"].tolist() if "calibration" in tensors else (1.0, 0.0)
    probe = Probe(str(method), sites[str(name)], weights, bias, labels, target, (slope, intercept))
    _check_finite(probe)
    return probe


def _check_finite(probe: Probe) -> None:
    """States are read in float32: what is beyond it would be no number there."""
    numbers = [*probe.weights.values(), probe.bias]
    if (score := probe.target_score()) is not None:
        numbers += [*score.directions.values(), np.array([score.bias])]
    if not all(bool((np.abs(each) <= LARGEST).all()) for each in numbers):
        what = "weight / scale, times the slope of the calibration, or the bias of states as they are,"
        raise InvalidArgument("tensors", f"{what} is beyond the largest float32, {LARGEST:.1e}")


def stored_probe(artifact: Artifact) -> Probe:
    """Returns the probe of a stored artifact. Raises InvalidArgument, without a field, for another kind and for one
    whose provenance does not say what it is."""
    if artifact.info.kind is not ArtifactKind.PROBE:
        raise InvalidArgument("", f"{artifact.info.id} is a {artifact.info.kind.value}, not a probe")
    try:
        return probe_of(artifact.info.provenance, artifact.tensors)
    except InvalidArgument as error:
        raise InvalidArgument("", f"{artifact.info.id} cannot be served: {error}") from error


def _standardised(tensors: Mapping[str, Tensor], layer: int) -> tuple[Doubles, Doubles]:
    """Returns mean and scale [width] of a layer."""
    if f"layer.{layer}.mean" in tensors:
        return _doubles(tensors[f"layer.{layer}.mean"]), _doubles(tensors[f"layer.{layer}.scale"])
    width = next(t.shape[1] for name, t in tensors.items() if name.startswith(f"layer.{layer}.") and t.dim() == 2)
    return np.zeros(width), np.ones(width)


def _labels(provenance: Mapping[str, Any], n_classes: int, method: str) -> tuple[tuple[str, ...], int]:
    if method == RIDGE:
        if n_classes != 1:
            raise InvalidArgument("provenance.method", f"a ridge probe has one row, these tensors have {n_classes}")
        return (), 0
    labels, target = provenance.get("labels"), provenance.get("target")
    if not isinstance(labels, list | tuple) or not all(isinstance(label, str) for label in labels):
        raise InvalidArgument("provenance.labels", "expected the names of the labels")
    if len(labels) != n_classes or len(set(labels)) != n_classes or n_classes < 2:
        raise InvalidArgument(
            "provenance.labels", f"{len(labels)} labels for {n_classes} classes; at least 2, all different"
        )
    if target not in labels:
        raise InvalidArgument("provenance.target", f"expected one of the labels, got {target!r:.80}")
    return tuple(labels), labels.index(target)


def _doubles(tensor: Tensor) -> Doubles:
    found: Doubles = tensor.double().numpy()
    return found

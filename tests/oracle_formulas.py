"""What one edit does to one activation row, one condition says of it, and which tokens a scope holds.

Written from proto/patchclamp/v1/program.proto alone, in float64, one row at a time: this is what the server is
compared with, so it shares no code with it but the message types.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from patchclamp_server.artifacts.types import AffineMap, Subspace
from patchclamp_server.interventions.kinds.affine import Affine
from patchclamp_server.interventions.kinds.features import FeatureEdit
from patchclamp_server.interventions.kinds.patch import Patch
from patchclamp_server.interventions.kinds.rotate_in_plane import RotateInPlane
from patchclamp_server.interventions.program import (
    AddVector,
    CapProjection,
    Comparison,
    Condition,
    Edit,
    EditKind,
    HeadEdit,
    LowRank,
    NeuronEdit,
    NeuronOp,
    Phase,
    ProjectOut,
    ReplaceVector,
    RotateTowards,
    Scope,
    SetProjection,
    TokenSelector,
    Vector,
)


class StoredArtifact(Protocol):
    @property
    def info(self) -> Any: ...
    def direction(self, layer: int) -> Tensor: ...
    @property
    def tensors(self) -> Mapping[str, Tensor]: ...
    def neurons(self, layer: int) -> tuple[Tensor, Tensor | None]: ...
    def subspace(self, layer: int) -> Subspace: ...
    def affine_map(self, layer: int) -> AffineMap: ...


Artifacts = Mapping[str, StoredArtifact]


def vector_at(vector: Vector, layers: Sequence[int], layer: int, artifacts: Artifacts) -> Tensor:
    """The vector of a message at one of the layers of its edit, float64 [width]."""
    if vector.artifact is not None:
        row = vector.artifact_layer if vector.artifact_layer is not None else layer
        v = artifacts[vector.artifact].direction(row)
    else:
        assert vector.values is not None
        v = vector.values if vector.values.ndim == 1 else vector.values[list(layers).index(layer)]
    v = v.double()
    return v / v.norm() if vector.unit else v


def target(
    kind: EditKind,
    h: Tensor,
    layers: Sequence[int],
    layer: int,
    artifacts: Artifacts,
    n_heads: int,
    read: Tensor | None = None,
) -> Tensor:
    """t(h) for one row h [width]. `read`: the row that a transcoder reads, of another site."""
    if isinstance(kind, LowRank):
        if kind.subspace:
            stored = artifacts[kind.subspace].subspace(layer)
            rotation, weight, bias = stored.rotation, stored.weight, stored.bias
        else:
            rotation, weight, bias = kind.rotation, kind.weight, kind.bias
        assert rotation is not None
        assert weight is not None
        assert bias is not None
        rotation, weight, bias = rotation.double(), weight.double(), bias.double()
        return h.add(rotation.T @ (weight @ h + bias - rotation @ h))
    if isinstance(kind, Affine):
        affine = artifacts[kind.affine_map].affine_map(layer) if kind.affine_map else kind
        matrix = affine.matrix
        if matrix is None:
            assert affine.left is not None
            assert affine.right is not None
            matrix = affine.left.double() @ affine.right.double().T
        return matrix.double() @ h + (0.0 if affine.bias is None else affine.bias.double())
    if isinstance(kind, RotateInPlane):
        return _turned_in_plane(kind, h, layer, artifacts)
    if isinstance(kind, FeatureEdit):
        return _feature_target(kind, h, artifacts, read)
    if isinstance(kind, NeuronEdit):
        return _neuron_target(kind, h, layer, artifacts)
    if isinstance(kind, HeadEdit):
        return _head_target(kind, h, layers, layer, n_heads)
    v = vector_at(kind.vector, layers, layer, artifacts)
    u: Tensor = v / v.norm()
    along = float(h @ u)
    if isinstance(kind, AddVector):
        return h + v
    if isinstance(kind, ProjectOut):
        return h - u * along
    if isinstance(kind, CapProjection):
        capped = along
        if kind.min is not None:
            capped = max(capped, kind.min)
        if kind.max is not None:
            capped = min(capped, kind.max)
        return h + u * (capped - along)
    if isinstance(kind, SetProjection):
        return h + u * (kind.target - along)
    if isinstance(kind, ReplaceVector):
        return v.clone()
    assert isinstance(kind, RotateTowards)
    return _rotated(h, u, kind.radians)


def source_row(kind: Patch, layer: int, position: int, prompt_length: int, artifacts: Artifacts) -> Tensor | None:
    """The row that a patch puts at a position, float64 [width]; None where it has none. The last pair that names the
    position holds."""
    assert kind.source is not None
    own = kind.source.positions.tolist()
    rows = kind.source.rows[layer if kind.source_layer is None else kind.source_layer]
    found = None
    for at, wanted in kind.positions or [(p, p) for p in own]:
        if (at if at >= 0 else prompt_length + at) == position:
            found = own.index(wanted if wanted >= 0 else kind.source.length + wanted)
    return None if found is None else rows[found].double()


def patched(kind: Patch, source: Tensor, h: Tensor, n_heads: int) -> Tensor:
    """t(h) for the source row that is mapped to the position of h."""
    if kind.heads:
        t = h.clone().view(n_heads, -1)
        for head in kind.heads:
            t[head] = source.view(n_heads, -1)[head]
        return t.view(-1)
    if kind.rotation is not None:
        basis = kind.rotation.double()
        return h + basis.T @ (basis @ (source - h))
    t = h.clone() if kind.units else source.clone()
    for unit in kind.units:
        t[unit] = source[unit]
    return t


def probe_values(artifact: StoredArtifact, states: Mapping[int, Tensor], *, all_classes: bool) -> list[float]:
    """The probability of the target of a probe artifact, of all its labels, or its number, for one token in float64."""
    stored = {name: tensor.double() for name, tensor in artifact.tensors.items()}
    said = artifact.info.provenance
    inputs = {}
    for layer in artifact.info.layers:
        h = states[layer].double()
        mean, scale = stored.get(f"layer.{layer}.mean", 0.0), stored.get(f"layer.{layer}.scale", 1.0)
        inputs[layer] = (h - mean) / scale
    if said["method"] == "prototype":
        distances = [(x - stored[f"layer.{layer}.centres"]).square().sum(1) for layer, x in inputs.items()]
        scores = -torch.stack(distances).sum(0) / stored["temperature"]
    else:
        scores = stored["bias"] + sum(stored[f"layer.{layer}.weight"] @ x for layer, x in inputs.items())
    if said["method"] == "ridge":
        return [float(scores[0])]
    plain, own = scores.softmax(0), said["labels"].index(said["target"])
    slope, intercept = stored.get("calibration", torch.tensor([1.0, 0.0])).tolist()
    odds = float(scores[own] - scores[torch.arange(len(scores)) != own].logsumexp(0))
    target = 1.0 / (1.0 + math.exp(-(slope * odds + intercept)))
    if not all_classes:
        return [target]
    rest = (1.0 - target) / (1.0 - float(plain[own]))
    return [target if k == own else float(p) * rest for k, p in enumerate(plain)]


def _turned_in_plane(kind: RotateInPlane, h: Tensor, layer: int, artifacts: Artifacts) -> Tensor:
    stored = artifacts[kind.subspace].subspace(layer) if kind.subspace else None
    plane = kind.plane if stored is None else stored.rotation
    centre = kind.centre if stored is None or kind.centre is not None else stored.centre
    assert plane is not None
    x = plane[0].double() / plane[0].double().norm()
    y = plane[1].double() - (plane[1].double() @ x) * x
    y = y / y.norm()
    away = h if centre is None else h - centre.double()
    angle = math.atan2(float(away @ y), float(away @ x)) + kind.radians
    length = math.hypot(float(away @ x), float(away @ y))
    return h + (length * math.cos(angle) - away @ x) * x + (length * math.sin(angle) - away @ y) * y


def all_features(artifact: StoredArtifact, h: Tensor) -> Tensor:
    """f [features] of one row h [width], in float64."""
    stored = {name: tensor.double() for name, tensor in artifact.tensors.items()}
    said = artifact.info.provenance
    x = h.double() - stored["decoder_bias"] if said["subtracted"] == "decoder_bias" else h.double()
    p = stored["encoder"] @ x + stored["encoder_bias"]
    f = p.clamp(min=0.0)
    if "threshold" in stored:
        f = f * (p > stored["threshold"])
    if said["function"] == "topk":
        f = f * (p >= p.sort(descending=True).values[int(said["k"]) - 1])
    return f


def _feature_target(kind: FeatureEdit, h: Tensor, artifacts: Artifacts, read: Tensor | None) -> Tensor:
    """One feature after the other, each of h as it came."""
    artifact = artifacts[kind.autoencoder]
    f, t = all_features(artifact, h if read is None else read), h.clone()
    values = list(kind.values) * (len(kind.features) if len(kind.values) == 1 else 1)
    for i, feature in enumerate(kind.features):
        before = float(f[feature])
        if kind.op is NeuronOp.SET:
            goal = values[i]
        elif kind.op is NeuronOp.SCALE:
            goal = values[i] * before
        elif kind.op is NeuronOp.ADD:
            goal = before + values[i]
        else:
            low = -math.inf if kind.min is None else kind.min
            high = math.inf if kind.max is None else kind.max
            goal = min(max(before, low), high)
        t = t + (goal - before) * artifact.tensors["decoder"][feature].double()
    return t


def _rotated(h: Tensor, u: Tensor, radians: float) -> Tensor:
    length = float(h.norm())
    along = float(h @ u)
    across = h / length - (along / length) * u
    if float(across.norm()) < 1e-6:
        return h.clone()
    # The component of u that is orthogonal to h, within the plane of both.
    w: Tensor = u - (along / length) * (h / length)
    w = w / w.norm()
    angle = min(radians, math.acos(max(-1.0, min(1.0, along / length))))
    return (h / length * math.cos(angle) + w * math.sin(angle)) * length


def _neuron_target(kind: NeuronEdit, a: Tensor, layer: int, artifacts: Artifacts) -> Tensor:
    neurons, values = list(kind.neurons), list(kind.values)
    if kind.neuron_set is not None:
        indices, stored = artifacts[kind.neuron_set].neurons(layer)
        neurons = [int(index) for index in indices]
        if not values and stored is not None:
            values = [float(value) for value in stored]
    if len(values) == 1:
        values = values * len(neurons)
    t = a.clone()
    for i, neuron in enumerate(neurons):
        if kind.op is NeuronOp.SET:
            t[neuron] = values[i]
        elif kind.op is NeuronOp.SCALE:
            t[neuron] = values[i] * a[neuron]
        elif kind.op is NeuronOp.ADD:
            t[neuron] = a[neuron] + values[i]
        else:
            low = -math.inf if kind.min is None else kind.min
            high = math.inf if kind.max is None else kind.max
            t[neuron] = min(max(float(a[neuron]), low), high)
    return t


def _head_target(kind: HeadEdit, z: Tensor, layers: Sequence[int], layer: int, n_heads: int) -> Tensor:
    t = z.clone().view(n_heads, -1)
    for i, head in enumerate(kind.heads):
        if kind.uniform:
            # The heads are those of the queries: no key is nearer to 0 than another.
            t[head] = 0.0
        elif kind.scale is not None:
            t[head] = kind.scale * t[head]
        else:
            assert kind.mean is not None
            mean = kind.mean if kind.mean.ndim == 2 else kind.mean[list(layers).index(layer)]
            t[head] = mean[i].double()
    return t.view(-1)


def edited(
    edit: Edit,
    strength: float,
    h: Tensor,
    layers: Sequence[int],
    layer: int,
    artifacts: Artifacts,
    n_heads: int,
    read: Tensor | None = None,
) -> Tensor:
    """h + strength · (t(h) - h), then back to the norm of h where the edit asks for it. h float64 [width]; `read` is
    the row that a patch has for the position of h, or the input of a transcoder."""
    if isinstance(edit.kind, Patch):
        assert read is not None
        t = patched(edit.kind, read, h, n_heads)
    else:
        t = target(edit.kind, h, layers, layer, artifacts, n_heads, read)
    changed = h + strength * (t - h)
    if edit.preserve_norm:
        changed = changed * (h.norm() / changed.norm())
    return changed


def measured(condition: Condition, h: Tensor, artifacts: Artifacts) -> float:
    """What the condition compares with its threshold: h · v / |v|, the cosine, the probability of a probe, or the
    activation of a feature."""
    if condition.probe:
        artifact = artifacts[condition.probe]
        return probe_values(artifact, {max(artifact.info.layers): h}, all_classes=False)[0]
    if condition.feature is not None:
        return float(all_features(artifacts[condition.feature.autoencoder], h)[condition.feature.feature])
    v = vector_at(condition.vector, (condition.layer,), condition.layer, artifacts)
    projection = float(h @ v) / float(v.norm())
    return projection / float(h.norm()) if condition.cosine else projection


def holds(condition: Condition, value: float) -> bool:
    if condition.comparison is Comparison.ABOVE:
        return value > condition.threshold
    return value < condition.threshold


def in_scope(
    scope: Scope, position: int, tokens: Sequence[int], prompt_length: int, roles: Sequence[str] | None
) -> bool:
    """Tokens that match any include (none given: all) and no exclude."""

    def matches(selector: TokenSelector) -> bool:
        return _matches(selector, position, tokens, prompt_length, roles)

    included = not scope.include or any(matches(selector) for selector in scope.include)
    return included and not any(matches(selector) for selector in scope.exclude)


def _matches(
    selector: TokenSelector, position: int, tokens: Sequence[int], prompt_length: int, roles: Sequence[str] | None
) -> bool:
    in_prompt = position < prompt_length
    if selector.phase is not None and in_prompt != (selector.phase is Phase.PROMPT):
        return False
    if selector.positions is not None:
        start, end = selector.positions.start, selector.positions.end
        if position < (start if start >= 0 else prompt_length + start):
            return False
        # An end of 0 after a negative start is the end of the prompt.
        from_end = end is not None and (end < 0 or (end == 0 and start < 0))
        if end is not None and position >= (prompt_length + end if from_end else end):
            return False
    if selector.last_k is not None and not prompt_length - selector.last_k <= position < prompt_length:
        return False
    if selector.token_ids and tokens[position] not in selector.token_ids:
        return False
    if selector.role is not None:
        assert roles is not None
        # What the model produces is the assistant's turn.
        return selector.role == (roles[position] if in_prompt else "assistant")
    return True

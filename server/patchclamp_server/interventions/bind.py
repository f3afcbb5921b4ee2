"""Binds a Program to the model that will run it: every check, every artifact resolved, every number finite.

The result is what the engine compiles into a step. Errors carry the field path of the request.
"""

import hashlib
import math
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

import torch
from torch import Tensor

from patchclamp_server.artifacts.types import Artifact, ArtifactKind
from patchclamp_server.errors import FailedPrecondition, InvalidArgument, RequestError
from patchclamp_server.interventions.program import (
    RESIDUAL_SITES,
    AddVector,
    CapProjection,
    Comparison,
    Condition,
    Edit,
    HeadEdit,
    LogitLensReadout,
    LowRank,
    NeuronEdit,
    NeuronOp,
    NeuronReadout,
    Program,
    ProjectionReadout,
    ProjectOut,
    Readout,
    ReplaceVector,
    RotateTowards,
    Scope,
    SetProjection,
    Site,
    TopNeuronsReadout,
    Vector,
)
from patchclamp_server.interventions.scopes import check_scope
from patchclamp_server.model.info import ModelInfo

MAX_EDITS = 256
MAX_READOUTS = 64
MAX_TOP_K = 128


class ArtifactLookup(Protocol):
    """Where artifact references are resolved; raises NotFound for an unknown one."""

    def get(self, ref: str) -> Artifact: ...


class Kind(Enum):
    """Kinds of edit that one group of operators applies."""

    ADD = "add"
    PROJECT = "project"
    REPLACE = "replace"
    ROTATE = "rotate"
    LOW_RANK = "low_rank"
    NEURONS = "neurons"
    HEADS = "heads"


@dataclass(frozen=True, eq=False)
class BoundCondition:
    site: Site
    layer: int
    unit: Tensor  # [width]
    # Holds when sign * value > sign * threshold.
    sign: float
    threshold: float
    cosine: bool
    scope: Scope


@dataclass(frozen=True, eq=False)
class BoundEdit:
    """An edit with its numbers. `payload[layer]` by kind:

    ADD, REPLACE (v [width],); PROJECT, ROTATE (unit v [width],); LOW_RANK (R, W [rank, width], b [rank]);
    NEURONS (index, factor, offset, low, high, each [n]): t(a) = clip(factor a + offset, low, high);
    HEADS (index, factor [n], offset [n, head_dim]): t(z) = factor z + offset.
    `bounds` is (low, high) of a PROJECT, and (radians, 0) of a ROTATE.
    """

    name: str
    kind: Kind
    site: Site
    layers: tuple[int, ...]
    payload: dict[int, tuple[Tensor, ...]]
    strength: float
    scope: Scope
    gate: BoundCondition | None
    latched: bool
    preserve_norm: bool
    bounds: tuple[float, float]
    # Over everything but name, strength and scope.
    fingerprint: bytes


@dataclass(frozen=True, eq=False)
class BoundReadout:
    """`vectors[layer]` [n, width] for a projection; `ids` of neurons; `k` of the others."""

    name: str
    kind: type
    site: Site
    layers: tuple[int, ...]
    scope: Scope
    vectors: dict[int, Tensor]
    ids: tuple[int, ...]
    k: int


@dataclass(frozen=True, eq=False)
class BoundAbort:
    name: str
    condition: BoundCondition


@dataclass(frozen=True, eq=False)
class BoundProgram:
    program: Program
    fingerprint: str
    edits: tuple[BoundEdit, ...]
    readouts: tuple[BoundReadout, ...]
    aborts: tuple[BoundAbort, ...]


def bind(
    program: Program,
    info: ModelInfo,
    artifacts: ArtifactLookup | None = None,
    *,
    prompt_roles: tuple[str, ...] | None = None,
) -> BoundProgram:
    """Checks `program` against the model and resolves its artifacts.

    Raises InvalidArgument (field path), FailedPrecondition (artifact of another model) or NotFound (artifact).
    """
    if len(program.edits) > MAX_EDITS:
        raise InvalidArgument("program.edits", f"at most {MAX_EDITS} edits, got {len(program.edits)}")
    if len(program.readouts) > MAX_READOUTS:
        raise InvalidArgument("program.readouts", f"at most {MAX_READOUTS} readouts, got {len(program.readouts)}")
    binder = _Binder(info, artifacts, prompt_roles is not None)
    _check_names([e.name for e in program.edits], "program.edits")
    _check_names([r.name for r in program.readouts], "program.readouts")
    edits = tuple(binder.edit(e, f"program.edits[{i}]", i) for i, e in enumerate(program.edits))
    readouts = tuple(binder.readout(r, f"program.readouts[{i}]", i) for i, r in enumerate(program.readouts))
    aborts = tuple(
        BoundAbort(a.name or str(i), binder.condition(a.condition, f"program.abort_when[{i}].condition"))
        for i, a in enumerate(program.abort_when)
    )
    digest = hashlib.sha256()
    for edit in edits:
        digest.update(repr((edit.name, edit.strength, edit.scope)).encode() + edit.fingerprint)
    for readout in readouts:
        digest.update(repr((readout.name, readout.kind.__name__, readout.site, readout.layers, readout.scope)).encode())
        digest.update(repr((readout.ids, readout.k)).encode())
        for vectors in readout.vectors.values():
            digest.update(_bytes(vectors))
    for abort in aborts:
        digest.update(abort.name.encode() + _condition_bytes(abort.condition))
    return BoundProgram(program, "sha256:" + digest.hexdigest(), edits, readouts, aborts)


def _check_names(names: list[str], path: str) -> None:
    seen: set[str] = set()
    for i, name in enumerate(names):
        if name and name in seen:
            raise InvalidArgument(f"{path}[{i}].name", f"{name!r} is used twice")
        seen.add(name)


def _bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().numpy().tobytes()


def _condition_bytes(condition: BoundCondition) -> bytes:
    head = (condition.site, condition.layer, condition.sign, condition.threshold, condition.cosine, condition.scope)
    return repr(head).encode() + _bytes(condition.unit)


class _Binder:
    def __init__(self, info: ModelInfo, artifacts: ArtifactLookup | None, has_roles: bool) -> None:
        self.info = info
        self.artifacts = artifacts
        self.has_roles = has_roles

    def edit(self, edit: Edit, path: str, index: int) -> BoundEdit:
        width = self.width(edit.site, path)
        self.scope(edit.scope, f"{path}.scope")
        _finite(edit.strength, f"{path}.strength")
        layers = self.edit_layers(edit, path)
        bounds = (-math.inf, math.inf)
        match edit.kind:
            case AddVector(vector) | ReplaceVector(vector):
                kind = Kind.ADD if isinstance(edit.kind, AddVector) else Kind.REPLACE
                field = "add" if kind is Kind.ADD else "replace"
                payload = self.vectors(vector, edit.site, layers, width, f"{path}.{field}.vector", unit=vector.unit)
            case ProjectOut(vector):
                kind, bounds = Kind.PROJECT, (0.0, 0.0)
                payload = self.vectors(vector, edit.site, layers, width, f"{path}.project_out.vector", unit=True)
            case SetProjection(vector, target):
                kind, bounds = Kind.PROJECT, (target, target)
                _finite(target, f"{path}.set_projection.target")
                payload = self.vectors(vector, edit.site, layers, width, f"{path}.set_projection.vector", unit=True)
            case CapProjection(vector, low, high):
                kind, bounds = Kind.PROJECT, _bounds(low, high, f"{path}.cap_projection")
                payload = self.vectors(vector, edit.site, layers, width, f"{path}.cap_projection.vector", unit=True)
            case RotateTowards(vector, radians):
                if not 0.0 <= radians <= math.pi:
                    raise InvalidArgument(f"{path}.rotate_towards.radians", f"must be in [0, pi], got {radians}")
                kind, bounds = Kind.ROTATE, (radians, 0.0)
                payload = self.vectors(vector, edit.site, layers, width, f"{path}.rotate_towards.vector", unit=True)
            case LowRank():
                kind = Kind.LOW_RANK
                payload = dict.fromkeys(layers, self.low_rank(edit.kind, width, f"{path}.low_rank"))
            case NeuronEdit():
                kind = Kind.NEURONS
                if edit.site is not Site.MLP_POST:
                    raise InvalidArgument(f"{path}.site", f"neurons are edited at mlp_post, not {edit.site.value}")
                payload = self.neurons(edit.kind, layers, width, f"{path}.neurons")
            case HeadEdit():
                kind = Kind.HEADS
                if edit.site is not Site.ATTN_Z:
                    raise InvalidArgument(f"{path}.site", f"heads are edited at attn_z, not {edit.site.value}")
                payload = self.heads(edit.kind, layers, f"{path}.heads")
        if edit.preserve_norm and kind in (Kind.NEURONS, Kind.HEADS):
            raise InvalidArgument(f"{path}.preserve_norm", f"is for vector edits, not {kind.value}")
        gate, latched = None, False
        if edit.gate is not None:
            gate, latched = self.condition(edit.gate.condition, f"{path}.gate.condition"), edit.gate.latched
            first = (min(layers), edit.site.order)
            if (gate.layer, gate.site.order) >= first:
                raise InvalidArgument(
                    f"{path}.gate.condition",
                    f"{gate.site.value} of layer {gate.layer} does not come before the edited {edit.site.value} "
                    f"of layer {first[0]}",
                )
        digest = hashlib.sha256(repr((kind, edit.site, layers, edit.preserve_norm, bounds, latched)).encode())
        for layer in layers:
            for tensor in payload[layer]:
                digest.update(_bytes(tensor))
        if gate is not None:
            digest.update(_condition_bytes(gate))
        return BoundEdit(
            edit.name or str(index),
            kind,
            edit.site,
            layers,
            payload,
            edit.strength,
            edit.scope,
            gate,
            latched,
            edit.preserve_norm,
            bounds,
            digest.digest(),
        )

    def readout(self, readout: Readout, path: str, index: int) -> BoundReadout:
        width = self.width(readout.site, path)
        self.scope(readout.scope, f"{path}.scope")
        layers = self.layers(readout.layers, readout.all_layers, path)
        vectors: dict[int, Tensor] = {}
        ids: tuple[int, ...] = ()
        k = 0
        match readout.kind:
            case ProjectionReadout(given):
                if not given:
                    raise InvalidArgument(f"{path}.projection.vectors", "at least one vector is needed")
                each = [
                    self.vectors(v, readout.site, layers, width, f"{path}.projection.vectors[{i}]", unit=v.unit)
                    for i, v in enumerate(given)
                ]
                vectors = {layer: torch.stack([payload[layer][0] for payload in each]) for layer in layers}
            case NeuronReadout(ids):
                self.neuron_site(readout.site, f"{path}.site")
                _indices(ids, width, f"{path}.neurons.neurons", "neuron")
            case TopNeuronsReadout(k):
                self.neuron_site(readout.site, f"{path}.site")
                _top_k(k, width, f"{path}.top_neurons.k")
            case LogitLensReadout(k):
                if readout.site not in RESIDUAL_SITES:
                    raise InvalidArgument(
                        f"{path}.site", f"the logit lens reads a residual site, not {readout.site.value}"
                    )
                _top_k(k, self.info.vocab_size, f"{path}.logit_lens.k")
        name = readout.name or str(index)
        return BoundReadout(name, type(readout.kind), readout.site, layers, readout.scope, vectors, ids, k)

    def condition(self, condition: Condition, path: str) -> BoundCondition:
        width = self.width(condition.site, path)
        self.scope(condition.scope, f"{path}.scope")
        layers = self.layers((condition.layer,), False, path, field="layer")
        _finite(condition.threshold, f"{path}.threshold")
        unit = self.vectors(condition.vector, condition.site, layers, width, f"{path}.vector", unit=True)
        sign = 1.0 if condition.comparison is Comparison.ABOVE else -1.0
        return BoundCondition(
            condition.site,
            condition.layer,
            unit[condition.layer][0],
            sign,
            condition.threshold,
            condition.cosine,
            condition.scope,
        )

    def width(self, site: Site, path: str) -> int:
        width = self.info.sites.get(site)
        if width is None:
            has = ", ".join(s.value for s in self.info.sites)
            raise InvalidArgument(f"{path}.site", f"{self.info.architecture} has no site {site.value}; it has {has}")
        return width

    def neuron_site(self, site: Site, path: str) -> None:
        if site is not Site.MLP_POST:
            raise InvalidArgument(path, f"neurons are read at mlp_post, not {site.value}")

    def scope(self, scope: Scope, path: str) -> None:
        check_scope(scope, path, vocab_size=self.info.vocab_size, has_roles=self.has_roles)

    def edit_layers(self, edit: Edit, path: str) -> tuple[int, ...]:
        """Layers of the edit: those named, or those of its neuron set."""
        names_own = isinstance(edit.kind, NeuronEdit) and edit.kind.neuron_set is not None
        if names_own and not edit.layers and not edit.all_layers:
            assert isinstance(edit.kind, NeuronEdit)
            artifact = self.artifact(edit.kind.neuron_set or "", ArtifactKind.NEURON_SET, f"{path}.neurons.neuron_set")
            return self.layers(artifact.info.layers, False, path)
        return self.layers(edit.layers, edit.all_layers, path)

    def layers(self, layers: tuple[int, ...], all_layers: bool, path: str, field: str = "layers") -> tuple[int, ...]:
        if layers and all_layers:
            raise InvalidArgument(f"{path}.all_layers", "give layers or all_layers, not both")
        if all_layers:
            return tuple(range(self.info.n_layers))
        if not layers:
            raise InvalidArgument(f"{path}.{field}", "at least one layer is needed")
        for i, layer in enumerate(layers):
            if not 0 <= layer < self.info.n_layers:
                where = f"{path}.{field}[{i}]" if field == "layers" else f"{path}.{field}"
                raise InvalidArgument(where, f"unknown layer {layer}: the model has {self.info.n_layers}")
        if len(set(layers)) != len(layers):
            raise InvalidArgument(f"{path}.{field}", "a layer is named twice")
        return layers

    def artifact(self, ref: str, kind: ArtifactKind, path: str) -> Artifact:
        if self.artifacts is None:
            raise FailedPrecondition(path, "this server keeps no artifacts")
        try:
            artifact = self.artifacts.get(ref)
        except RequestError as error:
            error.field = path
            raise
        if artifact.info.kind is not kind:
            raise InvalidArgument(path, f"{ref} is a {artifact.info.kind.value}, not a {kind.value}")
        if artifact.info.model_fingerprint != self.info.fingerprint:
            raise FailedPrecondition(
                path, f"{ref} was made for model {artifact.info.model_fingerprint}, served is {self.info.fingerprint}"
            )
        return artifact

    def vectors(
        self, vector: Vector, site: Site, layers: tuple[int, ...], width: int, path: str, *, unit: bool
    ) -> dict[int, tuple[Tensor, ...]]:
        """The direction at each layer, divided by its norm if `unit`."""
        if vector.artifact is not None:
            artifact = self.artifact(vector.artifact, ArtifactKind.VECTOR, f"{path}.artifact")
            rows = {}
            for layer in layers:
                source = layer if vector.artifact_layer is None else vector.artifact_layer
                if source not in artifact.info.layers:
                    field = "artifact" if vector.artifact_layer is None else "artifact_layer"
                    raise InvalidArgument(f"{path}.{field}", f"{vector.artifact} has no vector for layer {source}")
                rows[layer] = artifact.direction(source).float()
        elif vector.values is not None:
            values = vector.values.float()
            if values.dim() not in (1, 2) or (values.dim() == 2 and values.shape[0] != len(layers)):
                raise InvalidArgument(
                    f"{path}.values",
                    f"shape {list(values.shape)} is neither [{width}] nor [{len(layers)}, {width}] (one row a layer)",
                )
            rows = {layer: values if values.dim() == 1 else values[i] for i, layer in enumerate(layers)}
        else:
            raise InvalidArgument(path, "an artifact or values are needed")
        bound: dict[int, tuple[Tensor, ...]] = {}
        for layer, row in rows.items():
            where = f"{path}.values" if vector.artifact is None else f"{path}.artifact"
            if row.shape[-1] != width:
                raise InvalidArgument(where, f"width {row.shape[-1]} does not fit {site.value}, which has {width}")
            if not bool(torch.isfinite(row).all()):
                raise InvalidArgument(where, "holds NaN or infinite numbers")
            if unit:
                norm = float(row.double().norm())
                if norm == 0.0:
                    raise InvalidArgument(where, "a zero vector has no direction")
                row = (row.double() / norm).float()
            bound[layer] = (row.contiguous(),)
        return bound

    def low_rank(self, kind: LowRank, width: int, path: str) -> tuple[Tensor, ...]:
        rank = kind.bias.shape[0] if kind.bias.dim() == 1 else 0
        if rank < 1:
            raise InvalidArgument(f"{path}.bias", "must be a vector of at least one number")
        for name, tensor in (("rotation", kind.rotation), ("weight", kind.weight), ("bias", kind.bias)):
            expected = [rank] if name == "bias" else [rank, width]
            if list(tensor.shape) != expected:
                raise InvalidArgument(f"{path}.{name}", f"shape {list(tensor.shape)} is not {expected}")
            if not bool(torch.isfinite(tensor).all()):
                raise InvalidArgument(f"{path}.{name}", "holds NaN or infinite numbers")
        return (kind.rotation.float(), kind.weight.float(), kind.bias.float())

    def neurons(
        self, kind: NeuronEdit, layers: tuple[int, ...], width: int, path: str
    ) -> dict[int, tuple[Tensor, ...]]:
        op = kind.op.value
        payload: dict[int, tuple[Tensor, ...]] = {}
        for layer in layers:
            values: Tensor | None = torch.tensor(kind.values, dtype=torch.float32)
            if kind.neuron_set is not None:
                if kind.neurons:
                    raise InvalidArgument(f"{path}.neurons", "give neurons or a neuron_set, not both")
                artifact = self.artifact(kind.neuron_set, ArtifactKind.NEURON_SET, f"{path}.neuron_set")
                if layer not in artifact.info.layers:
                    raise InvalidArgument(f"{path}.neuron_set", f"{kind.neuron_set} has no neurons for layer {layer}")
                index, stored = artifact.neurons(layer)
                _indices(tuple(index.tolist()), width, f"{path}.neuron_set", "neuron")
                if not kind.values:
                    values = stored
            else:
                if not kind.neurons:
                    raise InvalidArgument(f"{path}.neurons", "at least one neuron is needed")
                _indices(kind.neurons, width, f"{path}.neurons", "neuron")
                index = torch.tensor(kind.neurons, dtype=torch.int64)
            n = len(index)
            one = torch.ones(n)
            low, high = torch.full((n,), -math.inf), torch.full((n,), math.inf)
            if kind.op is NeuronOp.CLAMP:
                bounds = _bounds(kind.min, kind.max, f"{path}.clamp")
                payload[layer] = (index, one, torch.zeros(n), one * bounds[0], one * bounds[1])
                continue
            if values is None or len(values) == 0:
                raise InvalidArgument(f"{path}.{op}.values", "a value is needed")
            if len(values) not in (1, n):
                raise InvalidArgument(f"{path}.{op}.values", f"one value or {n}, got {len(values)}")
            if not bool(torch.isfinite(values).all()):
                raise InvalidArgument(f"{path}.{op}.values", "holds NaN or infinite numbers")
            values = values.float().expand(n).contiguous()
            if kind.op is NeuronOp.SET:
                payload[layer] = (index, torch.zeros(n), values, low, high)
            elif kind.op is NeuronOp.SCALE:
                payload[layer] = (index, values, torch.zeros(n), low, high)
            else:
                payload[layer] = (index, one, values, low, high)
        return payload

    def heads(self, kind: HeadEdit, layers: tuple[int, ...], path: str) -> dict[int, tuple[Tensor, ...]]:
        if not kind.heads:
            raise InvalidArgument(f"{path}.heads", "at least one head is needed")
        _indices(kind.heads, self.info.n_heads, f"{path}.heads", "head")
        n, dim = len(kind.heads), self.info.head_dim
        index = torch.tensor(kind.heads, dtype=torch.int64)
        if kind.mean is None:
            scale = 1.0 if kind.scale is None else kind.scale
            _finite(scale, f"{path}.scale")
            return dict.fromkeys(layers, (index, torch.full((n,), scale), torch.zeros(n, dim)))
        mean = kind.mean.float()
        if list(mean.shape) not in ([n, dim], [len(layers), n, dim]):
            raise InvalidArgument(
                f"{path}.mean", f"shape {list(mean.shape)} is neither [{n}, {dim}] nor [{len(layers)}, {n}, {dim}]"
            )
        if not bool(torch.isfinite(mean).all()):
            raise InvalidArgument(f"{path}.mean", "holds NaN or infinite numbers")
        rows = mean if mean.dim() == 3 else mean.expand(len(layers), n, dim)
        return {layer: (index, torch.zeros(n), rows[i].contiguous()) for i, layer in enumerate(layers)}


def _finite(value: float, path: str) -> None:
    if not math.isfinite(value):
        raise InvalidArgument(path, f"must be finite, got {value}")


def _bounds(low: float | None, high: float | None, path: str) -> tuple[float, float]:
    if low is None and high is None:
        raise InvalidArgument(path, "min or max is needed")
    for name, value in (("min", low), ("max", high)):
        if value is not None:
            _finite(value, f"{path}.{name}")
    bounds = (-math.inf if low is None else low, math.inf if high is None else high)
    if bounds[0] > bounds[1]:
        raise InvalidArgument(f"{path}.min", f"{bounds[0]} is above max {bounds[1]}")
    return bounds


def _indices(ids: tuple[int, ...], n: int, path: str, what: str) -> None:
    for i, index in enumerate(ids):
        if not 0 <= index < n:
            raise InvalidArgument(f"{path}[{i}]", f"unknown {what} {index}: there are {n}")
    if len(set(ids)) != len(ids):
        raise InvalidArgument(path, f"a {what} is named twice")


def _top_k(k: int, n: int, path: str) -> None:
    if not 1 <= k <= min(MAX_TOP_K, n):
        raise InvalidArgument(path, f"must be in [1, {min(MAX_TOP_K, n)}], got {k}")

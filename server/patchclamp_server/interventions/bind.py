"""Binds a Program to the model that will run it: every check, every artifact resolved, every number finite.

The result is what the engine compiles into a step. Errors carry the field path of the request.
"""

import hashlib
import math

import torch
from torch import Tensor

from patchclamp_server.artifacts.types import ArtifactKind
from patchclamp_server.errors import InvalidArgument
from patchclamp_server.interventions.bound import (
    BoundAbort,
    BoundCondition,
    BoundEdit,
    BoundProgram,
    BoundReadout,
    Kind,
)
from patchclamp_server.interventions.program import (
    AddVector,
    CapProjection,
    Comparison,
    Condition,
    Edit,
    HeadEdit,
    HeadReadout,
    LogitLensReadout,
    LowRank,
    NeuronEdit,
    NeuronReadout,
    Program,
    ProjectionReadout,
    ProjectOut,
    Readout,
    ReplaceVector,
    RotateTowards,
    Scope,
    SetProjection,
    TopNeuronsReadout,
)
from patchclamp_server.interventions.resolver import (
    ArtifactLookup,
    Resolver,
    check_finite,
    check_indices,
    check_top_k,
    checked_bounds,
)
from patchclamp_server.interventions.scopes import check_scope
from patchclamp_server.model.info import ModelInfo
from patchclamp_server.model.sites import RESIDUAL_SITES, Site

MAX_EDITS = 256
MAX_READOUTS = 64


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
    binder = _Binder(Resolver(info, artifacts), prompt_roles is not None)
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
        digest.update(repr((readout.ids, readout.k, readout.heads)).encode())
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
    def __init__(self, resolver: Resolver, has_roles: bool) -> None:
        self.resolver = resolver
        self.info = resolver.info
        self.has_roles = has_roles

    def edit(self, edit: Edit, path: str, index: int) -> BoundEdit:
        width = self.resolver.width(edit.site, path)
        self.scope(edit.scope, f"{path}.scope")
        check_finite(edit.strength, f"{path}.strength")
        layers = self.edit_layers(edit, path)
        site, bounds = edit.site, (-math.inf, math.inf)
        match edit.kind:
            case AddVector(vector) | ReplaceVector(vector):
                kind = Kind.ADD if isinstance(edit.kind, AddVector) else Kind.REPLACE
                field = "add" if kind is Kind.ADD else "replace"
                payload = self.resolver.vectors(
                    vector, edit.site, layers, width, f"{path}.{field}.vector", unit=vector.unit
                )
            case ProjectOut(vector):
                kind, bounds = Kind.PROJECT, (0.0, 0.0)
                payload = self.resolver.vectors(
                    vector, edit.site, layers, width, f"{path}.project_out.vector", unit=True
                )
            case SetProjection(vector, target):
                kind, bounds = Kind.PROJECT, (target, target)
                check_finite(target, f"{path}.set_projection.target")
                payload = self.resolver.vectors(
                    vector, edit.site, layers, width, f"{path}.set_projection.vector", unit=True
                )
            case CapProjection(vector, low, high):
                kind, bounds = Kind.PROJECT, checked_bounds(low, high, f"{path}.cap_projection")
                payload = self.resolver.vectors(
                    vector, edit.site, layers, width, f"{path}.cap_projection.vector", unit=True
                )
            case RotateTowards(vector, radians):
                if not 0.0 <= radians <= math.pi:
                    raise InvalidArgument(f"{path}.rotate_towards.radians", f"must be in [0, pi], got {radians}")
                kind, bounds = Kind.ROTATE, (radians, 0.0)
                payload = self.resolver.vectors(
                    vector, edit.site, layers, width, f"{path}.rotate_towards.vector", unit=True
                )
            case LowRank():
                kind = Kind.LOW_RANK
                payload = dict.fromkeys(layers, self.resolver.low_rank(edit.kind, width, f"{path}.low_rank"))
            case NeuronEdit():
                kind = Kind.NEURONS
                if edit.site is not Site.MLP_POST:
                    raise InvalidArgument(f"{path}.site", f"neurons are edited at mlp_post, not {edit.site.value}")
                payload = self.resolver.neurons(edit.kind, layers, width, f"{path}.neurons")
            case HeadEdit():
                kind = Kind.HEADS
                if edit.site is not Site.ATTN_Z:
                    raise InvalidArgument(f"{path}.site", f"heads are edited at attn_z, not {edit.site.value}")
                payload = self.resolver.heads(edit.kind, layers, f"{path}.heads")
                if edit.kind.uniform:
                    site = Site.ATTN_Q
        if edit.preserve_norm and kind in (Kind.NEURONS, Kind.HEADS):
            raise InvalidArgument(f"{path}.preserve_norm", f"is for vector edits, not {kind.value}")
        gate, latched = None, False
        if edit.gate is not None:
            gate, latched = self.condition(edit.gate.condition, f"{path}.gate.condition"), edit.gate.latched
            first = (min(layers), site.order)
            if (gate.layer, gate.site.order) >= first:
                raise InvalidArgument(
                    f"{path}.gate.condition",
                    f"{gate.site.value} of layer {gate.layer} does not come before the edited {site.value} "
                    f"of layer {first[0]}",
                )
        digest = hashlib.sha256(repr((kind, site, layers, edit.preserve_norm, bounds, latched)).encode())
        for layer in layers:
            for tensor in payload[layer]:
                digest.update(_bytes(tensor))
        if gate is not None:
            digest.update(_condition_bytes(gate))
        return BoundEdit(
            edit.name or str(index),
            kind,
            site,
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
        width = self.resolver.width(readout.site, path)
        self.scope(readout.scope, f"{path}.scope")
        layers = self.resolver.layers(readout.layers, readout.all_layers, path)
        vectors: dict[int, Tensor] = {}
        ids: tuple[int, ...] = ()
        heads: dict[int, tuple[int, ...]] = {}
        k = 0
        match readout.kind:
            case ProjectionReadout(given):
                if not given:
                    raise InvalidArgument(f"{path}.projection.vectors", "at least one vector is needed")
                each = [
                    self.resolver.vectors(v, readout.site, layers, width, f"{path}.projection.vectors[{i}]", unit=True)
                    for i, v in enumerate(given)
                ]
                vectors = {layer: torch.stack([payload[layer][0] for payload in each]) for layer in layers}
            case NeuronReadout(ids):
                self.neuron_site(readout.site, f"{path}.site")
                check_indices(ids, width, f"{path}.neurons.neurons", "neuron")
            case TopNeuronsReadout(k):
                self.neuron_site(readout.site, f"{path}.site")
                check_top_k(k, width, f"{path}.top_neurons.k")
            case LogitLensReadout(k):
                if readout.site not in RESIDUAL_SITES:
                    raise InvalidArgument(
                        f"{path}.site", f"the logit lens reads a residual site, not {readout.site.value}"
                    )
                check_top_k(k, self.info.vocab_size, f"{path}.logit_lens.k")
            case HeadReadout(named):
                if readout.site is not Site.ATTN_Z:
                    raise InvalidArgument(f"{path}.site", f"heads are read at attn_z, not {readout.site.value}")
                check_indices(named, self.info.n_heads, f"{path}.heads.heads", "head")
                heads = dict.fromkeys(layers, named or tuple(range(self.info.n_heads)))
        name = readout.name or str(index)
        return BoundReadout(name, type(readout.kind), readout.site, layers, readout.scope, vectors, ids, k, heads)

    def condition(self, condition: Condition, path: str) -> BoundCondition:
        width = self.resolver.width(condition.site, path)
        self.scope(condition.scope, f"{path}.scope")
        layers = self.resolver.layers((condition.layer,), False, path, field="layer")
        threshold = self.threshold(condition, path)
        unit = self.resolver.vectors(condition.vector, condition.site, layers, width, f"{path}.vector", unit=True)
        sign = 1.0 if condition.comparison is Comparison.ABOVE else -1.0
        return BoundCondition(
            condition.site,
            condition.layer,
            unit[condition.layer][0],
            sign,
            threshold,
            condition.cosine,
            condition.scope,
        )

    def threshold(self, condition: Condition, path: str) -> float:
        if condition.stored_threshold is None:
            check_finite(condition.threshold, f"{path}.threshold")
            return condition.threshold
        if condition.cosine:
            raise InvalidArgument(f"{path}.cosine", "a stored threshold is a projection; expected false")
        return self.resolver.stored_threshold(
            condition.stored_threshold, condition.vector, condition.site, condition.layer, path
        )

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
            artifact = self.resolver.artifact(
                edit.kind.neuron_set or "", ArtifactKind.NEURON_SET, f"{path}.neurons.neuron_set"
            )
            return self.resolver.layers(artifact.info.layers, False, path)
        return self.resolver.layers(edit.layers, edit.all_layers, path)

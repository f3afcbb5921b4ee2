"""Binds a Program to the model that will run it: checks everything, and resolves every artifact.

The engine compiles the result into a step. Errors carry the field path of the request.
"""

import hashlib

from torch import Tensor

from patchclamp_server.errors import InvalidArgument
from patchclamp_server.interventions.bound import (
    BoundAbort,
    BoundCondition,
    BoundEdit,
    BoundProgram,
    BoundReadout,
)
from patchclamp_server.interventions.features import check_place, chosen_rows
from patchclamp_server.interventions.kinds import EDIT_OF, READOUT_OF
from patchclamp_server.interventions.kinds.activations import check_numbers
from patchclamp_server.interventions.kinds.features import FeatureReadout
from patchclamp_server.interventions.kinds.probes import probe_condition
from patchclamp_server.interventions.kinds.spec import ReadoutNumbers, Where
from patchclamp_server.interventions.program import (
    Comparison,
    Condition,
    Edit,
    FeatureReference,
    Program,
    Readout,
    Scope,
)
from patchclamp_server.interventions.request_warnings import RequestWarning
from patchclamp_server.interventions.resolver import ArtifactLookup, Resolver, check_finite
from patchclamp_server.interventions.scopes import check_scope
from patchclamp_server.model.info import ModelInfo
from patchclamp_server.model.sites import Site

MAX_EDITS = 256
MAX_READOUTS = 64


def bind(
    program: Program,
    info: ModelInfo,
    artifacts: ArtifactLookup | None = None,
    *,
    prompt_roles: tuple[str, ...] | None = None,
    prompt_length: int | None = None,
) -> BoundProgram:
    """Checks `program` against the model and resolves its artifacts. `prompt_length` is that of the prompt, where it is
    known that the program is for one alone.

    Raises InvalidArgument (field path), FailedPrecondition (artifact of another model) or NotFound (artifact).
    """
    if len(program.edits) > MAX_EDITS:
        raise InvalidArgument("program.edits", f"at most {MAX_EDITS} edits, got {len(program.edits)}")
    if len(program.readouts) > MAX_READOUTS:
        raise InvalidArgument("program.readouts", f"at most {MAX_READOUTS} readouts, got {len(program.readouts)}")
    binder = _Binder(Resolver(info, artifacts), prompt_roles is not None, prompt_length)
    _check_names([e.name for e in program.edits], "program.edits")
    _check_names([r.name for r in program.readouts], "program.readouts")
    edits = tuple(binder.edit(e, f"program.edits[{i}]", i) for i, e in enumerate(program.edits))
    readouts = tuple(binder.readout(r, f"program.readouts[{i}]", i) for i, r in enumerate(program.readouts))
    check_numbers(readouts, info.sites)
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
        if readout.tokens:
            digest.update(repr(readout.tokens).encode())
        if readout.encoder is not None:
            digest.update(readout.encoder.id.encode())
        if readout.latents is not None:
            digest.update(_bytes(readout.latents))
        for vectors in readout.vectors.values():
            digest.update(_bytes(vectors))
        if readout.joint is not None:
            digest.update(readout.joint.fingerprint)
    for abort in aborts:
        digest.update(abort.name.encode() + _condition_bytes(abort.condition))
    return BoundProgram(program, "sha256:" + digest.hexdigest(), edits, readouts, aborts, tuple(binder.warnings))


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
    feature = b"" if condition.jump is None else repr((condition.bias, condition.jump)).encode()
    return repr(head).encode() + feature + _bytes(condition.unit)


def _input(numbers: ReadoutNumbers, place: tuple[Site, int], scope: Scope) -> BoundReadout:
    site, layer = place
    return BoundReadout(
        "", FeatureReadout, site, (layer,), scope, numbers.vectors, numbers.ids, 0, latents=numbers.latents
    )


class _Binder:
    def __init__(self, resolver: Resolver, has_roles: bool, prompt_length: int | None) -> None:
        self.resolver = resolver
        self.info = resolver.info
        self.has_roles = has_roles
        self.prompt_length = prompt_length
        self.warnings: list[RequestWarning] = []

    def edit(self, edit: Edit, path: str, index: int) -> BoundEdit:
        width = self.resolver.width(edit.site, path)
        self.scope(edit.scope, f"{path}.scope")
        check_finite(edit.strength, f"{path}.strength")
        layers = self.edit_layers(edit, path)
        spec = EDIT_OF[type(edit.kind)]
        where = Where(self.resolver, edit.site, layers, width, path, f"{path}.{spec.name}", self.prompt_length)
        numbers = spec.bind(edit.kind, where)
        kind, payload, bounds = numbers.table.entry, numbers.payload, numbers.bounds
        self.warnings += numbers.warnings
        site = edit.site if numbers.site is None else numbers.site
        if edit.preserve_norm and not numbers.table.whole_rows:
            raise InvalidArgument(f"{path}.preserve_norm", f"is for vector edits, not {spec.name}")
        given = None
        if numbers.input is not None and numbers.input_place is not None:
            given = _input(numbers.input, numbers.input_place, edit.scope)
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
        digest = hashlib.sha256(repr((kind.name, site, layers, edit.preserve_norm, bounds, latched)).encode())
        for layer in layers:
            for tensor in payload[layer]:
                digest.update(_bytes(tensor))
        if given is not None:
            digest.update(repr((given.site, given.layers)).encode())
            assert given.latents is not None
            for tensor in (*given.vectors.values(), given.latents):
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
            safe=numbers.safe,
            input=given,
        )

    def readout(self, readout: Readout, path: str, index: int) -> BoundReadout:
        spec = READOUT_OF[type(readout.kind)]
        site, layers = self.readout_place(readout, path)
        width = self.resolver.width(site, path)
        self.scope(readout.scope, f"{path}.scope")
        own = spec.bind(readout.kind, Where(self.resolver, site, layers, width, path, f"{path}.{spec.name}"))
        name = readout.name or str(index)
        return BoundReadout(
            name,
            spec.kind,
            site,
            layers,
            readout.scope,
            own.vectors,
            own.ids,
            own.k,
            own.heads,
            latents=own.latents,
            encoder=own.encoder,
            joint=own.joint,
            tokens=own.tokens,
        )

    def readout_place(self, readout: Readout, path: str) -> tuple[Site, tuple[int, ...]]:
        """Returns site and layers: those of the readout, which must be those of its kind where that has its own."""
        spec = READOUT_OF[type(readout.kind)]
        if spec.place is None:
            if readout.site is None:
                raise InvalidArgument(f"{path}.site", f"expected a site: {spec.name} has none of its own")
            self.resolver.width(readout.site, path)
            return readout.site, self.resolver.layers(readout.layers, readout.all_layers, path)
        site, layers = spec.place(readout.kind, self.resolver, f"{path}.{spec.name}")
        named = ", ".join(map(str, layers))
        if readout.site not in (None, site):
            raise InvalidArgument(f"{path}.site", f"expected {site.value}, that of the {spec.name}, or none")
        if readout.all_layers or (readout.layers and set(readout.layers) != set(layers)):
            field = "all_layers" if readout.all_layers else "layers"
            raise InvalidArgument(f"{path}.{field}", f"expected those of the {spec.name} ({named}), or none")
        return site, layers

    def condition(self, condition: Condition, path: str) -> BoundCondition:
        if condition.probe:
            self.scope(condition.scope, f"{path}.scope")
            return probe_condition(condition, self.resolver, path)
        if condition.site is None:
            raise InvalidArgument(f"{path}.site", "expected a site")
        width = self.resolver.width(condition.site, path)
        self.scope(condition.scope, f"{path}.scope")
        layers = self.resolver.layers((condition.layer,), False, path, field="layer")
        threshold = self.threshold(condition, path)
        sign = 1.0 if condition.comparison is Comparison.ABOVE else -1.0
        if condition.feature is not None:
            return self.feature(condition, condition.feature, condition.site, layers, sign, path)
        unit = self.resolver.vectors(condition.vector, condition.site, layers, width, f"{path}.vector", unit=True)
        return BoundCondition(
            condition.site,
            condition.layer,
            unit[condition.layer][0],
            sign,
            threshold,
            condition.cosine,
            condition.scope,
        )

    def feature(
        self,
        condition: Condition,
        named: FeatureReference,
        site: Site,
        layers: tuple[int, ...],
        sign: float,
        path: str,
    ) -> BoundCondition:
        ref, own = named.autoencoder, f"{path}.feature"
        if condition.cosine:
            raise InvalidArgument(f"{path}.cosine", "a feature has no cosine; expected false")
        autoencoder = self.resolver.autoencoder(ref, f"{own}.autoencoder")
        spec = autoencoder.spec
        check_place(ref, "reads", (spec.site, spec.layer), (site, layers), path, field="layer")
        if not 0 <= named.feature < autoencoder.n_features:
            message = f"unknown feature {named.feature}: there are {autoencoder.n_features}"
            raise InvalidArgument(f"{own}.feature", message)
        rows = chosen_rows(autoencoder, ref, (named.feature,), own)
        return BoundCondition(
            site,
            condition.layer,
            rows.encoder[0],
            sign,
            condition.threshold,
            False,
            condition.scope,
            bias=float(rows.folded_bias[0]),
            jump=float(rows.threshold[0]),
        )

    def threshold(self, condition: Condition, path: str) -> float:
        if condition.stored_threshold is None:
            check_finite(condition.threshold, f"{path}.threshold")
            return condition.threshold
        if condition.cosine:
            raise InvalidArgument(f"{path}.cosine", "a stored threshold is a projection; expected false")
        assert condition.site is not None
        return self.resolver.stored_threshold(
            condition.stored_threshold, condition.vector, condition.site, condition.layer, path
        )

    def scope(self, scope: Scope, path: str) -> None:
        check_scope(scope, path, vocab_size=self.info.vocab_size, has_roles=self.has_roles)

    def edit_layers(self, edit: Edit, path: str) -> tuple[int, ...]:
        """Returns the layers that the edit names, or those of its artifact where it names none."""
        spec = EDIT_OF[type(edit.kind)]
        ref = spec.layers_from(edit.kind)
        if ref is not None and not edit.layers and not edit.all_layers:
            return self.resolver.layers(spec.layers_of(ref, self.resolver, f"{path}.{spec.name}"), False, path)
        return self.resolver.layers(edit.layers, edit.all_layers, path)

"""The intervention language: protobuf messages → dataclasses of interventions/program.py, receipts → messages.

Refused here, with the field path: what the dataclasses cannot express (a kind, vector, site or bound that is missing;
bytes that do not fill a tensor) and numbers that are wrong for every model (NaN, Inf, doubled layers, empty ranges of
values). What depends on the served model, and whether a scope contradicts itself, is checked in interventions/bind.py.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from patchclamp.v1 import program_pb2 as pb
from patchclamp_server.errors import InvalidArgument
from patchclamp_server.interventions.bound import BoundProgram
from patchclamp_server.interventions.program import (
    AbortCondition,
    AddVector,
    CapProjection,
    Comparison,
    Condition,
    Edit,
    EditKind,
    Gate,
    HeadEdit,
    HeadReadout,
    LogitLensReadout,
    LowRank,
    NeuronEdit,
    NeuronOp,
    NeuronReadout,
    Phase,
    PositionRange,
    Program,
    ProjectionReadout,
    ProjectOut,
    Readout,
    ReadoutKind,
    ReadoutValue,
    Receipt,
    ReplaceVector,
    RotateTowards,
    Scope,
    SetProjection,
    StoredThreshold,
    TokenSelector,
    TopNeuronsReadout,
    Vector,
)
from patchclamp_server.interventions.request_warnings import RequestWarning, WarningCode
from patchclamp_server.model.sites import PUBLIC_SITES, Site
from patchclamp_server.rpc.codecs.checks import chosen, count, distinct, distinct_names, finite, known, required
from patchclamp_server.rpc.codecs.tensor import decode_tensor

SITES: dict[int, Site] = {pb.Site.Value(f"SITE_{site.name}"): site for site in PUBLIC_SITES}
SITE_NUMBERS: dict[Site, "pb.Site.ValueType"] = {site: pb.Site.Value(f"SITE_{site.name}") for site in PUBLIC_SITES}
PHASES: dict[int, Phase] = {pb.PHASE_PROMPT: Phase.PROMPT, pb.PHASE_GENERATED: Phase.GENERATED}
COMPARISONS: dict[int, Comparison] = {
    pb.COMPARISON_ABOVE: Comparison.ABOVE,
    pb.COMPARISON_BELOW: Comparison.BELOW,
}

STORED_THRESHOLDS: dict[int, StoredThreshold] = {pb.STORED_THRESHOLD_MIDPOINT: StoredThreshold.MIDPOINT}
WARNING_CODES = {code: pb.RequestWarningCode.Value(f"REQUEST_WARNING_CODE_{code.name}") for code in WarningCode}


def decode_program(proto: pb.Program, field: str = "program") -> Program:
    """Raises InvalidArgument with a path that starts with `field`."""
    distinct_names((e.name for e in proto.edits), f"{field}.edits")
    distinct_names((r.name for r in proto.readouts), f"{field}.readouts")
    distinct_names((a.name for a in proto.abort_when), f"{field}.abort_when")
    return Program(
        edits=tuple(_edit(e, f"{field}.edits[{i}]") for i, e in enumerate(proto.edits)),
        readouts=tuple(_readout(r, f"{field}.readouts[{i}]") for i, r in enumerate(proto.readouts)),
        abort_when=tuple(_abort(a, f"{field}.abort_when[{i}]") for i, a in enumerate(proto.abort_when)),
    )


def decode_site(number: int, field: str) -> Site:
    return known(number, SITES, field, pb.Site.keys()[1:])


def _edit(proto: pb.Edit, field: str) -> Edit:
    name = chosen(proto, "kind", field)
    kind = _EDIT_KINDS[name](getattr(proto, name), f"{field}.{name}")
    brings_layers = isinstance(kind, NeuronEdit) and kind.neuron_set is not None
    return Edit(
        kind=kind,
        site=decode_site(proto.site, f"{field}.site"),
        name=proto.name,
        layers=_layers(proto.layers, proto.all_layers, field, needed=not brings_layers),
        all_layers=proto.all_layers,
        strength=finite(proto.strength, f"{field}.strength") if proto.HasField("strength") else 1.0,
        scope=_scope(proto.scope, f"{field}.scope"),
        gate=_gate(proto.gate, f"{field}.gate") if proto.HasField("gate") else None,
        preserve_norm=proto.preserve_norm,
    )


def _layers(layers: Sequence[int], all_layers: bool, field: str, *, needed: bool) -> tuple[int, ...]:
    if layers and all_layers:
        raise InvalidArgument(f"{field}.all_layers", "layers are given as well; expected one of layers, all_layers")
    if needed and not layers and not all_layers:
        raise InvalidArgument(f"{field}.layers", "expected layers, or all_layers")
    return distinct(layers, f"{field}.layers")


def _vector_in(proto: Any, field: str) -> Vector:
    """The field `vector` of a message that needs one."""
    required(proto, "vector", field)
    return decode_vector(proto.vector, f"{field}.vector")


def decode_vector(proto: pb.Vector, field: str) -> Vector:
    source = chosen(proto, "source", field)
    has_row = proto.HasField("artifact_layer")
    if source == "values":
        if has_row:
            raise InvalidArgument(f"{field}.artifact_layer", "only for a vector that is an artifact")
        return Vector(values=decode_tensor(proto.values, f"{field}.values", ndims=(1, 2)), unit=proto.unit)
    if not proto.artifact:
        raise InvalidArgument(f"{field}.artifact", "expected an artifact's id or tag")
    return Vector(artifact=proto.artifact, artifact_layer=proto.artifact_layer if has_row else None, unit=proto.unit)


def _bounds(proto: pb.CapProjection | pb.NeuronBounds, field: str) -> tuple[float | None, float | None]:
    low = finite(proto.min, f"{field}.min") if proto.HasField("min") else None
    high = finite(proto.max, f"{field}.max") if proto.HasField("max") else None
    if low is None and high is None:
        raise InvalidArgument(f"{field}.min", "expected min, max, or both")
    if low is not None and high is not None and low > high:
        raise InvalidArgument(f"{field}.max", f"expected at least min ({low:g}), got {high:g}")
    return low, high


def _cap(proto: pb.CapProjection, field: str) -> CapProjection:
    low, high = _bounds(proto, field)
    return CapProjection(_vector_in(proto, field), min=low, max=high)


def _low_rank(proto: pb.LowRank, field: str) -> LowRank:
    for name in ("rotation", "weight", "bias"):
        required(proto, name, field)
    rotation = decode_tensor(proto.rotation, f"{field}.rotation", ndims=(2,))
    weight = decode_tensor(proto.weight, f"{field}.weight", ndims=(2,))
    bias = decode_tensor(proto.bias, f"{field}.bias", ndims=(1,))
    if weight.shape != rotation.shape:
        message = f"expected the shape of rotation {list(rotation.shape)}, got {list(weight.shape)}"
        raise InvalidArgument(f"{field}.weight.shape", message)
    if len(bias) != len(rotation):
        raise InvalidArgument(f"{field}.bias.shape", f"expected [{len(rotation)}] (rank), got {list(bias.shape)}")
    return LowRank(rotation, weight, bias)


def _neurons(proto: pb.NeuronEdit, field: str) -> NeuronEdit:
    if proto.neurons and proto.neuron_set:
        message = "neurons are given as well; expected one of neurons, neuron_set"
        raise InvalidArgument(f"{field}.neuron_set", message)
    if not proto.neurons and not proto.neuron_set:
        raise InvalidArgument(f"{field}.neurons", "expected neurons, or neuron_set")
    neurons = distinct(proto.neurons, f"{field}.neurons")
    neuron_set = proto.neuron_set or None
    name = chosen(proto, "op", field)
    if name == "clamp":
        low, high = _bounds(proto.clamp, f"{field}.clamp")
        return NeuronEdit(neurons, neuron_set, NeuronOp.CLAMP, min=low, max=high)
    values = tuple(finite(v, f"{field}.{name}.values[{i}]") for i, v in enumerate(getattr(proto, name).values))
    if neurons and len(values) not in (1, len(neurons)):
        message = f"expected 1 value, or one for each of the {len(neurons)} neurons, got {len(values)}"
        raise InvalidArgument(f"{field}.{name}.values", message)
    return NeuronEdit(neurons, neuron_set, NeuronOp(name), values)


def _heads(proto: pb.HeadEdit, field: str) -> HeadEdit:
    if not proto.heads:
        raise InvalidArgument(f"{field}.heads", "expected at least one head")
    heads = distinct(proto.heads, f"{field}.heads")
    name = chosen(proto, "op", field)
    if name == "scale":
        return HeadEdit(heads, scale=finite(proto.scale, f"{field}.scale"))
    if name == "uniform":
        if not proto.uniform:
            raise InvalidArgument(f"{field}.uniform", "expected true; to leave heads alone, leave the edit out")
        return HeadEdit(heads, uniform=True)
    mean = decode_tensor(proto.mean, f"{field}.mean", ndims=(2, 3))
    if mean.shape[-2] != len(heads):
        message = f"expected {len(heads)} row(s), one for each head, got {list(mean.shape)}"
        raise InvalidArgument(f"{field}.mean.shape", message)
    return HeadEdit(heads, mean=mean)


_EDIT_KINDS: dict[str, Callable[[Any, str], EditKind]] = {
    "add": lambda p, f: AddVector(_vector_in(p, f)),
    "project_out": lambda p, f: ProjectOut(_vector_in(p, f)),
    "cap_projection": _cap,
    "set_projection": lambda p, f: SetProjection(_vector_in(p, f), finite(p.target, f"{f}.target")),
    "replace": lambda p, f: ReplaceVector(_vector_in(p, f)),
    "rotate_towards": lambda p, f: RotateTowards(
        _vector_in(p, f), finite(p.radians, f"{f}.radians", low=0.0, high=math.pi)
    ),
    "low_rank": _low_rank,
    "neurons": _neurons,
    "heads": _heads,
}


def _scope(proto: pb.Scope, field: str) -> Scope:
    return Scope(
        include=tuple(_selector(s, f"{field}.include[{i}]") for i, s in enumerate(proto.include)),
        exclude=tuple(_selector(s, f"{field}.exclude[{i}]") for i, s in enumerate(proto.exclude)),
    )


def _selector(proto: pb.TokenSelector, field: str) -> TokenSelector:
    phase = None
    if proto.phase != pb.PHASE_UNSPECIFIED:
        phase = known(proto.phase, PHASES, f"{field}.phase", pb.Phase.keys()[1:])
    positions = None
    if proto.HasField("positions"):
        end = proto.positions.end if proto.positions.HasField("end") else None
        positions = PositionRange(proto.positions.start, end)
    return TokenSelector(
        phase=phase,
        positions=positions,
        last_k=count(proto.last_k, f"{field}.last_k") or None,
        token_ids=tuple(proto.token_ids),
        role=proto.role or None,
    )


def _condition_in(proto: Any, field: str) -> Condition:
    """The field `condition` of a message that needs one."""
    required(proto, "condition", field)
    return _condition(proto.condition, f"{field}.condition")


def _condition(proto: pb.Condition, field: str) -> Condition:
    stored = None
    if proto.stored_threshold != pb.STORED_THRESHOLD_UNSPECIFIED:
        where = f"{field}.stored_threshold"
        stored = known(proto.stored_threshold, STORED_THRESHOLDS, where, pb.StoredThreshold.keys()[1:])
        if proto.threshold:
            message = "threshold is given as well; expected one of threshold, stored_threshold"
            raise InvalidArgument(where, message)
    return Condition(
        site=decode_site(proto.site, f"{field}.site"),
        layer=proto.layer,
        vector=_vector_in(proto, field),
        comparison=known(proto.comparison, COMPARISONS, f"{field}.comparison", pb.Comparison.keys()[1:]),
        threshold=finite(proto.threshold, f"{field}.threshold"),
        cosine=proto.cosine,
        scope=_scope(proto.scope, f"{field}.scope"),
        stored_threshold=stored,
    )


def _gate(proto: pb.Gate, field: str) -> Gate:
    return Gate(_condition_in(proto, field), latched=proto.latched)


def _abort(proto: pb.AbortCondition, field: str) -> AbortCondition:
    return AbortCondition(name=proto.name, condition=_condition_in(proto, field))


def _readout(proto: pb.Readout, field: str) -> Readout:
    name = chosen(proto, "kind", field)
    return Readout(
        kind=_READOUT_KINDS[name](getattr(proto, name), f"{field}.{name}"),
        site=decode_site(proto.site, f"{field}.site"),
        name=proto.name,
        layers=_layers(proto.layers, proto.all_layers, field, needed=True),
        all_layers=proto.all_layers,
        scope=_scope(proto.scope, f"{field}.scope"),
    )


def _projection_readout(proto: pb.ProjectionReadout, field: str) -> ProjectionReadout:
    if not proto.vectors:
        raise InvalidArgument(f"{field}.vectors", "expected at least one vector")
    return ProjectionReadout(tuple(decode_vector(v, f"{field}.vectors[{i}]") for i, v in enumerate(proto.vectors)))


def _neuron_readout(proto: pb.NeuronReadout, field: str) -> NeuronReadout:
    if not proto.neurons:
        raise InvalidArgument(f"{field}.neurons", "expected at least one neuron")
    return NeuronReadout(distinct(proto.neurons, f"{field}.neurons"))


_READOUT_KINDS: dict[str, Callable[[Any, str], ReadoutKind]] = {
    "projection": _projection_readout,
    "neurons": _neuron_readout,
    "top_neurons": lambda p, f: TopNeuronsReadout(count(p.k, f"{f}.k", low=1)),
    "logit_lens": lambda p, f: LogitLensReadout(count(p.k, f"{f}.k", low=1)),
    "heads": lambda p, f: HeadReadout(distinct(p.heads, f"{f}.heads")),
}


def token_readouts(program: BoundProgram) -> frozenset[str]:
    """Names of the readouts whose ids are tokens."""
    return frozenset(readout.name for readout in program.readouts if readout.kind is LogitLensReadout)


def encode_readout_value(value: ReadoutValue, texts: Iterable[str] = ()) -> pb.ReadoutValue:
    """`texts`: of the ids, where they are tokens."""
    return pb.ReadoutValue(
        name=value.name, layer=value.layer, position=value.position, values=value.values, ids=value.ids, texts=texts
    )


def encode_receipt(receipt: Receipt) -> pb.Receipt:
    return pb.Receipt(
        program_fingerprint=receipt.program_fingerprint,
        touched=receipt.touched,
        edits=[
            pb.EditReceipt(
                name=e.name,
                rows=e.rows,
                mean_relative_change=e.mean_relative_change,
                gate_firings=e.gate_firings,
                rows_from_cache=e.rows_from_cache,
                gate_threshold=e.gate_threshold,
            )
            for e in receipt.edits
        ],
        warnings=[encode_warning(w) for w in receipt.warnings],
    )


def encode_warning(warning: RequestWarning) -> pb.RequestWarning:
    return pb.RequestWarning(code=WARNING_CODES[warning.code], field=warning.field, message=warning.message)

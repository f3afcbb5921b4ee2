"""The intervention language: protobuf messages → dataclasses of interventions/program.py, receipts → messages.

Refused here, with the field path: what the dataclasses cannot express (a kind, vector, site or bound that is missing;
bytes that do not fill a tensor) and numbers that are wrong for every model (NaN, Inf, doubled layers, empty ranges of
values). What depends on the served model, and whether a scope contradicts itself, is checked in interventions/bind.py.
"""

from collections.abc import Iterable, Sequence
from typing import Any

from patchclamp.v1 import program_pb2 as pb
from patchclamp_server.errors import InvalidArgument
from patchclamp_server.interventions.bound import BoundProgram
from patchclamp_server.interventions.field_checks import (
    chosen,
    count,
    distinct,
    distinct_names,
    finite,
    known,
    required,
)
from patchclamp_server.interventions.kinds import EDIT_OF_NAME, READOUT_OF, READOUT_OF_NAME
from patchclamp_server.interventions.kinds.vectors import vector_in
from patchclamp_server.interventions.program import (
    AbortCondition,
    Comparison,
    Condition,
    Edit,
    FeatureReference,
    Gate,
    Phase,
    PositionRange,
    Program,
    Readout,
    ReadoutValue,
    Receipt,
    Scope,
    StoredThreshold,
    TokenSelector,
    Vector,
)
from patchclamp_server.interventions.request_warnings import RequestWarning, WarningCode
from patchclamp_server.model.sites import PUBLIC_SITES, Site

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
    spec = EDIT_OF_NAME[name]
    kind = spec.decode(getattr(proto, name), f"{field}.{name}")
    return Edit(
        kind=kind,
        site=decode_site(proto.site, f"{field}.site"),
        name=proto.name,
        layers=_layers(proto.layers, proto.all_layers, field, needed=spec.layers_from(kind) is None),
        all_layers=proto.all_layers,
        strength=finite(proto.strength, f"{field}.strength") if proto.HasField("strength") else 1.0,
        scope=decode_scope(proto.scope, f"{field}.scope"),
        gate=_gate(proto.gate, f"{field}.gate") if proto.HasField("gate") else None,
        preserve_norm=proto.preserve_norm,
    )


def _layers(layers: Sequence[int], all_layers: bool, field: str, *, needed: bool) -> tuple[int, ...]:
    if layers and all_layers:
        raise InvalidArgument(f"{field}.all_layers", "layers are given as well; expected one of layers, all_layers")
    if needed and not layers and not all_layers:
        raise InvalidArgument(f"{field}.layers", "expected layers, or all_layers")
    return distinct(layers, f"{field}.layers")


def decode_scope(proto: pb.Scope, field: str) -> Scope:
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
    if proto.probe:
        _check_probe_condition(proto, field)
    feature = _feature(proto, field) if proto.HasField("feature") else None
    return Condition(
        site=None if proto.probe and not proto.site else decode_site(proto.site, f"{field}.site"),
        layer=proto.layer,
        vector=vector_in(proto, field) if feature is None and not proto.probe else Vector(),
        comparison=known(proto.comparison, COMPARISONS, f"{field}.comparison", pb.Comparison.keys()[1:]),
        threshold=finite(proto.threshold, f"{field}.threshold"),
        cosine=proto.cosine,
        scope=decode_scope(proto.scope, f"{field}.scope"),
        stored_threshold=stored,
        probe=proto.probe,
        feature=feature,
    )


def _check_probe_condition(proto: pb.Condition, field: str) -> None:
    for name in ("vector", "feature"):
        if proto.HasField(name):
            raise InvalidArgument(f"{field}.{name}", "a probe is given as well; expected one of vector, probe, feature")
    if proto.stored_threshold:
        raise InvalidArgument(f"{field}.stored_threshold", "is for a vector; expected a threshold for a probe")
    if proto.cosine:
        raise InvalidArgument(f"{field}.cosine", "a probability has no cosine; expected false")


def _feature(proto: pb.Condition, field: str) -> FeatureReference:
    if proto.HasField("vector"):
        raise InvalidArgument(f"{field}.feature", "vector is given as well; expected one of vector, feature")
    if proto.stored_threshold:
        raise InvalidArgument(f"{field}.stored_threshold", "is for a vector; expected threshold for a feature")
    if not proto.feature.autoencoder:
        raise InvalidArgument(f"{field}.feature.autoencoder", "expected the id or tag of an autoencoder")
    return FeatureReference(proto.feature.autoencoder, proto.feature.feature)


def _gate(proto: pb.Gate, field: str) -> Gate:
    return Gate(_condition_in(proto, field), latched=proto.latched)


def _abort(proto: pb.AbortCondition, field: str) -> AbortCondition:
    return AbortCondition(name=proto.name, condition=_condition_in(proto, field))


def _readout(proto: pb.Readout, field: str) -> Readout:
    name = chosen(proto, "kind", field)
    spec = READOUT_OF_NAME[name]
    return Readout(
        kind=spec.decode(getattr(proto, name), f"{field}.{name}"),
        site=None if spec.place and not proto.site else decode_site(proto.site, f"{field}.site"),
        name=proto.name,
        layers=_layers(proto.layers, proto.all_layers, field, needed=spec.place is None),
        all_layers=proto.all_layers,
        scope=decode_scope(proto.scope, f"{field}.scope"),
    )


def token_readouts(program: BoundProgram) -> frozenset[str]:
    """Names of the readouts whose ids are tokens. What a message does not ask for has no values to name."""
    asked = ((readout.name, READOUT_OF.get(readout.kind)) for readout in program.readouts)
    return frozenset(name for name, spec in asked if spec is not None and spec.ids_are_tokens)


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

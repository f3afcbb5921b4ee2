"""The edit `features`, t(h) = h + Σ_i (g_i - f_i(h)) d_i, and the readouts of chosen features and of the k largest.

Only the change of the chosen features is added: what the autoencoder does not reconstruct of h stays in it. All f_i are
those of h as it came, so that the features of an edit act together. A value between 0 and the threshold of a jumprelu
feature is written in full, g_i d_i, but an autoencoder that reads it again finds 0: it is g_i off.

Bricken et al. 2023; Templeton et al. 2024; Rajamanoharan et al. 2024 (JumpReLU).
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from patchclamp_server.artifacts.autoencoder_spec import WITH_THRESHOLD
from patchclamp_server.artifacts.autoencoders import FeatureRows
from patchclamp_server.errors import InvalidArgument
from patchclamp_server.interventions.banks import ZERO_ROW
from patchclamp_server.interventions.bound import BoundReadout
from patchclamp_server.interventions.columns import BIAS, FACTOR, JUMP, OFFSET, OTHER, UNIT, EntryKind
from patchclamp_server.interventions.encoders import whole_encoder
from patchclamp_server.interventions.features import autoencoder_at, check_place, chosen_rows
from patchclamp_server.interventions.field_checks import count, distinct
from patchclamp_server.interventions.kinds.feature_rules import FeatureRule, TopFeaturesRule
from patchclamp_server.interventions.kinds.kind import EditTable, Payload, ReadoutTable, UnitColumns, Written
from patchclamp_server.interventions.kinds.neurons import operation_in
from patchclamp_server.interventions.kinds.readings import ProjectionRule
from patchclamp_server.interventions.kinds.spec import EditNumbers, EditSpec, ReadoutNumbers, ReadoutSpec, Where
from patchclamp_server.interventions.program import EditKind, NeuronOp, ReadoutKind
from patchclamp_server.interventions.request_warnings import RequestWarning, WarningCode
from patchclamp_server.interventions.resolver import Resolver, check_top_k, checked_bounds
from patchclamp_server.model.arrays import IntArray

if TYPE_CHECKING:
    # The engine also runs where the messages are not installed.
    from patchclamp.v1 import program_pb2 as pb


@dataclass(frozen=True, eq=False)
class FeatureEdit(EditKind):
    """g_i by the op; `values` has one for all features, or one each, and none for CLAMP."""

    autoencoder: str
    features: tuple[int, ...]
    op: NeuronOp = NeuronOp.SET
    values: tuple[float, ...] = ()
    min: float | None = None
    max: float | None = None


@dataclass(frozen=True, eq=False)
class FeatureReadout(ReadoutKind):
    autoencoder: str
    features: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class TopFeaturesReadout(ReadoutKind):
    autoencoder: str
    k: int


def _write(payload: Payload) -> Written:
    """Writes the payload (encoder, decoder [n, width], bias, jump, factor, offset [n]).

    A transcoder has no encoder at the site that it writes.
    """
    encoder, decoder, bias, jump, factor, offset = payload

    def units(rows: IntArray) -> UnitColumns:
        written, read = np.split(rows, 2) if len(encoder) else (rows, np.full_like(rows, ZERO_ROW))
        numbers = {BIAS: bias, JUMP: jump, FACTOR: factor, OFFSET: offset}
        return UnitColumns({UNIT: written, OTHER: read}, {column: n.numpy() for column, n in numbers.items()})

    return Written(torch.cat((decoder, encoder)), units)


def _write_readout(readout: BoundReadout, layer: int) -> Written:
    assert readout.latents is not None
    return Written(readout.vectors[layer], latents=readout.latents.numpy())


def _n_features(readout: BoundReadout, layer: int) -> int:
    return len(readout.ids)


def _write_top(readout: BoundReadout, layer: int) -> Written:
    return Written(count=readout.k, held=readout.encoder)


FEATURES = EditTable(EntryKind.FEATURES, _write, FeatureRule)
FEATURE_VALUES = ReadoutTable(EntryKind.PROJECTION, _write_readout, ProjectionRule, _n_features)
TOP_FEATURES = ReadoutTable(EntryKind.TOP_FEATURES, _write_top, TopFeaturesRule)


def _reference(proto: "pb.FeatureEdit | pb.FeatureReadout", field: str) -> str:
    if not proto.autoencoder:
        raise InvalidArgument(f"{field}.autoencoder", "expected the id or tag of an autoencoder")
    return proto.autoencoder


def _decode(proto: "pb.FeatureEdit", field: str) -> FeatureEdit:
    ref = _reference(proto, field)
    if not proto.features:
        raise InvalidArgument(f"{field}.features", "expected at least one feature")
    features = distinct(proto.features, f"{field}.features")
    op, values, low, high = operation_in(proto, field, len(features), "features")
    return FeatureEdit(ref, features, op, values, low, high)


def _bind(kind: FeatureEdit, where: Where) -> EditNumbers:
    path, ref = where.path, kind.autoencoder
    autoencoder = where.resolver.autoencoder(ref, f"{path}.autoencoder")
    spec = autoencoder.spec
    reads, writes = (spec.layer, spec.site.order), (spec.output_layer, spec.output_site.order)
    if spec.is_transcoder and reads >= writes:
        message = (
            f"{ref} is a transcoder that writes {spec.output_site.value} of layer {spec.output_layer}, which does not "
            f"come after what it reads, {spec.site.value} of layer {spec.layer}"
        )
        raise InvalidArgument(f"{path}.autoencoder", message)
    check_place(ref, "writes", (spec.output_site, spec.output_layer), (where.site, where.layers), where.owner)
    rows = chosen_rows(autoencoder, ref, kind.features, path)
    factor, offset, bounds = _targets(kind, path)
    warned = _below_jump(kind, rows, where) if spec.function in WITH_THRESHOLD else ()
    if not spec.is_transcoder:
        payload = (rows.encoder, rows.decoder, rows.folded_bias, rows.threshold, factor, offset)
        return EditNumbers(FEATURES, dict.fromkeys(where.layers, payload), bounds, warnings=warned)
    zeros = torch.zeros(len(rows.features))
    payload = (torch.empty(0, where.width), rows.decoder, zeros, zeros, factor, offset)
    given = ReadoutNumbers({spec.layer: rows.encoder}, kind.features, latents=_latents(rows))
    return EditNumbers(
        FEATURES,
        dict.fromkeys(where.layers, payload),
        bounds,
        input=given,
        input_place=(spec.site, spec.layer),
        warnings=warned,
    )


def _latents(rows: FeatureRows) -> Tensor:
    return torch.stack((rows.folded_bias, rows.threshold), dim=1)


def _targets(kind: FeatureEdit, path: str) -> tuple[Tensor, Tensor, tuple[float, float]]:
    """Returns factor, offset [n] and the bounds of g = clip(factor f + offset)."""
    n, free = len(kind.features), (-math.inf, math.inf)
    one, none = torch.ones(n), torch.zeros(n)
    if kind.op is NeuronOp.CLAMP:
        return one, none, checked_bounds(kind.min, kind.max, f"{path}.clamp")
    values, field = torch.tensor(kind.values, dtype=torch.float32), f"{path}.{kind.op.value}.values"
    if len(values) not in (1, n):
        raise InvalidArgument(field, f"expected 1 value, or one for each of the {n} features, got {len(values)}")
    if not bool(torch.isfinite(values).all()):
        raise InvalidArgument(field, "holds NaN or infinite numbers")
    values = values.expand(n).contiguous()
    match kind.op:
        case NeuronOp.SET:
            return none, values, free
        case NeuronOp.SCALE:
            return values, none, free
        case _:
            return one, values, free


def _below_jump(kind: FeatureEdit, rows: FeatureRows, where: Where) -> tuple[RequestWarning, ...]:
    """Warns of features that are set to, or held down to, a value at which a jumprelu is closed."""
    if kind.op is NeuronOp.SET:
        goals, field = torch.tensor(kind.values).expand(len(rows.features)), "set"
    elif kind.op is NeuronOp.CLAMP and kind.max is not None:
        goals, field = torch.full((len(rows.features),), kind.max), "clamp"
    else:
        return ()
    below = ((goals > 0) & (goals <= rows.threshold)).nonzero().flatten().tolist()
    if not below:
        return ()
    i = below[0]
    message = (
        f"feature {rows.features[i]} of {kind.autoencoder} is active above {float(rows.threshold[i]):.6g}: the edit "
        f"writes {float(goals[i]):.6g} of its decoder row, but read again it is 0, {float(goals[i]):.6g} off"
    )
    if len(below) > 1:
        message += f"; so it is with {len(below)} features of this edit"
    return (RequestWarning(WarningCode.BELOW_JUMP, f"{where.path}.{field}", message),)


def _inline(kind: FeatureEdit) -> str:
    return ""


def _decode_readout(proto: "pb.FeatureReadout", field: str) -> ReadoutKind:
    ref = _reference(proto, field)
    if proto.features and proto.k:
        raise InvalidArgument(f"{field}.k", "features are given as well; expected one of features, k")
    if proto.k:
        return TopFeaturesReadout(ref, count(proto.k, f"{field}.k", low=1))
    if not proto.features:
        raise InvalidArgument(f"{field}.features", "expected features, or k")
    return FeatureReadout(ref, distinct(proto.features, f"{field}.features"))


def _bind_chosen(kind: FeatureReadout, where: Where) -> ReadoutNumbers:
    ref, path = kind.autoencoder, where.path
    autoencoder = autoencoder_at(where.resolver, ref, where.site, where.layers, f"{path}.autoencoder", where.owner)
    rows = chosen_rows(autoencoder, ref, kind.features, path)
    return ReadoutNumbers(dict.fromkeys(where.layers, rows.encoder), kind.features, latents=_latents(rows))


def _bind_top(kind: TopFeaturesReadout, where: Where) -> ReadoutNumbers:
    ref, path = kind.autoencoder, f"{where.path}.autoencoder"
    autoencoder = autoencoder_at(where.resolver, ref, where.site, where.layers, path, where.owner)
    check_top_k(kind.k, autoencoder.n_features, f"{where.path}.k")
    return ReadoutNumbers(k=kind.k, encoder=whole_encoder(where.resolver.autoencoder_id(ref, path), autoencoder))


def _autoencoder(kind: FeatureEdit) -> str:
    return kind.autoencoder


def _layer_written(ref: str, resolver: Resolver, path: str) -> tuple[int, ...]:
    return (resolver.autoencoder(ref, f"{path}.autoencoder").spec.output_layer,)


_BUILDERS = ("set_features", "scale_features", "add_features", "clamp_features")
EDITS = (EditSpec("features", FeatureEdit, _decode, _bind, _BUILDERS, _inline, _autoencoder, _layer_written),)
READOUTS = (
    ReadoutSpec("features", FeatureReadout, _decode_readout, _bind_chosen, ("read_features",), FEATURE_VALUES),
    ReadoutSpec("features", TopFeaturesReadout, _decode_readout, _bind_top, ("read_top_features",), TOP_FEATURES),
)

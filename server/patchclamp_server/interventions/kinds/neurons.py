"""The edit `neurons` sets, scales, adds to or clamps single neurons: t(a) = clip(f a + c, low, high).

a is the activation of a neuron at mlp_post, or one of the pre-activations that it is made of, at mlp_gate or mlp_up.
"""

import math
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from patchclamp_server.artifacts.types import ArtifactKind
from patchclamp_server.cpu.invariant.operators import holds_for
from patchclamp_server.cpu.invariant.reads import Read
from patchclamp_server.errors import InvalidArgument
from patchclamp_server.interventions import compiled_writes
from patchclamp_server.interventions.columns import (
    FACTOR,
    OFFSET,
    UNIT,
    UNIT_HIGH,
    UNIT_LOW,
    EntryFlag,
    EntryKind,
)
from patchclamp_server.interventions.compiled_edits import edit_units
from patchclamp_server.interventions.field_checks import chosen, distinct, finite
from patchclamp_server.interventions.kinds.kind import EditTable, Payload, UnitColumns, Written, apart
from patchclamp_server.interventions.kinds.rules import CompiledEdit, Entries, StepContext, Units
from patchclamp_server.interventions.kinds.spec import EditNumbers, EditSpec, Where, check_neuron_site
from patchclamp_server.interventions.kinds.vectors import bounds_in
from patchclamp_server.interventions.program import NeuronEdit, NeuronOp
from patchclamp_server.interventions.resolver import Resolver, check_indices, checked_bounds
from patchclamp_server.interventions.row_arithmetic import add_product, interpolate, row_norms
from patchclamp_server.model.arrays import IntArray

if TYPE_CHECKING:
    # The engine also runs where the messages are not installed.
    from patchclamp.v1 import program_pb2 as pb


class NeuronRule(CompiledEdit):
    """Has the target t(a) = clip(f a + c, low, high) for single neurons."""

    def __init__(self, entries: Entries, flags: EntryFlag) -> None:
        self.entries = entries
        self.units = units = Units(entries, entries.width)
        self.factor, self.offset = units.numbers(FACTOR), units.numbers(OFFSET)  # [U]
        self.low, self.high = units.numbers(UNIT_LOW), units.numbers(UNIT_HIGH)

    def run(self, x: Tensor, context: StepContext) -> None:
        entries, units = self.entries, self.units
        if holds_for(x):
            opened = entries.opened(context)
            numbers = self.factor, self.offset[:, None], (self.low, self.high)
            entries.note(*edit_units(x, entries, units, *numbers, opened), opened)
            return
        norms = row_norms(x.index_select(0, entries.rows).float())
        flat = x.view(-1)
        a = flat.index_select(0, units.place).float()
        target = torch.minimum(torch.maximum(add_product(self.offset, a, self.factor), self.low), self.high)
        edited = interpolate(a, target, units.strength)
        opened = entries.opened(context)
        if entries.gate is not None:
            edited = torch.where(units.opened(opened) > 0, edited, a)
        flat.index_copy_(0, units.place, edited.to(x.dtype))
        norms = units.norms_before(norms, edited.square() - a.square())
        entries.note(units.moved(norms, (edited - a).square()), norms, opened)

    def write(self, opened: Tensor) -> Read:
        numbers = self.factor, self.offset[:, None], (self.low, self.high)
        return compiled_writes.edit_units(self.entries, self.units, *numbers, opened)


def _write(payload: Payload) -> Written:
    """Writes the payload (index, factor, offset, low, high), [n] each."""
    order = np.argsort(payload[0].numpy())
    index, factor, offset, low, high = (column.numpy()[order] for column in payload)

    def units(_: IntArray) -> UnitColumns:
        return UnitColumns({UNIT: index}, {FACTOR: factor, OFFSET: offset, UNIT_LOW: low, UNIT_HIGH: high})

    return Written(None, units)


NEURONS = EditTable(EntryKind.NEURONS, _write, NeuronRule, apart, whole_rows=False)


def _decode(proto: "pb.NeuronEdit", field: str) -> NeuronEdit:
    if proto.neurons and proto.neuron_set:
        message = "neurons are given as well; expected one of neurons, neuron_set"
        raise InvalidArgument(f"{field}.neuron_set", message)
    if not proto.neurons and not proto.neuron_set:
        raise InvalidArgument(f"{field}.neurons", "expected neurons, or neuron_set")
    neurons = distinct(proto.neurons, f"{field}.neurons")
    op, values, low, high = operation_in(proto, field, len(neurons), "neurons")
    return NeuronEdit(neurons, proto.neuron_set or None, op, values, low, high)


def operation_in(
    proto: "pb.NeuronEdit | pb.FeatureEdit", field: str, n: int, what: str
) -> tuple[NeuronOp, tuple[float, ...], float | None, float | None]:
    """Returns the op, its values and its bounds. With `n` units that are `what`, there is a value for all or for each;
    with 0, any number of values."""
    name = chosen(proto, "op", field)
    if name == "clamp":
        low, high = bounds_in(proto.clamp, f"{field}.clamp")
        return NeuronOp.CLAMP, (), low, high
    values = tuple(finite(v, f"{field}.{name}.values[{i}]") for i, v in enumerate(getattr(proto, name).values))
    if n and len(values) not in (1, n):
        message = f"expected 1 value, or one for each of the {n} {what}, got {len(values)}"
        raise InvalidArgument(f"{field}.{name}.values", message)
    return NeuronOp(name), values, None, None


def _bind(kind: NeuronEdit, where: Where) -> EditNumbers:
    check_neuron_site(where, "edited")
    payload = {layer: _payload(kind, where, layer) for layer in where.layers}
    return EditNumbers(NEURONS, payload)


def _payload(kind: NeuronEdit, where: Where, layer: int) -> Payload:
    path, op = where.path, kind.op.value
    values: Tensor | None = torch.tensor(kind.values, dtype=torch.float32)
    if kind.neuron_set is not None:
        if kind.neurons:
            raise InvalidArgument(f"{path}.neurons", "give neurons or a neuron_set, not both")
        artifact = where.resolver.artifact(kind.neuron_set, ArtifactKind.NEURON_SET, f"{path}.neuron_set")
        if layer not in artifact.info.layers:
            raise InvalidArgument(f"{path}.neuron_set", f"{kind.neuron_set} has no neurons for layer {layer}")
        index, stored = artifact.neurons(layer)
        check_indices(tuple(index.tolist()), where.width, f"{path}.neuron_set", "neuron")
        if not kind.values:
            values = stored
    else:
        if not kind.neurons:
            raise InvalidArgument(f"{path}.neurons", "at least one neuron is needed")
        check_indices(kind.neurons, where.width, f"{path}.neurons", "neuron")
        index = torch.tensor(kind.neurons, dtype=torch.int64)
    n = len(index)
    one = torch.ones(n)
    low, high = torch.full((n,), -math.inf), torch.full((n,), math.inf)
    if kind.op is NeuronOp.CLAMP:
        bounds = checked_bounds(kind.min, kind.max, f"{path}.clamp")
        return (index, one, torch.zeros(n), one * bounds[0], one * bounds[1])
    if values is None or len(values) == 0:
        lacking = "" if kind.neuron_set is None else f": {kind.neuron_set} carries none of its own"
        raise InvalidArgument(f"{path}.{op}.values", f"a value is needed{lacking}")
    if len(values) not in (1, n):
        raise InvalidArgument(f"{path}.{op}.values", f"one value or {n}, got {len(values)}")
    if not bool(torch.isfinite(values).all()):
        raise InvalidArgument(f"{path}.{op}.values", "holds NaN or infinite numbers")
    values = values.float().expand(n).contiguous()
    if kind.op is NeuronOp.SET:
        return (index, torch.zeros(n), values, low, high)
    if kind.op is NeuronOp.SCALE:
        return (index, values, torch.zeros(n), low, high)
    return (index, one, values, low, high)


def _inline(kind: NeuronEdit) -> str:
    return ""


def _neuron_set(kind: NeuronEdit) -> str | None:
    return kind.neuron_set


def _layers_of_set(ref: str, resolver: Resolver, path: str) -> tuple[int, ...]:
    return resolver.artifact(ref, ArtifactKind.NEURON_SET, f"{path}.neuron_set").info.layers


_BUILDERS = ("set_neurons", "scale_neurons", "add_neurons", "clamp_neurons")
EDITS = (EditSpec("neurons", NeuronEdit, _decode, _bind, _BUILDERS, _inline, _neuron_set, _layers_of_set),)

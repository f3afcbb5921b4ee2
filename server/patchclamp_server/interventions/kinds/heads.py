"""The edit `heads` scales the output z of single heads or replaces it by a mean: t(z) = f z + m. Uniform attention is a
scale of 0 of their queries."""

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from patchclamp_server.cpu.invariant.operators import holds_for
from patchclamp_server.cpu.invariant.reads import Read
from patchclamp_server.errors import InvalidArgument
from patchclamp_server.interventions import compiled_writes
from patchclamp_server.interventions.columns import FACTOR, OTHER, UNIT, EntryFlag, EntryKind
from patchclamp_server.interventions.compiled_edits import edit_units
from patchclamp_server.interventions.field_checks import chosen, distinct, finite
from patchclamp_server.interventions.kinds.kind import EditTable, Payload, UnitColumns, Written, apart
from patchclamp_server.interventions.kinds.rules import CompiledEdit, Entries, StepContext, Units
from patchclamp_server.interventions.kinds.spec import EditNumbers, EditSpec, ReadoutNumbers, ReadoutSpec, Where
from patchclamp_server.interventions.program import HeadEdit, HeadReadout
from patchclamp_server.interventions.resolver import check_finite, check_indices
from patchclamp_server.interventions.row_arithmetic import add_product, interpolate, row_norms
from patchclamp_server.interventions.tensor_messages import decode_tensor
from patchclamp_server.model.arrays import IntArray
from patchclamp_server.model.sites import Site

if TYPE_CHECKING:
    # The engine also runs where the messages are not installed.
    from patchclamp.v1 import program_pb2 as pb


class HeadRule(CompiledEdit):
    """Has the target t(z) = f z + m for single heads."""

    def __init__(self, entries: Entries, flags: EntryFlag) -> None:
        self.entries = entries
        self.n_heads = entries.setting.n_heads
        self.units = units = Units(entries, self.n_heads)
        self.factor = units.numbers(FACTOR)  # [U]
        self.offset = entries.bank(units.ints(OTHER), entries.setting.head_dim)  # [U, head_dim]

    def run(self, x: Tensor, context: StepContext) -> None:
        entries, units = self.entries, self.units
        if holds_for(x):
            opened = entries.opened(context)
            entries.note(*edit_units(x, entries, units, self.factor, self.offset, None, opened), opened)
            return
        norms = row_norms(x.index_select(0, entries.rows).float())
        heads = x.view(x.shape[0] * self.n_heads, -1)
        z = heads.index_select(0, units.place).float()
        target = add_product(self.offset, z, self.factor[:, None])
        edited = interpolate(z, target, units.strength[:, None])
        opened = entries.opened(context)
        if entries.gate is not None:
            edited = torch.where(units.opened(opened)[:, None] > 0, edited, z)
        heads.index_copy_(0, units.place, edited.to(x.dtype))
        norms = units.norms_before(norms, (edited.square() - z.square()).sum(1))
        entries.note(units.moved(norms, (edited - z).square().sum(1)), norms, opened)

    def write(self, opened: Tensor) -> Read:
        return compiled_writes.edit_units(self.entries, self.units, self.factor, self.offset, None, opened)


def _write(payload: Payload) -> Written:
    """Writes the payload (index, factor [n], offset [n, head_dim])."""
    order = np.argsort(payload[0].numpy())
    index, factor = payload[0].numpy()[order], payload[1].numpy()[order]

    def units(rows: IntArray) -> UnitColumns:
        return UnitColumns({UNIT: index, OTHER: rows[order]}, {FACTOR: factor})

    return Written(payload[2], units)


HEADS = EditTable(EntryKind.HEADS, _write, HeadRule, apart, whole_rows=False)


def _decode(proto: "pb.HeadEdit", field: str) -> HeadEdit:
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


def _bind(kind: HeadEdit, where: Where) -> EditNumbers:
    if where.site is not Site.ATTN_Z:
        raise InvalidArgument(f"{where.owner}.site", f"heads are edited at attn_z, not {where.site.value}")
    site = Site.ATTN_Q if kind.uniform else None
    return EditNumbers(HEADS, _payload(kind, where), site=site)


def _payload(kind: HeadEdit, where: Where) -> dict[int, Payload]:
    path, layers, info = where.path, where.layers, where.resolver.info
    if not kind.heads:
        raise InvalidArgument(f"{path}.heads", "at least one head is needed")
    check_indices(kind.heads, info.n_heads, f"{path}.heads", "head")
    n, dim = len(kind.heads), info.head_dim
    index = torch.tensor(kind.heads, dtype=torch.int64)
    if kind.mean is None:
        scale = 0.0 if kind.uniform else 1.0 if kind.scale is None else kind.scale
        check_finite(scale, f"{path}.scale")
        return dict.fromkeys(layers, (index, torch.tensor([float(scale)] * n), torch.zeros(n, dim)))
    mean = kind.mean.float()
    if list(mean.shape) not in ([n, dim], [len(layers), n, dim]):
        raise InvalidArgument(
            f"{path}.mean", f"shape {list(mean.shape)} is neither [{n}, {dim}] nor [{len(layers)}, {n}, {dim}]"
        )
    if not bool(torch.isfinite(mean).all()):
        raise InvalidArgument(f"{path}.mean", "holds NaN or infinite numbers")
    rows = mean if mean.dim() == 3 else mean.expand(len(layers), n, dim)
    return {layer: (index, torch.zeros(n), rows[i].contiguous()) for i, layer in enumerate(layers)}


def _inline(kind: HeadEdit) -> str:
    return "" if kind.mean is None else "heads.mean"


_BUILDERS = ("scale_heads", "ablate_heads", "mean_heads", "uniform_heads")
EDITS = (EditSpec("heads", HeadEdit, _decode, _bind, _BUILDERS, _inline),)


def _decode_readout(proto: "pb.HeadReadout", field: str) -> HeadReadout:
    return HeadReadout(distinct(proto.heads, f"{field}.heads"))


def _bind_readout(kind: HeadReadout, where: Where) -> ReadoutNumbers:
    if where.site is not Site.ATTN_Z:
        raise InvalidArgument(f"{where.owner}.site", f"heads are read at attn_z, not {where.site.value}")
    n_heads = where.resolver.info.n_heads
    check_indices(kind.heads, n_heads, f"{where.path}.heads", "head")
    return ReadoutNumbers(heads=dict.fromkeys(where.layers, kind.heads or tuple(range(n_heads))))


READOUTS = (ReadoutSpec("heads", HeadReadout, _decode_readout, _bind_readout, ("read_heads",), None),)

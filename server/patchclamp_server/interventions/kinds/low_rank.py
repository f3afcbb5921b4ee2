"""The edit `low_rank` (ReFT, Wu et al. 2024) has the target t(h) = h + Rᵀ(W h + b - R h)."""

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from patchclamp_server.artifacts.types import ArtifactKind
from patchclamp_server.cpu.invariant import operators as invariant
from patchclamp_server.errors import InvalidArgument
from patchclamp_server.interventions.banks import ZERO_ROW
from patchclamp_server.interventions.columns import COUNT, FIRST, OFFSET, OTHER, UNIT, EntryFlag, EntryKind
from patchclamp_server.interventions.field_checks import alone, required
from patchclamp_server.interventions.kinds.kind import EditTable, Payload, UnitColumns, Written
from patchclamp_server.interventions.kinds.rules import Entries, Grid, TargetRule
from patchclamp_server.interventions.kinds.spec import EditNumbers, EditSpec, Where
from patchclamp_server.interventions.program import LowRank
from patchclamp_server.interventions.tensor_messages import decode_tensor
from patchclamp_server.model.arrays import IntArray

if TYPE_CHECKING:
    # The engine also runs where the messages are not installed.
    from patchclamp.v1 import program_pb2 as pb


class Ranks:
    """Holds the units of k low-rank entries as matrices; zeros pad smaller ranks to the largest one."""

    def __init__(self, entries: Entries) -> None:
        first, count = entries.ints(FIRST), entries.ints(COUNT)
        rank = np.arange(int(count.max()))
        padding = rank >= count[:, None]  # [k, most]
        number = np.where(padding, 0, first[:, None] + rank)
        host = entries.host
        self._entries, self._shape = entries, (*padding.shape, entries.width)
        self.rotation = self._vectors(np.where(padding, ZERO_ROW, host.unit_ints[number, UNIT]))  # [k, most, width]
        self.weight = self._vectors(np.where(padding, ZERO_ROW, host.unit_ints[number, OTHER]))
        numbers = host.unit_numbers[number, OFFSET]
        self.bias = entries.tensor(np.where(padding, np.float32(0), numbers))  # [k, most]
        # [E]: the entry that a row belongs to.
        self.owner = entries.tensor(np.arange(len(count))) if entries.index is None else entries.index

    def _vectors(self, rows: IntArray) -> Tensor:
        return self._entries.bank(rows.reshape(-1).astype(np.int64), self._shape[2]).view(self._shape)


class LowRankRule(TargetRule):
    """Has the target t(h) = h + Rᵀ(W h + b - R h)."""

    def __init__(self, entries: Entries, flags: EntryFlag) -> None:
        super().__init__(entries, preserve_norm=bool(flags & EntryFlag.PRESERVE_NORM))
        ranks = Ranks(entries)
        self.rotation, self.bias, self.owner = ranks.rotation, ranks.bias, ranks.owner
        self.difference = ranks.weight - ranks.rotation
        self.grid = Grid(entries)

    def target(self, h: Tensor, norms: Tensor) -> Tensor:
        if invariant.holds_for(h):
            return invariant.low_rank(h, h, self.owner, self.difference, self.bias, self.rotation)
        inner = torch.baddbmm(self.bias[:, None], self.grid.spread(h), self.difference.transpose(1, 2))
        return h + self.grid.collect(torch.bmm(inner, self.rotation))


def write_ranks(payload: Payload) -> Written:
    """Writes the payload (R, W [rank, width], b [rank])."""
    rotation, weight, bias = payload

    def units(rows: IntArray) -> UnitColumns:
        r, w = np.split(rows, 2)
        return UnitColumns({UNIT: r, OTHER: w}, {OFFSET: bias.numpy()})

    return Written(torch.cat((rotation, weight)), units)


LOW_RANK = EditTable(EntryKind.LOW_RANK, write_ranks, LowRankRule)


def _decode(proto: "pb.LowRank", field: str) -> LowRank:
    if proto.subspace:
        alone(proto, "subspace", ("rotation", "weight", "bias"), field)
        return LowRank(subspace=proto.subspace)
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


def _bind(kind: LowRank, where: Where) -> EditNumbers:
    if kind.subspace:
        return EditNumbers(LOW_RANK, _stored(kind.subspace, where))
    rotation, weight, bias = kind.rotation, kind.weight, kind.bias
    if rotation is None or weight is None or bias is None:
        raise InvalidArgument(where.path, "expected rotation, weight and bias, or subspace")
    rank = bias.shape[0] if bias.dim() == 1 else 0
    if rank < 1:
        raise InvalidArgument(f"{where.path}.bias", "must be a vector of at least one number")
    for name, tensor in (("rotation", rotation), ("weight", weight), ("bias", bias)):
        expected = [rank] if name == "bias" else [rank, where.width]
        if list(tensor.shape) != expected:
            raise InvalidArgument(f"{where.path}.{name}", f"shape {list(tensor.shape)} is not {expected}")
        if not bool(torch.isfinite(tensor).all()):
            raise InvalidArgument(f"{where.path}.{name}", "holds NaN or infinite numbers")
    return EditNumbers(LOW_RANK, dict.fromkeys(where.layers, (rotation.float(), weight.float(), bias.float())))


def _stored(ref: str, where: Where) -> dict[int, Payload]:
    path = f"{where.path}.subspace"
    artifact = where.resolver.artifact_at(ref, ArtifactKind.SUBSPACE, where.layers, where.width, path)
    payload: dict[int, Payload] = {}
    for layer in where.layers:
        found = artifact.subspace(layer)
        if found.weight is None or found.bias is None:
            raise InvalidArgument(path, f"{ref} has no weight and bias for layer {layer}: it is no intervention")
        payload[layer] = (found.rotation.float(), found.weight.float(), found.bias.float())
    return payload


def _inline(kind: LowRank) -> str:
    return "" if kind.subspace else "low_rank"


EDITS = (EditSpec("low_rank", LowRank, _decode, _bind, ("low_rank",), _inline),)

"""The edit `affine` has the target t(h) = A h + b, with a full matrix A, or one of low rank, A = U Vᵀ.

An entry of low rank is Σ_r R_r (W_r·h + b_r): a rank has R = u_r, W = v_r and b = 0, and one more has R = b, W = 0 and
b = 1. A full matrix has a unit for each channel, with the row A_i and b_i; it is read once for every row of the batch,
by kernels as well.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from patchclamp_server.artifacts.types import ArtifactKind
from patchclamp_server.cpu.invariant import operators as invariant
from patchclamp_server.errors import InvalidArgument
from patchclamp_server.interventions.columns import OFFSET, OTHER, UNIT, EntryFlag, EntryKind
from patchclamp_server.interventions.field_checks import alone, required
from patchclamp_server.interventions.kinds.kind import EditTable, Payload, UnitColumns, Written
from patchclamp_server.interventions.kinds.low_rank import Ranks, write_ranks
from patchclamp_server.interventions.kinds.rules import Entries, Grid, TargetRule
from patchclamp_server.interventions.kinds.spec import EditNumbers, EditSpec, Where
from patchclamp_server.interventions.program import EditKind
from patchclamp_server.interventions.tensor_messages import decode_tensor
from patchclamp_server.model.arrays import IntArray

if TYPE_CHECKING:
    # The engine also runs where the messages are not installed.
    from patchclamp.v1 import program_pb2 as pb


@dataclass(frozen=True, eq=False)
class Affine(EditKind):
    """A [width, width] is `matrix`, or `left` `right`ᵀ of [width, rank] each; `bias` is [width], None for 0. Or all of
    them are those of an affine_map artifact, by layer."""

    matrix: Tensor | None = None
    left: Tensor | None = None
    right: Tensor | None = None
    bias: Tensor | None = None
    affine_map: str = ""


class AffineRule(TargetRule):
    """Has the target t(h) = A h + b. The units of an entry are the channels, in order."""

    def __init__(self, entries: Entries, flags: EntryFlag) -> None:
        super().__init__(entries, preserve_norm=bool(flags & EntryFlag.PRESERVE_NORM))
        ranks = Ranks(entries)
        self.matrix, self.bias, self.owner = ranks.weight, ranks.bias, ranks.owner
        self.grid = Grid(entries)

    def target(self, h: Tensor, norms: Tensor) -> Tensor:
        if invariant.holds_for(h):
            return invariant.affine(h, self.owner, self.matrix, self.bias)
        inner = torch.baddbmm(self.bias[:, None], self.grid.spread(h), self.matrix.transpose(1, 2))
        return self.grid.collect(inner)


class AffineLowRankRule(TargetRule):
    """Has the target t(h) = Rᵀ(W h + b)."""

    def __init__(self, entries: Entries, flags: EntryFlag) -> None:
        super().__init__(entries, preserve_norm=bool(flags & EntryFlag.PRESERVE_NORM))
        self.ranks = Ranks(entries)
        self.grid = Grid(entries)

    def target(self, h: Tensor, norms: Tensor) -> Tensor:
        ranks = self.ranks
        if invariant.holds_for(h):
            zeros = torch.zeros_like(h)
            return invariant.low_rank(zeros, h, ranks.owner, ranks.weight, ranks.bias, ranks.rotation)
        inner = torch.baddbmm(ranks.bias[:, None], self.grid.spread(h), ranks.weight.transpose(1, 2))
        return self.grid.collect(torch.bmm(inner, ranks.rotation))


def _write_full(payload: Payload) -> Written:
    """Writes the payload (A [width, width], b [width])."""
    matrix, bias = payload

    def units(rows: IntArray) -> UnitColumns:
        return UnitColumns({UNIT: np.arange(len(rows)), OTHER: rows}, {OFFSET: bias.numpy()})

    return Written(matrix, units)


FULL = EditTable(EntryKind.AFFINE, _write_full, AffineRule)
LOW_RANK = EditTable(EntryKind.AFFINE_LOW_RANK, write_ranks, AffineLowRankRule)


def _decode(proto: "pb.Affine", field: str) -> Affine:
    if proto.affine_map:
        alone(proto, "affine_map", ("matrix", "left", "right", "bias"), field)
        return Affine(affine_map=proto.affine_map)
    if proto.HasField("matrix"):
        for name in ("left", "right"):
            if proto.HasField(name):
                raise InvalidArgument(f"{field}.{name}", "matrix is given as well; expected matrix, or left and right")
    elif not proto.HasField("left") and not proto.HasField("right"):
        raise InvalidArgument(f"{field}.matrix", "expected matrix, or left and right")
    else:
        required(proto, "left", field)
        required(proto, "right", field)
    given = {
        name: decode_tensor(getattr(proto, name), f"{field}.{name}", ndims=(1,) if name == "bias" else (2,))
        for name in ("matrix", "left", "right", "bias")
        if proto.HasField(name)
    }
    return Affine(given.get("matrix"), given.get("left"), given.get("right"), given.get("bias"))


def _bind(kind: Affine, where: Where) -> EditNumbers:
    width = where.width
    if kind.affine_map:
        return _stored(kind.affine_map, where)
    bias = torch.zeros(width) if kind.bias is None else _checked(kind.bias, (width,), f"{where.path}.bias")
    if kind.matrix is not None:
        matrix = _checked(kind.matrix, (width, width), f"{where.path}.matrix")
        return EditNumbers(FULL, dict.fromkeys(where.layers, (matrix, bias)))
    if kind.left is None or kind.right is None:
        raise InvalidArgument(f"{where.path}.matrix", "expected matrix, or left and right")
    rank = kind.left.shape[-1]
    left = _checked(kind.left, (width, rank), f"{where.path}.left")
    right = _checked(kind.right, (width, rank), f"{where.path}.right")
    return EditNumbers(LOW_RANK, dict.fromkeys(where.layers, _factors(left, right, bias)))


def _stored(ref: str, where: Where) -> EditNumbers:
    """Returns the maps of an artifact. One edit runs as one entry, so that layers of both forms all run as matrices."""
    path = f"{where.path}.affine_map"
    artifact = where.resolver.artifact_at(ref, ArtifactKind.AFFINE_MAP, where.layers, where.width, path)
    full: dict[int, Payload] = {}
    factors: dict[int, Payload] = {}
    for layer in where.layers:
        found = artifact.affine_map(layer)
        bias = torch.zeros(where.width) if found.bias is None else found.bias.float()
        if found.left is not None and found.right is not None:
            left, right = found.left.float(), found.right.float()
            factors[layer], full[layer] = _factors(left, right, bias), (left @ right.T, bias)
        elif found.matrix is not None:
            full[layer] = (found.matrix.float(), bias)
    whole = len(factors) < len(where.layers)
    return EditNumbers(FULL if whole else LOW_RANK, full if whole else factors)


def _factors(left: Tensor, right: Tensor, bias: Tensor) -> Payload:
    return (
        torch.cat((left.T, bias[None])),
        torch.cat((right.T, torch.zeros(1, len(bias)))),
        torch.cat((torch.zeros(left.shape[1]), torch.ones(1))),
    )


def _checked(tensor: Tensor, shape: tuple[int, ...], path: str) -> Tensor:
    if tuple(tensor.shape) != shape:
        raise InvalidArgument(path, f"shape {list(tensor.shape)} is not {list(shape)}")
    if not bool(torch.isfinite(tensor).all()):
        raise InvalidArgument(path, "holds NaN or infinite numbers")
    return tensor.float()


def _inline(kind: Affine) -> str:
    return "" if kind.affine_map else "affine"


EDITS = (EditSpec("affine", Affine, _decode, _bind, ("affine",), _inline),)

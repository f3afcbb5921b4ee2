"""The edit rotate_in_plane has the target t(h) = h + Pᵀ(T - I)P(h - c), with P [2, width] orthonormal, c [width], and T
the rotation of the plane by θ from its first axis to its second (Engels et al. 2024 turn circular features so).

It is an edit of low rank, h + Rᵀ(W h + b - R h), with R = P, W = T P and b = (I - T)P c, and runs as one.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from patchclamp_server.artifacts.types import ArtifactKind
from patchclamp_server.errors import InvalidArgument
from patchclamp_server.interventions.field_checks import alone, finite
from patchclamp_server.interventions.kinds.kind import Payload
from patchclamp_server.interventions.kinds.low_rank import LOW_RANK
from patchclamp_server.interventions.kinds.spec import EditNumbers, EditSpec, Where
from patchclamp_server.interventions.program import EditKind
from patchclamp_server.interventions.tensor_messages import decode_tensor

if TYPE_CHECKING:
    # The engine also runs where the messages are not installed.
    from patchclamp.v1 import program_pb2 as pb

LARGEST = 2 * math.pi
# Two rows span a plane where the sine of their angle is above this.
SMALLEST_SINE = 1e-6


@dataclass(frozen=True, eq=False)
class RotateInPlane(EditKind):
    """The plane is `plane` [2, width], or a subspace artifact of rank 2. Without `centre` [width] it is that of the
    artifact, else 0."""

    radians: float
    plane: Tensor | None = None
    subspace: str = ""
    centre: Tensor | None = None


def _decode(proto: "pb.RotateInPlane", field: str) -> RotateInPlane:
    if proto.subspace:
        alone(proto, "subspace", ("plane",), field)
    elif not proto.HasField("plane"):
        raise InvalidArgument(f"{field}.plane", "expected plane or subspace")
    plane = decode_tensor(proto.plane, f"{field}.plane", ndims=(2,)) if proto.HasField("plane") else None
    centre = decode_tensor(proto.centre, f"{field}.centre", ndims=(1,)) if proto.HasField("centre") else None
    radians = finite(proto.radians, f"{field}.radians", low=-LARGEST, high=LARGEST)
    return RotateInPlane(radians, plane, proto.subspace, centre)


def _bind(kind: RotateInPlane, where: Where) -> EditNumbers:
    path, width = where.path, where.width
    if not -LARGEST <= kind.radians <= LARGEST:
        raise InvalidArgument(f"{path}.radians", f"must be in [-2 pi, 2 pi], got {kind.radians}")
    centre = None if kind.centre is None else kind.centre.double()
    if centre is not None and tuple(centre.shape) != (width,):
        raise InvalidArgument(f"{path}.centre", f"shape {list(centre.shape)} is not [{width}]")
    payload: dict[int, Payload]
    if kind.plane is not None:
        if tuple(kind.plane.shape) != (2, width):
            raise InvalidArgument(f"{path}.plane", f"shape {list(kind.plane.shape)} is not [2, {width}]")
        axes = _orthonormal(kind.plane.double(), f"{path}.plane")
        payload = dict.fromkeys(where.layers, _turn(axes, centre, kind.radians))
    else:
        ref, field = kind.subspace, f"{path}.subspace"
        artifact = where.resolver.artifact_at(ref, ArtifactKind.SUBSPACE, where.layers, width, field)
        payload = {}
        for layer in where.layers:
            found = artifact.subspace(layer)
            if len(found.rotation) != 2:
                raise InvalidArgument(field, f"{ref} has rank {len(found.rotation)} at layer {layer}; a plane has 2")
            own = None if found.centre is None else found.centre.double()
            axes = _orthonormal(found.rotation.double(), field)
            payload[layer] = _turn(axes, own if centre is None else centre, kind.radians)
    return EditNumbers(LOW_RANK, payload)


def _orthonormal(plane: Tensor, path: str) -> Tensor:
    """Returns the axes [2, width] by Gram-Schmidt, so that the first keeps its direction and the second its side."""
    lengths = plane.norm(dim=1)
    if not bool(torch.isfinite(lengths).all()) or not bool((lengths > 0).all()):
        raise InvalidArgument(path, "a row of the plane is zero, or not finite")
    first, second = plane / lengths[:, None]
    second = second - (second @ first) * first
    if float(second.norm()) < SMALLEST_SINE:
        raise InvalidArgument(path, "both rows are along one line, which spans no plane")
    return torch.stack((first, second / second.norm()))


def _turn(axes: Tensor, centre: Tensor | None, radians: float) -> Payload:
    cosine, sine = math.cos(radians), math.sin(radians)
    turn = torch.tensor([[cosine, -sine], [sine, cosine]], dtype=torch.float64)
    at = torch.zeros(2, dtype=torch.float64) if centre is None else axes @ centre
    return axes.float(), (turn @ axes).float(), (at - turn @ at).float()


def _inline(kind: RotateInPlane) -> str:
    if kind.plane is not None:
        return "rotate_in_plane.plane"
    return "" if kind.centre is None else "rotate_in_plane.centre"


EDITS = (EditSpec("rotate_in_plane", RotateInPlane, _decode, _bind, ("rotate_in_plane",), _inline),)

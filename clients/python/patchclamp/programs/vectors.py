"""Directions: the id or tag of a stored vector, or numbers sent with the request."""

from typing import TypeAlias

from patchclamp.tensors import Numbers, tensor
from patchclamp.v1 import program_pb2 as pb

VectorLike: TypeAlias = "str | Numbers | pb.Vector"


def vector(source: VectorLike, *, layer: int | None = None, unit: bool = False) -> pb.Vector:
    """A direction with options; wherever a vector is expected, `source` alone will do.

    source: artifact id or tag, or numbers [width] or [n_layers_of_edit, width].
    layer: use this layer's row of the artifact at every layer of the edit.
    unit: divide by the Euclidean norm before use; projections, in edits, conditions and readouts, always do.
    """
    message = pb.Vector(unit=unit)
    if isinstance(source, pb.Vector):
        message.CopyFrom(source)
        message.unit = unit or source.unit
    elif isinstance(source, str):
        message.artifact = source
    else:
        message.values.CopyFrom(tensor(source))
    if layer is not None:
        message.artifact_layer = layer
    return message

"""Directions: the id or tag of a stored vector, or numbers sent with the request."""

from typing import TypeAlias

from patchclamp.fields import build_as, shown
from patchclamp.tensors import Numbers, tensor
from patchclamp.v1 import program_pb2 as pb

VectorLike: TypeAlias = str | Numbers | pb.Vector


def vector(source: VectorLike, *, layer: int | None = None, unit: bool = False) -> pb.Vector:
    """Returns a direction with options; wherever a vector is expected, `source` alone will do.

    source: artifact id or tag, or numbers [width] or [n_layers_of_edit, width].
    layer: the layer whose row of the artifact is used at every layer of the edit.
    unit: whether it is divided by its Euclidean norm; in projections, of edits, conditions and readouts, it always is.
    """
    message = vector_of(source, "source")
    message.MergeFrom(build_as({"artifact_layer": "layer"}, pb.Vector, artifact_layer=layer, unit=unit))
    return message


def vector_of(source: VectorLike, field: str) -> pb.Vector:
    """Returns the direction that an argument of this name is."""
    if isinstance(source, pb.Vector):
        message = pb.Vector()
        message.CopyFrom(source)
        return message
    if isinstance(source, str):
        return pb.Vector(artifact=source)
    values = tensor(source, field)
    if not values.shape:
        raise TypeError(f"{field}: expected the id or tag of a vector, or its numbers, got {shown(source)}")
    return pb.Vector(values=values)

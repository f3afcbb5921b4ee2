"""This handles edits by one vector: its message, and the numbers that it is bound to."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from patchclamp_server.artifacts.types import ArtifactKind
from patchclamp_server.errors import InvalidArgument
from patchclamp_server.interventions.field_checks import chosen, finite, required
from patchclamp_server.interventions.kinds.kind import Payload
from patchclamp_server.interventions.kinds.spec import Where
from patchclamp_server.interventions.program import Vector
from patchclamp_server.interventions.safe_strengths import Application, SafeRange, stored_range
from patchclamp_server.interventions.tensor_messages import decode_tensor

if TYPE_CHECKING:
    # The engine also runs where the messages are not installed.
    from patchclamp.v1 import program_pb2 as pb


def vector_in(proto: Any, field: str) -> Vector:
    """Returns the field `vector` of a message that needs one."""
    required(proto, "vector", field)
    return decode_vector(proto.vector, f"{field}.vector")


def decode_vector(proto: "pb.Vector", field: str) -> Vector:
    source = chosen(proto, "source", field)
    has_row = proto.HasField("artifact_layer")
    if source == "values":
        if has_row:
            raise InvalidArgument(f"{field}.artifact_layer", "only for a vector that is an artifact")
        return Vector(values=decode_tensor(proto.values, f"{field}.values", ndims=(1, 2)), unit=proto.unit)
    if not proto.artifact:
        raise InvalidArgument(f"{field}.artifact", "expected an artifact's id or tag")
    return Vector(artifact=proto.artifact, artifact_layer=proto.artifact_layer if has_row else None, unit=proto.unit)


def bounds_in(proto: "pb.CapProjection | pb.NeuronBounds", field: str) -> tuple[float | None, float | None]:
    low = finite(proto.min, f"{field}.min") if proto.HasField("min") else None
    high = finite(proto.max, f"{field}.max") if proto.HasField("max") else None
    if low is None and high is None:
        raise InvalidArgument(f"{field}.min", "expected min, max, or both")
    if low is not None and high is not None and low > high:
        raise InvalidArgument(f"{field}.max", f"expected at least min ({low:g}), got {high:g}")
    return low, high


def payload_of(vector: Vector, where: Where, *, unit: bool) -> dict[int, Payload]:
    return where.resolver.vectors(vector, where.site, where.layers, where.width, f"{where.path}.vector", unit=unit)


def safe_strengths(vector: Vector, where: Where, application: Application) -> dict[int, SafeRange]:
    """Returns the range of the factor of the stored vector by layer, where its card has one for this place."""
    if vector.artifact is None:
        return {}
    info = where.resolver.artifact(vector.artifact, ArtifactKind.VECTOR, f"{where.path}.vector.artifact").info
    if info.site is not where.site:
        return {}
    ranges = {
        layer: stored_range(info.evidence, application, layer)
        for layer in where.layers
        if vector.artifact_layer in (None, layer)
    }
    return {layer: found for layer, found in ranges.items() if found is not None}


def inline_vector(name: str) -> Callable[[Any], str]:
    """Returns the EditSpec.inline of a kind with one vector."""
    return lambda kind: "" if kind.vector.values is None else f"{name}.vector.values"

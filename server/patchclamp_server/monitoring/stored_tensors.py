"""These checks bound what a stored watch, and a stored reference of one, may hold. Refusals name the field "tensors".

The other modules of monitoring/ give the tensors their meaning. Here a stranger's file is kept from bringing names that
cannot be shown or sent, and more of anything than a server would ever watch.
"""

from collections.abc import Mapping

from patchclamp_server.artifacts.tensors import KINDS, KindChecks, Shapes, Tensors
from patchclamp_server.artifacts.types import ArtifactKind
from patchclamp_server.errors import InvalidArgument
from patchclamp_server.monitoring.reference import Reference
from patchclamp_server.monitoring.watch import Watch

# These are the numbers of dimensions by name.
WATCH_TENSORS = {
    "names": 1,
    "sites": 1,
    "kinds": 1,
    "layers": 1,
    "units": 1,
    "thresholds": 1,
    "vectors": 2,
    "bias": 1,
    "jump": 1,
    "quantiles": 1,
}
REFERENCE_TENSORS = {"edges": 2, "counts": 2, "mean": 1, "deviation": 1, "levels": 2, "inflation": 1, "norms": 1}
MAX_WATCH_ITEMS = 65_536
MAX_WATCH_BYTES = 1 << 30
# Every value that is watched is compared with every edge.
MAX_REFERENCE_EDGES = 64
# The first bounds a name in UTF-8, the second all names and sites of a watch as JSON.
MAX_ITEM_NAME_BYTES = 256
MAX_TEXT_BYTES = 8 * 1024 * 1024


def watch_layers(shapes: Shapes) -> tuple[int, ...]:
    """Returns no layers: which layers are watched stands in the tensors, not in their names."""
    _check_shapes("watch", WATCH_TENSORS, shapes)
    for name in ("names", "sites"):
        if shapes.get(name, (0,))[0] > MAX_TEXT_BYTES:
            raise InvalidArgument("tensors", f"{name} has more than {MAX_TEXT_BYTES} bytes")
    return ()


def reference_layers(shapes: Shapes) -> tuple[int, ...]:
    _check_shapes("watch_reference", REFERENCE_TENSORS, shapes)
    if shapes.get("edges", (0, 0))[1] > MAX_REFERENCE_EDGES:
        raise InvalidArgument("tensors", f"edges has more than {MAX_REFERENCE_EDGES} columns")
    return ()


def check_watch_tensors(tensors: Tensors) -> None:
    _check_bytes("watch", tensors)
    try:
        watch = Watch.from_tensors(tensors)
    except InvalidArgument as error:
        raise InvalidArgument("tensors", error.message) from error
    if len(watch) > MAX_WATCH_ITEMS:
        raise InvalidArgument("tensors", f"{len(watch)} items; a watch has at most {MAX_WATCH_ITEMS}")
    for name in watch.names:
        check_item_name(name, "tensors")


def check_reference_tensors(tensors: Tensors) -> None:
    _check_bytes("watch_reference", tensors)
    try:
        Reference.from_tensors(tensors)
    except InvalidArgument as error:
        raise InvalidArgument("tensors", error.message) from error


def check_item_name(name: str, path: str) -> None:
    """Checks that a name is printable text that a message can carry. Raises InvalidArgument."""
    # A lone surrogate is not printable.
    if not name or not name.isprintable() or len(name.encode()) > MAX_ITEM_NAME_BYTES:
        message = f"{name!r:.80} is not a name: 1 to {MAX_ITEM_NAME_BYTES} bytes of printable text"
        raise InvalidArgument(path, message)


def _check_shapes(kind: str, accepted: Mapping[str, int], shapes: Shapes) -> None:
    for name, shape in shapes.items():
        if name not in accepted:
            raise InvalidArgument("tensors", f"{name!r:.200} is not a tensor of a {kind}; it has {', '.join(accepted)}")
        if len(shape) != accepted[name]:
            message = f"{name} must have {accepted[name]} dimension(s), not the shape {list(shape)}"
            raise InvalidArgument("tensors", message)


def _check_bytes(kind: str, tensors: Tensors) -> None:
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    if size > MAX_WATCH_BYTES:
        raise InvalidArgument("tensors", f"{size} bytes; a {kind} has at most {MAX_WATCH_BYTES}")


KINDS[ArtifactKind.WATCH] = KindChecks(watch_layers, check_watch_tensors)
KINDS[ArtifactKind.WATCH_REFERENCE] = KindChecks(reference_layers, check_reference_tensors)

"""Subspaces and affine maps: linear maps of a residual width, by layer.

    subspace     layer.<l>.rotation [rank, width], orthonormal rows; of an intervention layer.<l>.weight [rank, width]
                 and layer.<l>.bias [rank] too; of a plane, which has rank 2, layer.<l>.centre [width]
    affine_map   layer.<l>.matrix [width, width], or layer.<l>.left and layer.<l>.right [width, rank];
                 optionally layer.<l>.bias [width]

All tensors are floats, and all layers have one width. Ranks may differ between layers.
"""

import re
from collections import defaultdict
from collections.abc import Mapping

import torch

from patchclamp_server.artifacts.tensor_checks import check_floats
from patchclamp_server.errors import InvalidArgument

# The largest |R Rᵀ - I| of rows that pass for orthonormal: rotations are often kept in 16 bits.
ORTHONORMAL_WITHIN = 0.01

SUBSPACE_DIMENSIONS = {"rotation": 2, "weight": 2, "bias": 1, "centre": 1}
MAP_DIMENSIONS = {"matrix": 2, "left": 2, "right": 2, "bias": 1}
_NAME = re.compile(r"layer\.(0|[1-9][0-9]{0,5})\.([a-z]+)")

Shapes = Mapping[str, tuple[int, ...]]
Tensors = Mapping[str, torch.Tensor]


def subspace_layers(shapes: Shapes) -> tuple[int, ...]:
    found = _by_layer("subspace", SUBSPACE_DIMENSIONS, shapes)
    width = subspace_width(shapes) if any("rotation" in layer for layer in found.values()) else 0
    for layer, names in found.items():
        if "rotation" not in names:
            raise _refused(f"layer.{layer}.{min(names)} stands without layer.{layer}.rotation")
        rank = names["rotation"][0]
        if rank > width:
            raise _refused(f"layer.{layer}.rotation has {rank} rows; a subspace of width {width} has at most {width}")
        if ("weight" in names) != ("bias" in names):
            given, missing = ("weight", "bias") if "weight" in names else ("bias", "weight")
            raise _refused(f"layer.{layer}.{given} stands without layer.{layer}.{missing}")
        if "centre" in names and rank != 2:
            raise _refused(f"layer.{layer}.centre is for a plane, of rank 2, not {rank}")
        expected = {"rotation": (rank, width), "weight": (rank, width), "bias": (rank,), "centre": (width,)}
        _check_shapes(layer, names, expected)
    return tuple(found)


def subspace_width(shapes: Shapes) -> int:
    return next(shape for name, shape in sorted(shapes.items()) if name.endswith(".rotation"))[1]


def check_subspace(tensors: Tensors) -> None:
    for name, tensor in tensors.items():
        check_floats(name, tensor)
        if name.endswith(".rotation"):
            rows = tensor.double()
            off = float((rows @ rows.T - torch.eye(len(rows), dtype=torch.float64)).abs().max())
            if off > ORTHONORMAL_WITHIN:
                raise _refused(f"the rows of {name} are not orthonormal: they are off by {off:.3g}")


def affine_map_layers(shapes: Shapes) -> tuple[int, ...]:
    found = _by_layer("affine_map", MAP_DIMENSIONS, shapes)
    for layer, names in found.items():
        if ("matrix" in names) == ("left" in names or "right" in names):
            raise _refused(f"layer.{layer} needs either matrix, or left and right")
        if ("left" in names) != ("right" in names):
            given, missing = ("left", "right") if "left" in names else ("right", "left")
            raise _refused(f"layer.{layer}.{given} stands without layer.{layer}.{missing}")
    width = affine_map_width(shapes)
    for layer, names in found.items():
        rank = names["left"][1] if "left" in names else 0
        expected = {"matrix": (width, width), "left": (width, rank), "right": (width, rank), "bias": (width,)}
        _check_shapes(layer, names, expected)
    return tuple(found)


def affine_map_width(shapes: Shapes) -> int:
    return next(shape for name, shape in sorted(shapes.items()) if name.endswith((".matrix", ".left")))[0]


def check_affine_map(tensors: Tensors) -> None:
    for name, tensor in tensors.items():
        check_floats(name, tensor)


def _by_layer(kind: str, dimensions: Mapping[str, int], shapes: Shapes) -> dict[int, dict[str, tuple[int, ...]]]:
    """Returns the shapes by layer, ascending, and name."""
    found: defaultdict[int, dict[str, tuple[int, ...]]] = defaultdict(dict)
    for name, shape in shapes.items():
        match = _NAME.fullmatch(name)
        if match is None or match[2] not in dimensions:
            accepted = ", ".join(f"layer.<l>.{each}" for each in dimensions)
            raise _refused(f"{name!r:.200} is not a tensor of the kind {kind}; accepted: {accepted}")
        if len(shape) != dimensions[match[2]] or 0 in shape:
            raise _refused(f"{name} must have {dimensions[match[2]]} dimension(s) of at least 1, not {list(shape)}")
        found[int(match[1])][match[2]] = shape
    if not found:
        raise _refused(f"the kind {kind} needs at least one layer")
    return dict(sorted(found.items()))


def _check_shapes(layer: int, names: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]) -> None:
    for name, shape in names.items():
        if shape != expected[name]:
            raise _refused(f"layer.{layer}.{name} has the shape {list(shape)}, not {list(expected[name])}")


def _refused(message: str) -> InvalidArgument:
    return InvalidArgument("tensors", message)

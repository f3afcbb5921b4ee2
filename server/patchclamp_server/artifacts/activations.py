"""Activations: rows of texts at sites and layers, as the edit `patch` takes them. Rows of one text stand together.

    text      int64 [rows]      of each row: its text, from 0, never falling
    position  int64 [rows]      the position of its token in that text, rising within the text
    token     int64 [rows]      the id of that token
    length    int64 [rows]      the tokens of that text, so that positions can be counted from its end
    label     int64 [rows]      optional: an index into the names of `provenance["labels"]`, or UNLABELLED
    <site>.<layer>  [rows, width]   float32, float16 or bfloat16; all places have the same rows

Files may be larger than memory: what is needed of one text is read by slices (activation_rows.py).
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from patchclamp_server.artifacts.corpora import UNLABELLED
from patchclamp_server.errors import InvalidArgument
from patchclamp_server.model.sites import PUBLIC_SITES, Site

INDICES = ("text", "position", "token", "length")
OPTIONAL_INDICES = ("label",)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_PLACE = re.compile(rf"({'|'.join(site.value for site in PUBLIC_SITES)})\.(0|[1-9][0-9]{{0,5}})")
# Values are looked at by parts, so that a mapped file is not copied into memory.
_PART_ROWS = 4096


def tensor_name(site: Site, layer: int) -> str:
    return f"{site.value}.{layer}"


def places_of(shapes: Mapping[str, tuple[int, ...]]) -> dict[tuple[Site, int], int]:
    """Returns the width of each site and layer, of shapes that `activation_layers` accepts."""
    found = {}
    for name, shape in shapes.items():
        if match := _PLACE.fullmatch(name):
            found[Site(match[1]), int(match[2])] = shape[1]
    return found


def activation_layers(shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
    """Returns the layers of all sites, ascending. InvalidArgument: names and shapes that activations do not have."""
    for name in INDICES:
        if name not in shapes:
            raise InvalidArgument("tensors", f"activations need {name}")
    rows = shapes["text"]
    if len(rows) != 1 or not rows[0]:
        raise InvalidArgument("tensors", f"text must be [rows] with at least one row, not {list(rows)}")
    layers = set()
    for name, shape in shapes.items():
        match = _PLACE.fullmatch(name)
        if match is None and name not in (*INDICES, *OPTIONAL_INDICES):
            accepted = ", ".join((*INDICES, *OPTIONAL_INDICES, "<site>.<layer>"))
            raise InvalidArgument("tensors", f"{name!r:.200} is not a tensor of activations; accepted: {accepted}")
        if match is None and shape != rows:
            raise InvalidArgument("tensors", f"{name} has the shape {list(shape)}, text has {list(rows)}")
        if match is not None:
            if len(shape) != 2 or shape[0] != rows[0] or not shape[1]:
                raise InvalidArgument("tensors", f"{name} must be [{rows[0]}, width], not {list(shape)}")
            layers.add(int(match[2]))
    if not layers:
        raise InvalidArgument("tensors", "activations need the rows of at least one site and layer: <site>.<layer>")
    return tuple(sorted(layers))


def check_activations(tensors: Mapping[str, Tensor]) -> None:
    """Types, order of the rows, and finite values. InvalidArgument names the tensor and the row, from 0."""
    widths: dict[str, int] = {}
    for name, tensor in tensors.items():
        match = _PLACE.fullmatch(name)
        if match is None:
            _check_index(name, tensor)
            continue
        if tensor.dtype not in DTYPES:
            found = str(tensor.dtype).removeprefix("torch.")
            raise InvalidArgument("tensors", f"{name} must be float32, float16 or bfloat16, not {found}")
        if widths.setdefault(match[1], tensor.shape[1]) != tensor.shape[1]:
            message = f"{name} has the width {tensor.shape[1]}, another layer of {match[1]} has {widths[match[1]]}"
            raise InvalidArgument("tensors", message)
        _check_finite(name, tensor)
    text, position, length = tensors["text"], tensors["position"], tensors["length"]
    steps, same = text[1:] - text[:-1], text[1:] == text[:-1]
    _refuse_first(steps < 0, "text falls at row {}: rows of a text stand together, in the order of the texts", 1)
    _refuse_first(same & (position[1:] <= position[:-1]), "position does not rise within its text at row {}", 1)
    _refuse_first(same & (length[1:] != length[:-1]), "length differs within a text at row {}", 1)
    _refuse_first(position >= length, "position is not below length at row {}")


def _check_index(name: str, tensor: Tensor) -> None:
    if tensor.dtype != torch.int64:
        raise InvalidArgument("tensors", f"{name} must be int64, not {str(tensor.dtype).removeprefix('torch.')}")
    least = UNLABELLED if name == "label" else 0
    _refuse_first(tensor < least, f"{name} is below {least} at row {{}}")


def _check_finite(name: str, tensor: Tensor) -> None:
    for first in range(0, len(tensor), _PART_ROWS):
        if not bool(torch.isfinite(tensor[first : first + _PART_ROWS]).all()):
            raise InvalidArgument("tensors", f"{name} holds NaN or Inf")


def _refuse_first(wrong: Tensor, message: str, offset: int = 0) -> None:
    if bool(wrong.any()):
        raise InvalidArgument("tensors", message.format(int(wrong.nonzero()[0]) + offset))

"""Tensors of a file under the names of a kind, where the file has others.

{"layer.3": "steering_vector", "layer.4": "directions[4]"}: the name of the kind, then that of the file; name[i] is row
i of a tensor, unless a tensor has this very name. The tensors that are named are taken and no others.
"""

import re
from collections.abc import Collection, Mapping

import torch

from patchclamp_server.artifacts.types import Metadata
from patchclamp_server.errors import InvalidArgument

ROW = re.compile(r"(.+)\[(0|[1-9][0-9]{0,8})\]", re.DOTALL)
# So many names are said of the tensors that a file has or that were left out.
SAID = 5


def named_tensors(tensors: Mapping[str, torch.Tensor], names: Mapping[str, str]) -> dict[str, torch.Tensor]:
    """Returns the tensors by the names of the kind. Raises InvalidArgument, which names the one that is not there."""
    return {name: _tensor(tensors, name, source) for name, source in names.items()}


def source_of(names: Collection[str], name: str, source: str) -> tuple[str, int | None]:
    """Returns the name of a tensor of the file, and the row of it that is meant, if one is."""
    if source in names:
        return source, None
    match = ROW.fullmatch(source)
    if match is None or match[1] not in names:
        raise refused(name, f"the file has no tensor {source!r:.120}; it has {listed(names)}")
    return match[1], int(match[2])


def refused(name: str, message: str) -> InvalidArgument:
    return InvalidArgument(f"tensor_names[{name!r:.80}]", message)


def left_out(names: Collection[str], sources: Collection[str]) -> tuple[str, ...]:
    """Returns the warning that says which tensors of a file were not taken, if some were not."""
    taken = {source for source in sources if source in names}
    taken |= {match[1] for source in sources if source not in names and (match := ROW.fullmatch(source))}
    rest = sorted(set(names) - taken)
    return (f"left out of the file: {listed(rest)}",) if rest else ()


def check_foreign(metadata: Metadata | None) -> None:
    """Refuses names for a file that Patchclamp wrote, whose metadata is about its tensors as they are."""
    if metadata is not None:
        raise InvalidArgument("tensor_names", "Patchclamp wrote the file, which has the names of its kind; give none")


def listed(names: Collection[str]) -> str:
    shown = ", ".join(f"{name!r:.80}" for name in sorted(names)[:SAID])
    return f"{shown} and {len(names) - SAID} more" if len(names) > SAID else shown or "none"


def _tensor(tensors: Mapping[str, torch.Tensor], name: str, source: str) -> torch.Tensor:
    found, row = source_of(tensors, name, source)
    tensor = tensors[found]
    if row is None:
        return tensor
    if not tensor.dim() or row >= len(tensor):
        raise refused(name, f"{found!r:.120} has the shape {list(tensor.shape)}, and no row {row}")
    return tensor[row]

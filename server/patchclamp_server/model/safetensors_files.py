"""The tensors of safetensors files, checked against the parameters of their model before any of them is read."""

import re
from collections.abc import Iterable
from math import prod
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from patchclamp_server.cpu.stored import Format
from patchclamp_server.model.architectures import FAMILIES, Family
from patchclamp_server.model.digests import read_header
from patchclamp_server.model.errors import ModelSourceError
from patchclamp_server.model.file_tensors import FileTensor, FileTensors
from patchclamp_server.model.loaded import refuse_unloaded
from patchclamp_server.model.mapping import mapped
from patchclamp_server.model.parameters import Parameters, Shape

_FORMATS = {"F32": Format.F32, "F16": Format.F16, "BF16": Format.BF16}
_ACCEPTED = ", ".join((*_FORMATS, "F64"))


def map_safetensors(source: Path, files: Iterable[Path], parameters: Parameters) -> FileTensors:
    """Returns the tensors of a model by the names of its parameters. Raises ModelSourceError for tensors that are
    missing, unknown, of another shape, or of no dtype of floats."""
    shapes, family = parameters.shapes, FAMILIES[parameters.architecture]
    tensors: dict[str, FileTensor] = {}
    unexpected, mismatched = [], []
    for path in files:
        memory = mapped(path)
        with path.open("rb") as file:
            header, start = read_header(path, file)
        for stored_name, entry in header.items():
            name = _parameter(stored_name, shapes, family)
            if name is None:
                if not any(re.search(pattern, stored_name) for pattern in family.old_buffers):
                    unexpected.append(stored_name)
                continue
            if name in tensors:
                raise ModelSourceError(f"{source} has the tensor {name} twice")
            begin, end = entry["data_offsets"]
            tensor = _stored(path, stored_name, entry, memory[start + begin : start + end])
            if tensor.shape != shapes[name]:
                mismatched.append((name, tensor.shape, shapes[name]))
            tensors[name] = tensor
    missing = parameters.lacking(set(tensors))
    refuse_unloaded(source, f"{parameters.architecture} model", missing, mismatched, unexpected)
    return FileTensors(str(source), tensors)


def _parameter(stored: str, shapes: dict[str, Shape], family: Family) -> str | None:
    """Returns the parameter that a checkpoint calls `stored`: old ones have other paths, and those of a model without
    its head lack the first part of the path."""
    for old, new in family.old_paths:
        if stored.startswith(f"{old}."):
            stored = f"{new}{stored.removeprefix(old)}"
    prefix = family.layers.partition(".")[0]
    return next((name for name in (stored, f"{prefix}.{stored}") if name in shapes), None)


def _stored(path: Path, name: str, entry: dict[str, list[int]], memory: NDArray[np.uint8]) -> FileTensor:
    dtype, shape = str(entry["dtype"]), entry["shape"]
    if not all(type(size) is int and size >= 0 for size in shape):
        raise ModelSourceError(f"{path}: {name} has shape {shape}")
    size = 8 if dtype == "F64" else _FORMATS[dtype].size if dtype in _FORMATS else 0
    if not size:
        raise ModelSourceError(f"{path}: {name} is stored as {dtype}, which is not supported: {_ACCEPTED}")
    if len(memory) != prod(shape) * size:
        raise ModelSourceError(f"{path}: {name} has {len(memory)} bytes for shape {shape} of {dtype}")
    if dtype == "F64":
        # No product reads these.
        return FileTensor(Format.F32, tuple(shape), memory, decode=_narrowed)
    return FileTensor(_FORMATS[dtype], tuple(shape), memory)


def _narrowed(memory: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Returns float64 as float32."""
    return torch.from_numpy(memory.copy().view(np.float64)).float().numpy().view(np.uint8)

"""The tensors of safetensors files, checked against the parameters of their model before any of them is read."""

import re
from collections.abc import Iterable
from math import prod
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key

from patchclamp_server.cpu.stored import Format
from patchclamp_server.model.digests import read_header
from patchclamp_server.model.errors import ModelSourceError
from patchclamp_server.model.file_tensors import FileTensor, FileTensors
from patchclamp_server.model.loaded import refuse_unloaded
from patchclamp_server.model.mapping import mapped
from patchclamp_server.model.skeleton import shapes_of, tied_names

_FORMATS = {"F32": Format.F32, "F16": Format.F16, "BF16": Format.BF16}
_ACCEPTED = ", ".join((*_FORMATS, "F64"))
# Buffers that parameters do not have today, in checkpoints of all families.
_OLD_BUFFERS = (r"rotary_emb\.inv_freq", r"(^|\.)position_ids$")


def map_safetensors(source: Path, files: Iterable[Path], skeleton: PreTrainedModel) -> FileTensors:
    """Returns the tensors of a model by the names of its parameters. Raises ModelSourceError for tensors that are
    missing, unknown, of another shape, or of no dtype of floats."""
    shapes, tied = shapes_of(skeleton), tied_names(skeleton)
    ignored = (*(skeleton._keys_to_ignore_on_load_unexpected or ()), *_OLD_BUFFERS)
    renamings = [one for one in get_model_conversion_mapping(skeleton) if isinstance(one, WeightRenaming)]
    tensors: dict[str, FileTensor] = {}
    unexpected, mismatched = [], []
    for path in files:
        memory = mapped(path)
        with path.open("rb") as file:
            header, start = read_header(path, file)
        for stored_name, entry in header.items():
            # Old checkpoints have other names, and those of a model without its head no prefix.
            name, _ = rename_source_key(stored_name, renamings, [], skeleton.base_model_prefix, shapes)
            if name not in shapes:
                if not any(re.search(pattern, stored_name) for pattern in ignored):
                    unexpected.append(stored_name)
                continue
            if name in tensors:
                raise ModelSourceError(f"{source} has the tensor {name} twice")
            begin, end = entry["data_offsets"]
            tensor = _stored(path, stored_name, entry, memory[start + begin : start + end])
            if tensor.shape != shapes[name]:
                mismatched.append((name, tensor.shape, shapes[name]))
            tensors[name] = tensor
    missing = [name for name in shapes if not any(other in tensors for other in tied.get(name, {name}))]
    refuse_unloaded(
        source,
        skeleton,
        {"missing_keys": missing, "mismatched_keys": mismatched, "unexpected_keys": unexpected},
    )
    return FileTensors(str(source), tensors)


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
        narrow = torch.from_numpy(memory.copy().view(np.float64)).float().numpy()
        return FileTensor(Format.F32, tuple(shape), narrow.view(np.uint8))
    return FileTensor(_FORMATS[dtype], tuple(shape), memory)

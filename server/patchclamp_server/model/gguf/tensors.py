"""The tensors of a GGUF file are matched with the parameters of its model: each needs the other, in one shape.

llama.cpp's converter changes some weights, which is undone here:

- llama: its rotation pairs channels 2i and 2i + 1 of a head, where ours pairs i and i + d/2, so that rows of queries
  and keys (and their biases) lie in another order;
- gemma: norms hold 1 + w;
- gpt2: matrices of products are [out, in].
"""

from itertools import pairwise
from math import prod

import numpy as np
from gguf import GGML_QUANT_SIZES, MODEL_ARCH_NAMES, GGMLQuantizationType, get_tensor_name_map
from numpy.typing import NDArray
from transformers import PreTrainedConfig

from patchclamp_server.cpu.stored import Format
from patchclamp_server.model.errors import ModelSourceError
from patchclamp_server.model.file_tensors import FileTensor, FileTensors
from patchclamp_server.model.gguf.header import Entry
from patchclamp_server.model.gguf.metadata import Metadata
from patchclamp_server.model.gguf.unread_formats import decoder, say_dequantised
from patchclamp_server.model.parameters import Parameters

SHOWN = 5
_OUTPUT = "output.weight"


def map_gguf(metadata: Metadata, config: PreTrainedConfig, parameters: Parameters) -> FileTensors:
    """Returns the tensors by the names of parameters. Raises ModelSourceError, before a weight is read, for a tensor
    that is missing, unknown, of another shape, or reaches out of its file."""
    names = _names(metadata.architecture, config.num_hidden_layers, parameters)
    entries, path = metadata.entries, metadata.path
    tied = {_OUTPUT} if parameters.tied else set()
    kind = f"{parameters.architecture} model"
    if missing := [name for name in names if name not in entries and name not in tied]:
        raise ModelSourceError(f"{path} lacks {_shown(missing, 'tensor')} of a {kind}")
    if unknown := [name for name in entries if name not in names]:
        raise ModelSourceError(f"{path} has {_shown(unknown, 'tensor')} that a {kind} does not use")
    tensors = {}
    unread: dict[str, list[int]] = {}
    for name, entry in entries.items():
        parameter = names[name]
        wanted = parameters.shapes[parameter]
        if metadata.architecture == "gpt2" and name.startswith("blk."):
            wanted = wanted[::-1]
        if entry.shape != wanted:
            raise ModelSourceError(f"{path}: tensor {name} has shape {list(entry.shape)}, expected {list(wanted)}")
        own = tensors[parameter] = _stored(metadata, name, entry, config)
        if own.decode is not None:
            unread.setdefault(GGMLQuantizationType(entry.format).name, []).append(own.nbytes)
    say_dequantised(path, unread)
    spans = sorted((str(e.file), e.offset, len(tensors[names[name]].memory), name) for name, e in entries.items())
    for (file, offset, size, name), (other, begin, _, next_name) in pairwise(spans):
        if file == other and begin < offset + size:
            raise ModelSourceError(f"{file} is damaged: tensor {next_name} begins within tensor {name}")
    return FileTensors(path, tensors, products_transposed=False)


def _names(architecture: str, n_layers: int, parameters: Parameters) -> dict[str, str]:
    """Returns the parameters by the names that the file must have for them."""
    arch = next(arch for arch, name in MODEL_ARCH_NAMES.items() if name == architecture)
    known = get_tensor_name_map(arch, n_layers)
    names = {}
    for parameter in parameters.shapes:
        name = known.get_name(parameter, (".weight", ".bias"))
        if name is not None:
            names[name] = parameter
        # Gemma 2 always ties its embeddings, and has one name for both.
        elif parameter not in parameters.tied:
            raise ModelSourceError(f"GGUF files have no name for {parameter} of a {parameters.architecture} model")
    return names


def _stored(metadata: Metadata, name: str, entry: Entry, config: PreTrainedConfig) -> FileTensor:
    path, memory, shape = metadata.path, entry.memory, entry.shape
    kind = GGMLQuantizationType(entry.format) if entry.format in set(GGMLQuantizationType) else None
    if kind is None:
        raise ModelSourceError(f"{path}: tensor {name} is of format {entry.format}, which is not supported")
    block, block_bytes = GGML_QUANT_SIZES[kind]
    if shape[-1] % block:
        raise ModelSourceError(
            f"{path}: tensor {name}: a row of {shape[-1]} weights is not made of blocks of {block}, as {kind.name} is"
        )
    size = prod(shape) // block * block_bytes
    if size > len(memory):
        raise ModelSourceError(f"{path} is not a whole GGUF file: tensor {name} has {len(memory)} of {size} bytes")
    format, decode = (
        (Format(kind), None) if entry.format in set(Format) else (Format.F32, decoder(path, name, kind, shape))
    )
    order = None
    if metadata.architecture == "llama" and (".attn_q." in name or ".attn_k." in name):
        heads = config.num_attention_heads if ".attn_q." in name else config.num_key_value_heads
        order = _rotary_order(shape[0], heads)
    shift = -1.0 if metadata.architecture.startswith("gemma") and name.endswith("norm.weight") else 0.0
    return FileTensor(format, shape, memory[:size], order, shift, decode)


def _rotary_order(rows: int, heads: int) -> NDArray[np.int64]:
    """Returns, for each row of ours, the row of the file: channels 0, 2, 4, ... of each head, then 1, 3, 5, ..."""
    return np.arange(rows, dtype=np.int64).reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)


def _shown(names: list[str], noun: str) -> str:
    more = " …" if len(names) > SHOWN else ""
    return f"{len(names)} {noun}{'' if len(names) == 1 else 's'} ({', '.join(names[:SHOWN])}{more})"

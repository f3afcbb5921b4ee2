"""A GGUF control vector, as llama.cpp reads and repeng and EasySteer write it, has tensors "direction.<l>" [width].

Mapping: direction.l ↔ layer l (0-based), site resid_post; with `layer_offset` k, direction.l → layer l + k.
- llama.cpp: `common_control_vector_load_one` writes direction.l to offset (l-1)·width, `llama_adapter_cvec::apply`
  fills tensors[il] from offset (il-1)·width, and `build_cvec(cur, il)` adds it to the output of block il (0-based). The
  two shifts cancel: direction.l is added after block l, and block 0 has none.
- repeng: `ControlVector.export_gguf` writes direction.{layer} for 0-based layers, found from hidden_states[layer + 1],
  which is the output of block `layer`. This is the same mapping. Its default layers leave out layer 0.
- EasySteer: `export_gguf` and the loader of its vLLM take direction.{layer} for 0-based layers too, 0 among them.
- llama.cpp's cvector-generator calls what it measured after block l - 1 direction.l, and llama.cpp adds that after
  block l. The default is where llama.cpp adds it; layer_offset -1 is where it was measured. That is also what files
  need that count hidden states as transformers does, 0 being the embedding, which has no layer here.

llama.cpp refuses a file with direction.0. So a vector with layer 0, or of another site, cannot be expressed, and encode
refuses it. llama.cpp reads float32 only.

Files are read here and not with gguf.GGUFReader: uploads are not trusted, and that reader goes on past the end of the
file for any array length that the file claims. The layout (GGUF specification, versions 2 and 3, little-endian) is:
magic, version u32, tensor count u64, key count u64, keys, tensor entries, padding to general.alignment, data.
"""

import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from patchclamp_server.artifacts.formats.base import ALONE, Beside, CannotExpress, Decoded, MalformedFile
from patchclamp_server.artifacts.types import Artifact, ArtifactKind
from patchclamp_server.errors import InvalidArgument
from patchclamp_server.files import Spool, spool_directory
from patchclamp_server.model.info import ModelInfo
from patchclamp_server.model.sites import Site

ARCHITECTURE = "controlvector"
DIRECTION = re.compile(r"direction\.(0|[1-9][0-9]{0,5})")
# No model has as many layers.
MAX_DIRECTIONS = 4096
MAX_HEADER_BYTES = 8 * 1024 * 1024
# SCALARS gives the struct code of each scalar GGUF value type; 8 is a string, 9 an array.
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
# These ggml tensor types hold plain floats.
FLOAT_TYPES = {0: "<f4", 1: "<f2", 28: "<f8"}


def decode(source: bytes | Path, beside: Beside = ALONE) -> Decoded:
    """Returns tensors "layer.<l>" from "direction.<l>", in the file's element type, and the provenance.

    Raises InvalidArgument where the layer_offset leaves no direction a layer of the model.
    """
    data = source if isinstance(source, bytes) else source.read_bytes()
    keys, entries, data_start = _read_header(data)
    if keys.get("general.architecture") != ARCHITECTURE:
        found = keys.get("general.architecture")
        raise MalformedFile(f"general.architecture is {found!r:.80}; a control vector has {ARCHITECTURE!r}")
    # Entries may overlap: without this bound a small file could claim its bytes any number of times.
    if data_start + sum(e.size for e in entries) > len(data):
        raise MalformedFile("the file ends before its tensors do")
    if len(entries) > MAX_DIRECTIONS:
        raise MalformedFile(f"{len(entries)} tensors; a control vector has at most {MAX_DIRECTIONS}")
    directions: dict[int, torch.Tensor] = {}
    for entry in entries:
        match = DIRECTION.fullmatch(entry.name)
        if match is None:
            raise MalformedFile(f"tensor {entry.name!r:.80}: a control vector has direction.<n>, n a whole number")
        number, start = int(match[1]), data_start + entry.offset
        if number in directions:
            raise MalformedFile(f"{entry.name} is there twice")
        if start + entry.size > len(data):
            raise MalformedFile(f"{entry.name} lies outside the file")
        values = np.frombuffer(data, entry.dtype, entry.size // entry.dtype.itemsize, start)
        directions[number] = torch.from_numpy(values.reshape(entry.shape).copy())
    if not directions:
        raise MalformedFile("the file has no direction.<n>")
    layers, warnings = _layers(sorted(directions), beside)
    tensors = {f"layer.{layer}": directions[number] for number, layer in layers.items()}
    provenance: dict[str, Any] = {"method": "imported", "format": "gguf_control_vector"}
    if isinstance(hint := keys.get(f"{ARCHITECTURE}.model_hint"), str):
        provenance["model_hint"] = hint
    if beside.layer_offset:
        provenance["layer_offset"] = beside.layer_offset
    imported_from = {f"layer.{layer}": f"direction.{number}" for number, layer in layers.items()}
    return Decoded(tensors, provenance=provenance, imported_from=imported_from, warnings=warnings)


def _layers(numbers: Sequence[int], beside: Beside) -> tuple[dict[int, int], tuple[str, ...]]:
    """Returns the layer of each direction that has one, and what to know of it."""
    offset, model, warnings = beside.layer_offset, beside.model, []
    layers = {number: number + offset for number in numbers if number + offset >= 0}
    if len(layers) < len(numbers):
        below = ", ".join(f"direction.{number}" for number in numbers if number not in layers)
        if not layers:
            raise InvalidArgument("layer_offset", f"{below} would lie before layer 0, and the file has no other")
        warnings.append(f"{below} left out: with layer_offset {offset} it lies before layer 0")
    if model is not None and layers.get(numbers[-1]) == model.n_layers:
        raise MalformedFile(
            f"direction.{numbers[-1]} would be layer {model.n_layers}, and {model.name} has layers 0 to "
            f"{model.n_layers - 1}; a file that counts hidden states, of which 0 is the embedding, needs layer_offset "
            f"{offset - 1}"
        )
    if 0 in layers and not offset:
        warnings.append(
            "direction.0 is layer 0: this file counts blocks from 0, and llama.cpp would refuse it; if its 0 is the "
            "embedding, give layer_offset -1"
        )
    return layers, tuple(warnings)


def encode(artifact: Artifact, model: ModelInfo | None = None) -> bytes:
    """Writes a GGUF file in float32. Its model_hint is the architecture, unless the vector came with its own."""
    info = artifact.info
    if info.kind is not ArtifactKind.VECTOR:
        raise CannotExpress(f"a GGUF control vector holds a vector, not a {info.kind.value}")
    if info.site is not Site.RESID_POST:
        site = info.site.value if info.site else "no site"
        raise CannotExpress(f"llama.cpp adds control vectors at resid_post; this vector is for {site}")
    if 0 in info.layers:
        raise CannotExpress(
            "llama.cpp control vectors start at layer 1 and this vector has layer 0: choose layers from 1 on (--layers)"
        )
    with spool_directory(Spool.GGUF) as directory:
        path = Path(directory) / "vector.gguf"
        writer = gguf.GGUFWriter(path, ARCHITECTURE)
        architecture = model.architecture if model is not None else ""
        writer.add_string(f"{ARCHITECTURE}.model_hint", str(info.provenance.get("model_hint", architecture)))
        writer.add_uint32(f"{ARCHITECTURE}.layer_count", len(info.layers))
        for layer in info.layers:
            writer.add_tensor(f"direction.{layer}", artifact.direction(layer).to(torch.float32).cpu().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path.read_bytes()


@dataclass(frozen=True)
class _Entry:
    """The place of a tensor: `offset` counts from the start of the data, `size` is in bytes."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    offset: int

    @property
    def size(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


class _Cursor:
    """Reads little-endian values in order and checks every read against the end."""

    def __init__(self, data: bytes) -> None:
        self.data = data[:MAX_HEADER_BYTES]
        self.position = 0

    def take(self, size: int) -> bytes:
        if size > len(self.data) - self.position:
            raise MalformedFile(f"the header ends early or is longer than {MAX_HEADER_BYTES} bytes")
        self.position += size
        return self.data[self.position - size : self.position]

    def scalar(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}")))[0]

    def text(self) -> str:
        try:
            return self.take(self.scalar("Q")).decode()
        except UnicodeDecodeError as error:
            raise MalformedFile("a name or text in the header is not UTF-8") from error

    def value(self) -> Any:
        """Reads a metadata value. It skips arrays, because a control vector needs none."""
        kind = self.scalar("I")
        if kind == STRING:
            return self.text()
        if kind in SCALARS:
            return self.scalar(SCALARS[kind])
        if kind != ARRAY:
            raise MalformedFile(f"unknown GGUF value type {kind}")
        item, count = self.scalar("I"), self.scalar("Q")
        if item in SCALARS:
            self.take(count * struct.calcsize(f"<{SCALARS[item]}"))
        elif item == STRING:
            # This ends at the end of the header at the latest, since every text takes at least 8 bytes.
            for _ in range(count):
                self.text()
        else:
            raise MalformedFile(f"an array of GGUF value type {item} has no place in a control vector")
        return None


def _read_header(data: bytes) -> tuple[dict[str, Any], list[_Entry], int]:
    """Returns the keys, the tensor entries and the offset at which the tensor data start."""
    cursor = _Cursor(data)
    if cursor.take(4) != b"GGUF":
        raise MalformedFile("not a GGUF file: it does not start with GGUF")
    version = cursor.scalar("I")
    if version not in (2, 3):
        raise MalformedFile(f"GGUF version {version}; versions 2 and 3, little-endian, are read")
    n_tensors, n_keys = cursor.scalar("Q"), cursor.scalar("Q")
    keys = {}
    for _ in range(n_keys):
        key = cursor.text()
        keys[key] = cursor.value()
    entries = [_read_entry(cursor) for _ in range(n_tensors)]
    alignment = keys.get("general.alignment", 32)
    if not isinstance(alignment, int) or not 0 < alignment <= 65536 or alignment & (alignment - 1):
        raise MalformedFile(f"general.alignment is {alignment!r:.40}; a power of two up to 65536 is accepted")
    return keys, entries, cursor.position + -cursor.position % alignment


def _read_entry(cursor: _Cursor) -> _Entry:
    name, n_dims = cursor.text(), cursor.scalar("I")
    if n_dims != 1:
        raise MalformedFile(f"tensor {name!r:.80} has {n_dims} dimensions; a direction has 1")
    shape, ggml_type = (cursor.scalar("Q"),), cursor.scalar("I")
    if ggml_type not in FLOAT_TYPES:
        raise MalformedFile(f"tensor {name!r:.80} has ggml type {ggml_type}; F32 (0), F16 (1) and F64 (28) are read")
    return _Entry(name, shape, np.dtype(FLOAT_TYPES[ggml_type]), cursor.scalar("Q"))

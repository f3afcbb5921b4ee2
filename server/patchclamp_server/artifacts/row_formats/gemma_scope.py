"""Autoencoders as Gemma Scope publishes them: params.npz, of JumpReLU, without a word of where they belong.

    W_enc [width, features]   b_enc [features]   W_dec [features, width]   b_dec [width]   threshold [features]

The names may begin with a small letter. Nothing is subtracted from the input. Arrays are read without pickle, one
piece at a time: they are unpacked beside the file, and read there by rows. Lieberum et al. 2024 (Gemma Scope).
"""

import shutil
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np
import torch

from patchclamp_server.artifacts.autoencoder_spec import MAX_FEATURES, MAX_WIDTH
from patchclamp_server.artifacts.formats.base import Beside, MalformedFile
from patchclamp_server.artifacts.formats.safetensors import layout
from patchclamp_server.artifacts.row_formats.base import Opened, RenamedRows, Source
from patchclamp_server.artifacts.row_formats.saelens import NAMES
from patchclamp_server.artifacts.tensor_file import open_tensor_file
from patchclamp_server.errors import InvalidArgument

_DTYPES = {"<f4": torch.float32, "<f2": torch.float16}
# A file of compressed arrays may be this many times as large when it is unpacked.
MAX_EXPANSION = 8
_PIECE = 1 << 20


@contextmanager
def open_gemma_scope(path: Path, beside: Beside) -> Iterator[Opened]:
    """Opens params.npz; its site and layer are those of `beside`."""
    if beside.site is None:
        raise InvalidArgument("site", "params.npz does not say which site it reads: give it, such as resid_post")
    if beside.layer is None:
        raise InvalidArgument("layer", "params.npz does not say which layer it reads: give it")
    unpacked = path.with_name(f"{path.name}.unpacked")
    try:
        transposed = _unpack(path, unpacked)
        with open_tensor_file(unpacked) as file:
            # In Fortran's order a matrix stands in the file as its transpose.
            sources = {
                name: Source(NAMES[name], transposed=(name == "encoder") is not (NAMES[name] in transposed))
                for name in NAMES
            }
            sources |= {name: Source(NAMES[name]) for name in ("encoder_bias", "decoder_bias", "threshold")}
            provenance = {
                "format": "gemma_scope_npz",
                "method": "imported",
                "layer": beside.layer,
                "function": "jumprelu",
                "subtracted": "nothing",
            }
            yield Opened(RenamedRows(file, sources), beside.site, provenance)
    finally:
        unpacked.unlink(missing_ok=True)


def _unpack(path: Path, target: Path) -> set[str]:
    """Writes the arrays as a safetensors file. Returns the names of the matrices that are in Fortran's order."""
    try:
        with zipfile.ZipFile(path) as archive:
            members: dict[str, zipfile.ZipInfo] = {}
            for member in archive.infolist():
                if (name := _name(member.filename)) in members:
                    raise MalformedFile(f"{name!r:.200} is there twice, with a small or a capital letter")
                members[name] = member
            if set(members) != set(NAMES.values()):
                raise MalformedFile(
                    f"params.npz of Gemma Scope holds {', '.join(NAMES.values())}, not {', '.join(members)[:200]}"
                )
            if sum(member.file_size for member in members.values()) > MAX_EXPANSION * path.stat().st_size + _PIECE:
                raise MalformedFile(f"it is more than {MAX_EXPANSION} times as large when it is unpacked")
            types, transposed = {}, set()
            for name, member in members.items():
                with archive.open(member) as array:
                    dtype, shape, fortran = _header(array, name)
                if fortran and len(shape) == 2:
                    transposed.add(name)
                    shape = shape[::-1]
                types[name] = dtype, shape
            start, order = layout({}, types)
            with target.open("wb") as out:
                out.write(start)
                for name in order:
                    with archive.open(members[name]) as array:
                        _header(array, name)
                        shutil.copyfileobj(array, out, _PIECE)
    except (zipfile.BadZipFile, zlib.error, ValueError, EOFError, NotImplementedError, RuntimeError) as error:
        raise MalformedFile(f"not a file of numpy arrays: {error}") from error
    return transposed


def _name(member: str) -> str:
    name = member.removesuffix(".npy")
    return f"W_{name[2:]}" if name.startswith("w_") else name


def _header(array: IO[bytes], name: str) -> tuple[torch.dtype, tuple[int, ...], bool]:
    version = np.lib.format.read_magic(array)
    if version not in ((1, 0), (2, 0)):
        raise MalformedFile(f"{name} is an array of version {version}")
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(array)
    if dtype.str not in _DTYPES:
        raise MalformedFile(f"{name} is {dtype}; accepted: float32, float16")
    if not 1 <= len(shape) <= 2 or not all(1 <= n <= max(MAX_FEATURES, MAX_WIDTH) for n in shape):
        raise MalformedFile(f"{name} has the shape {list(shape)}")
    if len(shape) != (2 if name.startswith("W_") else 1):
        raise MalformedFile(f"{name} has the shape {list(shape)}")
    return _DTYPES[dtype.str], shape, fortran

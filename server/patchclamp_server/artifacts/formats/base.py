"""Every file format of an artifact provides what is defined here."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from patchclamp_server.artifacts.types import Artifact, Metadata
from patchclamp_server.errors import InvalidArgument
from patchclamp_server.model.info import ModelInfo
from patchclamp_server.model.sites import PUBLIC_SITES, Site


class MalformedFile(Exception):
    """The bytes are not a file of this format, or hold what it cannot express. The message says what is wrong."""


class CannotExpress(Exception):
    """The artifact does not fit into the format asked for. The message says why."""


@dataclass(frozen=True)
class Beside:
    """What an upload says beside its file, by the names of UploadHeader, and what is known of the model that it is for.

    `sites` are those that the model has, and `model` is None where the server does not know it.
    """

    config: str = ""
    site: Site | None = None
    layer: int | None = None
    sites: Collection[Site] = PUBLIC_SITES
    model: ModelInfo | None = None
    layer_offset: int = 0
    tensor_names: Mapping[str, str] = field(default_factory=dict)


ALONE = Beside()


@dataclass(frozen=True, eq=False)
class Decoded:
    """Holds tensors under the names of the kind; the metadata if Patchclamp wrote the file, else its provenance and
    evidence.

    What the file does not hold stays missing: nothing is filled in. `imported_from` says what each tensor is called in
    the file, where it has other names than the kind, and `warnings` what was assumed or left out.
    """

    tensors: dict[str, torch.Tensor]
    metadata: Metadata | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)
    evidence: Mapping[str, Any] = field(default_factory=dict)
    imported_from: Mapping[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


class Decode(Protocol):
    def __call__(self, source: bytes | Path, beside: Beside = ALONE) -> Decoded: ...


@dataclass(frozen=True)
class Format:
    """`decode` raises MalformedFile, and InvalidArgument with a name of UploadHeader for what was given beside the
    file. `encode` takes the artifact's model, None for one that the server does not know, and raises CannotExpress.
    `takes` names the fields of Beside that it uses, but for the model.
    """

    name: str
    decode: Decode
    encode: Callable[[Artifact, ModelInfo | None], bytes]
    takes: frozenset[str] = frozenset()


def known_model(beside: Beside, what: str) -> ModelInfo:
    """Returns the model of a file. Raises InvalidArgument for one that the server does not know, but `what` needs."""
    if beside.model is None:
        raise InvalidArgument("model_fingerprint", f"{what} are known of the served model alone; leave it empty")
    return beside.model


def whole_file(source: bytes | Path, what: str, max_bytes: int) -> bytes:
    """Returns the content of a file. Raises MalformedFile for one above `max_bytes`, which is not read."""
    size = len(source) if isinstance(source, bytes) else source.stat().st_size
    if size > max_bytes:
        raise MalformedFile(f"{size} bytes; a file of {what} has at most {max_bytes}")
    return source if isinstance(source, bytes) else source.read_bytes()

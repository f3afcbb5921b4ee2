"""Every file format of an artifact provides what is defined here."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from patchclamp_server.artifacts.types import Artifact, Metadata


class MalformedFile(Exception):
    """The bytes are not a file of this format, or hold what it cannot express. The message says what is wrong."""


class CannotExpress(Exception):
    """The artifact does not fit into the format asked for. The message says why."""


@dataclass(frozen=True, eq=False)
class Decoded:
    """Holds tensors under the names of the kind; the metadata if Patchclamp wrote the file, else its provenance.

    What the file does not hold stays missing: nothing is filled in.
    """

    tensors: dict[str, torch.Tensor]
    metadata: Metadata | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Format:
    """`decode` raises MalformedFile. `encode` takes the architecture of the model and raises CannotExpress."""

    name: str
    decode: Callable[[bytes | Path], Decoded]
    encode: Callable[[Artifact, str], bytes]

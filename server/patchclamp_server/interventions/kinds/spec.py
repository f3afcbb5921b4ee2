"""A spec is what the server knows of a kind of edit or readout, from the message to the tables: one registry entry."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from patchclamp_server.errors import InvalidArgument
from patchclamp_server.interventions.bound import Joint
from patchclamp_server.interventions.encoders import WholeEncoder
from patchclamp_server.interventions.kinds.kind import EditTable, Payload, ReadoutTable
from patchclamp_server.interventions.program import EditKind, ReadoutKind
from patchclamp_server.interventions.request_warnings import RequestWarning
from patchclamp_server.interventions.resolver import Resolver
from patchclamp_server.interventions.safe_strengths import SafeRange
from patchclamp_server.model.sites import NEURON_SITES, Site


@dataclass(frozen=True, eq=False)
class Where:
    """Where an edit or readout is. `path` is that of its kind, `owner` that of the edit or readout itself.
    `prompt_length` is None where the program is for prompts of any length."""

    resolver: Resolver
    site: Site
    layers: tuple[int, ...]
    width: int
    owner: str
    path: str
    prompt_length: int | None = None


def check_neuron_site(where: Where, done: str) -> None:
    """Raises InvalidArgument where single neurons cannot be `done`: "edited" or "read"."""
    has = [site.value for site in NEURON_SITES if site in where.resolver.info.sites]
    if where.site.value not in has:
        raise InvalidArgument(f"{where.owner}.site", f"neurons are {done} at {', '.join(has)}, not {where.site.value}")


@dataclass(frozen=True, eq=False)
class EditNumbers:
    """Holds an edit as the tables take it: `payload` by layer is what `table` says, `bounds` are its LOW and HIGH."""

    table: EditTable
    payload: Mapping[int, Payload]
    bounds: tuple[float, float] = (-math.inf, math.inf)
    # The site at which the edit runs, if not at the one that it names.
    site: Site | None = None
    # Strengths that were found safe for its vector, by layer.
    safe: Mapping[int, SafeRange] = field(default_factory=dict)
    # The features of a transcoder, at the site and layer that it reads.
    input: "ReadoutNumbers | None" = None
    input_place: tuple[Site, int] | None = None
    # What the receipt says of it beside what is counted.
    warnings: tuple[RequestWarning, ...] = ()


@dataclass(frozen=True, eq=False)
class EditSpec:
    """`decode` turns the message into the dataclass and refuses what is wrong for every model; `bind` refuses what does
    not fit this one, and resolves artifacts. Both raise InvalidArgument with the field path."""

    # The name in the message Edit. Policies, metrics and the audit record call the kind by the same name.
    name: str
    kind: type[EditKind]
    decode: Callable[[Any, str], EditKind]
    bind: Callable[[Any, Where], EditNumbers]
    # The functions of patchclamp.programs that build it.
    builders: tuple[str, ...]
    # Returns the field in which a request brings its own vectors or matrices, "" where there is none.
    inline: Callable[[Any], str]
    # Returns the artifact that says at which layers the edit is, where the edit names none.
    layers_from: Callable[[Any], str | None] = lambda kind: None
    # Returns the layers that this artifact says, given the path of the kind.
    layers_of: Callable[[str, Resolver, str], tuple[int, ...]] = lambda ref, resolver, path: ()


@dataclass(frozen=True, eq=False)
class ReadoutNumbers:
    """The fields are as in BoundReadout."""

    vectors: dict[int, Tensor] = field(default_factory=dict)
    ids: tuple[int, ...] = ()
    k: int = 0
    heads: dict[int, tuple[int, ...]] = field(default_factory=dict)
    joint: Joint | None = None
    latents: Tensor | None = None
    encoder: WholeEncoder | None = None
    tokens: tuple[int, ...] = ()


@dataclass(frozen=True, eq=False)
class ReadoutSpec:
    """With `table` None attention answers the readout, and the tables know nothing of it."""

    # The name in the message Readout.
    name: str
    kind: type[ReadoutKind]
    decode: Callable[[Any, str], ReadoutKind]
    bind: Callable[[Any, Where], ReadoutNumbers]
    builders: tuple[str, ...]
    table: ReadoutTable | None
    ids_are_tokens: bool = False
    # Returns the site and layers of a kind that has its own, given the path of the kind: a message need not say them.
    place: Callable[[Any, Resolver, str], tuple[Site, tuple[int, ...]]] | None = None

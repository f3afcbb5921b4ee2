"""A bound program has passed every check: artifacts are resolved, numbers finite, sites and layers known."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

from torch import Tensor

from patchclamp_server.interventions.columns import EntryKind
from patchclamp_server.interventions.encoders import WholeEncoder
from patchclamp_server.interventions.program import HeadReadout, LatentReadout, Program, ReadoutKind, Scope
from patchclamp_server.interventions.request_warnings import RequestWarning
from patchclamp_server.interventions.safe_strengths import SafeRange
from patchclamp_server.model.sites import Site


@dataclass(frozen=True, eq=False)
class BoundCondition:
    site: Site
    layer: int
    # [width]: of length 1, or the encoder's row of a feature.
    unit: Tensor
    # The condition holds when sign * value > sign * threshold.
    sign: float
    threshold: float
    cosine: bool
    scope: Scope
    # The threshold as the request gave it, where that is on another scale: a probability.
    given: float | None = None

    # Of a feature, whose value is p = h · unit + bias where that is above its jump, else 0; `jump` is None without one.
    bias: float = 0.0
    jump: float | None = None

    @property
    def shown_threshold(self) -> float:
        return self.threshold if self.given is None else self.given


@dataclass(frozen=True, eq=False)
class BoundEdit:
    """An edit with its numbers: the table of its kind in kinds/ writes `payload[layer]`, and `bounds` are the columns
    LOW and HIGH of its entries."""

    name: str
    kind: EntryKind
    site: Site
    layers: tuple[int, ...]
    payload: Mapping[int, tuple[Tensor, ...]]
    strength: float
    scope: Scope
    gate: BoundCondition | None
    latched: bool
    preserve_norm: bool
    bounds: tuple[float, float]
    # The digest covers everything but name, strength and scope.
    fingerprint: bytes
    # By layer, for a vector that carries them. They change nothing of what is done.
    safe: Mapping[int, SafeRange] = field(default_factory=dict)
    # What the edit needs of an earlier site: the features of a transcoder, at the tokens in its own scope.
    input: "BoundReadout | None" = None


class Joint(Protocol):
    """Makes one value of the numbers that a readout has at a token at all of its layers, one layer after the other. It
    belongs to the last of them."""

    @property
    def fingerprint(self) -> bytes: ...

    def __call__(self, numbers: Sequence[float], /) -> tuple[float, ...]: ...


@dataclass(frozen=True, eq=False)
class BoundReadout:
    """A readout with its numbers. A projection has `vectors[layer]` [n, width], each of length 1; neurons have `ids`,
    heads have `heads[layer]`, and the top k kinds have `k`. A probe has vectors, and what it makes of them: `joint`.
    Chosen features have `vectors`, the encoder's rows, `ids` and `latents` [n, 2], bias and jump; the k largest
    features have `encoder`. A logit lens has `k` or `tokens`, and of neurons `ids`."""

    name: str
    kind: type[ReadoutKind]
    site: Site
    layers: tuple[int, ...]
    scope: Scope
    vectors: dict[int, Tensor]
    ids: tuple[int, ...]
    k: int
    heads: dict[int, tuple[int, ...]] = field(default_factory=dict)
    joint: Joint | None = None
    latents: Tensor | None = None
    encoder: WholeEncoder | None = None
    tokens: tuple[int, ...] = ()


@dataclass(frozen=True, eq=False)
class BoundAbort:
    name: str
    condition: BoundCondition


@dataclass(frozen=True, eq=False)
class BoundProgram:
    program: Program
    fingerprint: str
    edits: tuple[BoundEdit, ...]
    readouts: tuple[BoundReadout, ...]
    aborts: tuple[BoundAbort, ...]
    # What its receipt says beside what was counted.
    warnings: tuple[RequestWarning, ...] = ()

    @cached_property
    def latent_options(self) -> tuple[int, ...]:
        """Returns the tokens whose latent probabilities are asked for beside that of the token that comes."""
        return next((r.ids for r in self.readouts if r.kind is LatentReadout), ())

    @cached_property
    def head_readouts(self) -> tuple[BoundReadout, ...]:
        """Returns the readouts that attention itself answers."""
        return tuple(r for r in self.readouts if r.kind is HeadReadout)

    @cached_property
    def site_readouts(self) -> tuple[BoundReadout, ...]:
        """Returns the readouts that look at an activation."""
        return tuple(r for r in self.readouts if r.kind is not HeadReadout)

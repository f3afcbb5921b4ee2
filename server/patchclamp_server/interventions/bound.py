"""A program after every check: artifacts resolved, numbers finite, sites and layers known."""

from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property

from torch import Tensor

from patchclamp_server.interventions.program import HeadReadout, Program, Scope
from patchclamp_server.model.sites import Site


class Kind(Enum):
    """Kinds of edit that one group of operators applies."""

    ADD = "add"
    PROJECT = "project"
    REPLACE = "replace"
    ROTATE = "rotate"
    LOW_RANK = "low_rank"
    NEURONS = "neurons"
    HEADS = "heads"


@dataclass(frozen=True, eq=False)
class BoundCondition:
    site: Site
    layer: int
    unit: Tensor  # [width]
    # Holds when sign * value > sign * threshold.
    sign: float
    threshold: float
    cosine: bool
    scope: Scope


@dataclass(frozen=True, eq=False)
class BoundEdit:
    """An edit with its numbers. `payload[layer]` by kind:

    ADD, REPLACE (v [width],); PROJECT, ROTATE (unit v [width],); LOW_RANK (R, W [rank, width], b [rank]);
    NEURONS (index, factor, offset, low, high, each [n]): t(a) = clip(factor a + offset, low, high);
    HEADS (index, factor [n], offset [n, head_dim]): t(z) = factor z + offset, of the queries where `site` is ATTN_Q.
    `bounds` is (low, high) of a PROJECT, and (radians, 0) of a ROTATE.
    """

    name: str
    kind: Kind
    site: Site
    layers: tuple[int, ...]
    payload: dict[int, tuple[Tensor, ...]]
    strength: float
    scope: Scope
    gate: BoundCondition | None
    latched: bool
    preserve_norm: bool
    bounds: tuple[float, float]
    # Over everything but name, strength and scope.
    fingerprint: bytes


@dataclass(frozen=True, eq=False)
class BoundReadout:
    """`vectors[layer]` [n, width], each of length 1, of a projection; `ids` of neurons; `heads[layer]` of heads; `k` of
    others."""

    name: str
    kind: type
    site: Site
    layers: tuple[int, ...]
    scope: Scope
    vectors: dict[int, Tensor]
    ids: tuple[int, ...]
    k: int
    heads: dict[int, tuple[int, ...]] = field(default_factory=dict)


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

    @cached_property
    def head_readouts(self) -> tuple[BoundReadout, ...]:
        """Those that attention itself answers."""
        return tuple(r for r in self.readouts if r.kind is HeadReadout)

    @cached_property
    def site_readouts(self) -> tuple[BoundReadout, ...]:
        """Those that look at an activation."""
        return tuple(r for r in self.readouts if r.kind is not HeadReadout)

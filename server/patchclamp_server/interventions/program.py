"""The intervention language as frozen dataclasses: one for each message of proto/patchclamp/v1/program.proto.

Nothing here is checked against a model; see bind.py. Nothing here knows gRPC; see rpc/codecs/program.py.
"""

from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property
from typing import NamedTuple

import torch

from patchclamp_server.interventions.request_warnings import RequestWarning
from patchclamp_server.model.sites import Site


class Phase(Enum):
    PROMPT = "prompt"
    GENERATED = "generated"


class Comparison(Enum):
    ABOVE = "above"
    BELOW = "below"


class StoredThreshold(Enum):
    """A threshold that a vector artifact carries. The value is its name in the evidence of a layer."""

    MIDPOINT = "midpoint"


@dataclass(frozen=True)
class PositionRange:
    """Half-open; negative numbers count from the end of the prompt; `end` None has no end."""

    start: int = 0
    end: int | None = None


@dataclass(frozen=True)
class TokenSelector:
    """Matches a token when every field that is set matches."""

    phase: Phase | None = None
    positions: PositionRange | None = None
    last_k: int | None = None
    token_ids: tuple[int, ...] = ()
    role: str | None = None

    @cached_property
    def token_set(self) -> frozenset[int]:
        """Looked up in every step, of which a long list must not be a part."""
        return frozenset(self.token_ids)


@dataclass(frozen=True)
class Scope:
    """Tokens that match any `include` (none given: all) and no `exclude`."""

    include: tuple[TokenSelector, ...] = ()
    exclude: tuple[TokenSelector, ...] = ()


@dataclass(frozen=True, eq=False)
class Vector:
    """A direction: an artifact reference or values [width] or [n_layers_of_edit, width]."""

    artifact: str | None = None
    values: torch.Tensor | None = None
    artifact_layer: int | None = None
    unit: bool = False


@dataclass(frozen=True, eq=False)
class AddVector:
    vector: Vector


@dataclass(frozen=True, eq=False)
class ProjectOut:
    vector: Vector


@dataclass(frozen=True, eq=False)
class CapProjection:
    vector: Vector
    min: float | None = None
    max: float | None = None


@dataclass(frozen=True, eq=False)
class SetProjection:
    vector: Vector
    target: float


@dataclass(frozen=True, eq=False)
class ReplaceVector:
    vector: Vector


@dataclass(frozen=True, eq=False)
class RotateTowards:
    vector: Vector
    radians: float


@dataclass(frozen=True, eq=False)
class LowRank:
    """R and W [rank, width], b [rank]."""

    rotation: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor


class NeuronOp(Enum):
    SET = "set"
    SCALE = "scale"
    ADD = "add"
    CLAMP = "clamp"


@dataclass(frozen=True, eq=False)
class NeuronEdit:
    """`values`: one for all neurons, one each, or empty to use those of the neuron set (not for CLAMP)."""

    neurons: tuple[int, ...] = ()
    neuron_set: str | None = None
    op: NeuronOp = NeuronOp.SET
    values: tuple[float, ...] = ()
    min: float | None = None
    max: float | None = None


@dataclass(frozen=True, eq=False)
class HeadEdit:
    """Exactly one of `scale`, `mean` [n_heads_of_edit, head_dim] (or with a leading layer dimension) and `uniform`:
    attend to all visible tokens alike, which is what a query of 0 does."""

    heads: tuple[int, ...]
    scale: float | None = None
    mean: torch.Tensor | None = None
    uniform: bool = False


VectorKind = AddVector | ProjectOut | CapProjection | SetProjection | ReplaceVector | RotateTowards | LowRank
EditKind = VectorKind | NeuronEdit | HeadEdit


@dataclass(frozen=True, eq=False)
class Condition:
    """Projection h·v/|v| (or cosine) of an activation, compared with `threshold`, or with one that the artifact of
    the vector carries."""

    site: Site
    layer: int
    vector: Vector
    comparison: Comparison
    threshold: float = 0.0
    cosine: bool = False
    scope: Scope = field(default_factory=Scope)
    stored_threshold: StoredThreshold | None = None


@dataclass(frozen=True, eq=False)
class Gate:
    condition: Condition
    latched: bool = False


@dataclass(frozen=True, eq=False)
class Edit:
    """h ← h + strength · (t(h) - h) at the tokens in scope, for the target t of the kind."""

    kind: EditKind
    site: Site
    name: str = ""
    layers: tuple[int, ...] = ()
    all_layers: bool = False
    strength: float = 1.0
    scope: Scope = field(default_factory=Scope)
    gate: Gate | None = None
    preserve_norm: bool = False


@dataclass(frozen=True, eq=False)
class AbortCondition:
    name: str
    condition: Condition


@dataclass(frozen=True, eq=False)
class ProjectionReadout:
    """h·v/|v| for each vector, as conditions see it."""

    vectors: tuple[Vector, ...]


@dataclass(frozen=True, eq=False)
class NeuronReadout:
    neurons: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class TopNeuronsReadout:
    k: int


@dataclass(frozen=True, eq=False)
class LogitLensReadout:
    k: int


@dataclass(frozen=True, eq=False)
class HeadReadout:
    """Where heads look; no heads are all of them."""

    heads: tuple[int, ...] = ()


ReadoutKind = ProjectionReadout | NeuronReadout | TopNeuronsReadout | LogitLensReadout | HeadReadout


@dataclass(frozen=True, eq=False)
class Readout:
    kind: ReadoutKind
    site: Site
    name: str = ""
    layers: tuple[int, ...] = ()
    all_layers: bool = False
    scope: Scope = field(default_factory=Scope)


@dataclass(frozen=True, eq=False)
class Program:
    """Everything one request does to the model. Edits are applied in listed order."""

    edits: tuple[Edit, ...] = ()
    readouts: tuple[Readout, ...] = ()
    abort_when: tuple[AbortCondition, ...] = ()


@dataclass(frozen=True)
class EditReceipt:
    """What one edit did: see the message of the same name."""

    name: str
    rows: int
    mean_relative_change: float
    gate_firings: int
    rows_from_cache: int
    gate_threshold: float | None = None


@dataclass(frozen=True)
class Receipt:
    program_fingerprint: str
    edits: tuple[EditReceipt, ...]
    warnings: tuple[RequestWarning, ...] = ()

    @property
    def touched(self) -> bool:
        return any(e.rows + e.rows_from_cache > 0 for e in self.edits)


class ReadoutValue(NamedTuple):
    """What one readout saw at one token and layer. There may be hundreds in a step: a tuple is made fastest."""

    name: str
    layer: int
    position: int
    values: tuple[float, ...]
    ids: tuple[int, ...] = ()


# The rows that generate a token: the last one of the prompt, and those of generated tokens.
GENERATING = Scope((TokenSelector(last_k=1), TokenSelector(phase=Phase.GENERATED)))

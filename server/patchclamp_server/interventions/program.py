"""The intervention language as frozen dataclasses: one for each message of proto/patchclamp/v1/program.proto.

Nothing here is checked against a model; see bind.py. Nothing here knows gRPC; see rpc/codecs/program.py.
"""

from collections.abc import Sequence
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
    """A half-open range; negative numbers count from the end of the prompt, and an `end` of None sets no end."""

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
        """Is cached because every step looks it up, and a long list must not be searched there."""
        return frozenset(self.token_ids)


@dataclass(frozen=True)
class Scope:
    """Selects tokens that match any `include` (all tokens where there is none) and no `exclude`."""

    include: tuple[TokenSelector, ...] = ()
    exclude: tuple[TokenSelector, ...] = ()


@dataclass(frozen=True, eq=False)
class Vector:
    """A direction: an artifact reference or values [width] or [n_layers_of_edit, width]."""

    artifact: str | None = None
    values: torch.Tensor | None = None
    artifact_layer: int | None = None
    unit: bool = False


class EditKind:
    """What an edit does to an activation: the target t(h) and its numbers. Each kind has a module in kinds/."""


class ReadoutKind:
    """What a readout reads of an activation. Each kind has a module in kinds/."""


@dataclass(frozen=True, eq=False)
class AddVector(EditKind):
    vector: Vector


@dataclass(frozen=True, eq=False)
class ProjectOut(EditKind):
    vector: Vector


@dataclass(frozen=True, eq=False)
class CapProjection(EditKind):
    vector: Vector
    min: float | None = None
    max: float | None = None


@dataclass(frozen=True, eq=False)
class SetProjection(EditKind):
    vector: Vector
    target: float


@dataclass(frozen=True, eq=False)
class ReplaceVector(EditKind):
    vector: Vector


@dataclass(frozen=True, eq=False)
class RotateTowards(EditKind):
    vector: Vector
    radians: float


@dataclass(frozen=True, eq=False)
class LowRank(EditKind):
    """The map has R and W [rank, width], and b [rank]: all three, or the subspace artifact that has them by layer."""

    rotation: torch.Tensor | None = None
    weight: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    subspace: str = ""


class NeuronOp(Enum):
    SET = "set"
    SCALE = "scale"
    ADD = "add"
    CLAMP = "clamp"


@dataclass(frozen=True, eq=False)
class NeuronEdit(EditKind):
    """`values` has one for all neurons, one each, or none to use those of the neuron set (not for CLAMP)."""

    neurons: tuple[int, ...] = ()
    neuron_set: str | None = None
    op: NeuronOp = NeuronOp.SET
    values: tuple[float, ...] = ()
    min: float | None = None
    max: float | None = None


@dataclass(frozen=True, eq=False)
class HeadEdit(EditKind):
    """Exactly one of these is given: `scale`, `mean` [n_heads_of_edit, head_dim] (or with a leading layer dimension),
    or `uniform`, which attends to all visible tokens alike, as a query of 0 does."""

    heads: tuple[int, ...]
    scale: float | None = None
    mean: torch.Tensor | None = None
    uniform: bool = False


@dataclass(frozen=True, eq=False)
class FeatureReference:
    autoencoder: str
    feature: int


@dataclass(frozen=True, eq=False)
class Condition:
    """Compares the projection h·v/|v| (or cosine) of an activation with `threshold`, or with one that the artifact of
    the vector carries. With `probe`, the probability of that probe is compared, `vector` has nothing, and a `site` of
    None means those of the probe. With `feature`, the activation of that feature is compared, and `vector` has
    nothing."""

    site: Site | None
    layer: int
    vector: Vector
    comparison: Comparison
    threshold: float = 0.0
    cosine: bool = False
    scope: Scope = field(default_factory=Scope)
    stored_threshold: StoredThreshold | None = None
    probe: str = ""
    feature: FeatureReference | None = None


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
class ProjectionReadout(ReadoutKind):
    """Reads h·v/|v| for each vector, as conditions do."""

    vectors: tuple[Vector, ...]


@dataclass(frozen=True, eq=False)
class NeuronReadout(ReadoutKind):
    neurons: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class TopNeuronsReadout(ReadoutKind):
    k: int


@dataclass(frozen=True, eq=False)
class LogitLensReadout(ReadoutKind):
    """Reads the k largest, or those of `token_ids`; of single neurons where there are any."""

    k: int = 0
    token_ids: tuple[int, ...] = ()
    neurons: tuple[int, ...] = ()


@dataclass(frozen=True, eq=False)
class ActivationReadout(ReadoutKind):
    """Reads the activation itself; no units means all of them."""

    units: tuple[int, ...] = ()


@dataclass(frozen=True, eq=False)
class HeadReadout(ReadoutKind):
    """Reads where heads look; no heads means all of them."""

    heads: tuple[int, ...] = ()


@dataclass(frozen=True, eq=False)
class ProbeReadout(ReadoutKind):
    """Reads the probability of a probe's target, or of all its classes; of ridge its number."""

    probe: str
    all_classes: bool = False


@dataclass(frozen=True, eq=False)
class LatentReadout(ReadoutKind):
    """Reads the next token that layers would have chosen, for a report (engine/latents.py). No message asks for it."""


@dataclass(frozen=True, eq=False)
class Readout:
    """A `site` of None, and no layers, are those of the kind, where it has its own."""

    kind: ReadoutKind
    site: Site | None
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
    """Says what one edit did; see the message of the same name."""

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
    """The values of one readout at one token and layer. A step may make hundreds, and a tuple is made fastest."""

    name: str
    layer: int
    position: int
    values: Sequence[float]
    ids: tuple[int, ...] = ()


# This selects the rows that generate a token: the last one of the prompt, and those of generated tokens.
GENERATING = Scope((TokenSelector(last_k=1), TokenSelector(phase=Phase.GENERATED)))

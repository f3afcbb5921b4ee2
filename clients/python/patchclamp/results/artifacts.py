"""Stored artifacts, and the extraction that makes vectors."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from patchclamp.autoencoders import ExportedAutoencoder
from patchclamp.results.jobs import Progress
from patchclamp.results.record import Record
from patchclamp.v1 import artifact_pb2


@dataclass(frozen=True)
class Artifact(Record):
    """Describes a stored artifact. `created` is an RFC 3339 time; `evidence` says what was measured about it.

    replaced_tags: tags that the call which returned this took from other artifacts, and the ids of those.
    """

    id: str
    kind: str
    tags: tuple[str, ...]
    model_fingerprint: str
    site: str
    layers: tuple[int, ...]
    width: int
    size_bytes: int
    created: str
    description: str
    provenance: dict[str, Any]
    evidence: dict[str, Any]
    replaced_tags: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class DeletedArtifact(Record):
    """Says what was deleted: an artifact, and all tags that named it."""

    id: str
    tags: tuple[str, ...]


@dataclass(frozen=True)
class TokenProjections(Record):
    """Describes h·v/|v| over all tokens but the first of the held-out examples of one side.

    p05 to p95 are quantiles.
    """

    tokens: int
    mean: float
    p05: float
    p25: float
    p50: float
    p75: float
    p95: float


@dataclass(frozen=True)
class TrainingEvidence(Record):
    """Holds what was measured of a trained direction on held-out examples, beside the difference of means and random
    directions.

    AUROC and accuracy are of the largest projection of the tokens of an example; losses are -log p per token of the
    positives, with each vector added at strength 1, and with none. `steps`: until training ended.
    """

    steps: int
    auroc: float
    random_auroc: float
    difference_auroc: float
    difference_accuracy: float
    unedited_loss: float
    loss: float
    random_loss: float
    difference_loss: float


@dataclass(frozen=True)
class LayerEvidence(Record):
    """Holds what was measured on held-out examples, beside a random direction of equal norm.

    The message of the same name describes the fields that are not here.

    midpoint: half-way between the mean projections h·v/|v| of both sides of the training pairs, which
    when(..., above="midpoint") compares with; it is of pooled states, as margin is. positive_tokens, negative_tokens:
    what single tokens, which a gate sees, project on the vector; None from a server that does not say. training: of
    reft_r1 alone.
    """

    layer: int
    heldout_accuracy: float
    random_accuracy: float
    norm: float
    activation_norm: float
    explained_variance: float
    midpoint: float = 0.0
    margin: float = 0.0
    positive_tokens: TokenProjections | None = None
    negative_tokens: TokenProjections | None = None
    pooled_tokens: int = 0
    tokens_left_out: int = 0
    participation_ratio: float = 0.0
    training: TrainingEvidence | None = None


@dataclass(frozen=True)
class ExtractionResult(Record):
    """Holds the stored vector and its evidence at each layer.

    `best_layer` has the best held-out accuracy, and `warnings` say what to know before the vector is used. `measure`
    says what held-out accuracy is the share of and what is beside it, `baselines` what the same measure is otherwise.
    """

    artifact: Artifact
    layers: tuple[LayerEvidence, ...]
    best_layer: int
    warnings: tuple[str, ...] = ()
    measure: str = ""
    baselines: Mapping[str, float] = field(default_factory=dict)


ExtractionProgress = Progress
ExtractionEvent = Progress | ExtractionResult


@dataclass
class ExportCollector:
    """Joins the chunks of an autoencoder in the layout of SAELens."""

    chunks: list[bytes] = field(default_factory=list)
    config: str = ""

    def add(self, message: artifact_pb2.DownloadResponse) -> bytes:
        self.chunks.append(message.chunk)
        self.config = self.config or message.config
        return message.chunk

    def result(self) -> ExportedAutoencoder | None:
        """Returns both files; None while nothing has arrived."""
        return ExportedAutoencoder(b"".join(self.chunks), self.config) if self.chunks else None


@dataclass
class DownloadCollector:
    """Joins the chunks of a download."""

    chunks: list[bytes] = field(default_factory=list)

    def add(self, message: artifact_pb2.DownloadResponse) -> bytes:
        self.chunks.append(message.chunk)
        return message.chunk

    def result(self) -> bytes | None:
        """Returns the whole; None while nothing has arrived."""
        return b"".join(self.chunks) or None

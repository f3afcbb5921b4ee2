"""An artifact as Python types: one frozen dataclass for each message of proto/patchclamp/v1/artifact.proto."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any

import torch

from patchclamp_server.errors import FailedPrecondition, NotFound
from patchclamp_server.model.sites import Site


class ArtifactKind(Enum):
    """The value is the name used in stored metadata, messages and docs."""

    VECTOR = "vector"
    NEURON_SET = "neuron_set"
    SPARSITY_PROFILE = "sparsity_profile"
    HEAD_SET = "head_set"
    WATCH = "watch"
    WATCH_REFERENCE = "watch_reference"
    CORPUS = "corpus"
    ACTIVATIONS = "activations"
    PROBE = "probe"
    SUBSPACE = "subspace"
    AFFINE_MAP = "affine_map"
    AUTOENCODER = "autoencoder"
    FEATURE_LABELS = "feature_labels"


# These kinds are of one site, and their layers are of its width.
SITED = (ArtifactKind.VECTOR, ArtifactKind.SUBSPACE, ArtifactKind.AFFINE_MAP)
# The layers of these kinds stand for themselves, so that some can be taken without the others.
LAYERED = (*SITED, ArtifactKind.NEURON_SET)
# Kinds that have the site that they are of, or read.
WITH_SITE = (*SITED, ArtifactKind.AUTOENCODER)
# Kinds that are stored and read by rows, and are never whole in memory; and all that are read so.
OF_ROWS = (ArtifactKind.AUTOENCODER,)
BY_ROWS = (*OF_ROWS, ArtifactKind.ACTIVATIONS)
# Kinds that are of no model, and fit every one: their fingerprint is empty.
OF_NO_MODEL = (ArtifactKind.CORPUS,)


@dataclass(frozen=True)
class Metadata:
    """Metadata is stored beside the tensors and takes part in the id; only tags and the time of creation do not.

    `site` is that of a vector, subspace or affine map, or the one that an autoencoder reads; it is None for the other
    kinds (neuron sets always sit at mlp_post).
    """

    kind: ArtifactKind
    model_fingerprint: str
    site: Site | None = None
    description: str = ""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    evidence: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Tags:
    """Names to store an artifact under. With `replace`, names that belong to another artifact are taken from it."""

    names: tuple[str, ...] = ()
    replace: bool = False


NO_TAGS = Tags()


@dataclass(frozen=True)
class ArtifactInfo:
    """An artifact without its tensors. `created` is in seconds since the epoch.

    `replaced` holds the tags that this very call took from other artifacts, and the ids of those; of an upload,
    `imported_from` says what the tensors were called in its file, and `import_warnings` what was assumed. `width` is
    that of a vector, subspace or affine map, or of what an autoencoder reads, the heads per layer of a head set, and 0
    for others. `layers` is empty for a sparsity profile, a watch, a watch reference and a corpus, `model_fingerprint`
    for a corpus, which fits every model.
    """

    id: str
    kind: ArtifactKind
    tags: tuple[str, ...]
    model_fingerprint: str
    site: Site | None
    layers: tuple[int, ...]
    width: int
    size_bytes: int
    created: float
    description: str
    provenance: dict[str, Any]
    evidence: dict[str, Any]
    replaced: Mapping[str, str] = field(default_factory=dict)
    imported_from: Mapping[str, str] = field(default_factory=dict)
    import_warnings: tuple[str, ...] = ()

    @property
    def metadata(self) -> Metadata:
        return Metadata(self.kind, self.model_fingerprint, self.site, self.description, self.provenance, self.evidence)


@dataclass(frozen=True, eq=False)
class Subspace:
    """A subspace at one layer has orthonormal rows R [rank, width]. One of an intervention has W [rank, width] and
    b [rank] as well, and a plane may have the centre [width] about which it is turned."""

    rotation: torch.Tensor
    weight: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    centre: torch.Tensor | None = None


@dataclass(frozen=True, eq=False)
class AffineMap:
    """A h + b at one layer: A [width, width] is `matrix`, or `left` `right`ᵀ of [width, rank] each."""

    matrix: torch.Tensor | None = None
    left: torch.Tensor | None = None
    right: torch.Tensor | None = None
    bias: torch.Tensor | None = None


@dataclass(frozen=True, eq=False)
class Artifact:
    """A loaded artifact. The tensors are shared with a cache: never write to them in place."""

    info: ArtifactInfo
    tensors: dict[str, torch.Tensor]

    def direction(self, layer: int) -> torch.Tensor:
        """Returns the vector [width] of a layer. NotFound: no such layer; FailedPrecondition: not a vector."""
        self._expect(ArtifactKind.VECTOR, layer)
        return self.tensors[f"layer.{layer}"]

    def neurons(self, layer: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Returns the neuron indices int64 [n] of a layer, and their values [n] where the set has values."""
        self._expect(ArtifactKind.NEURON_SET, layer)
        return self.tensors[f"layer.{layer}.neurons"], self.tensors.get(f"layer.{layer}.values")

    def neuron_scores(self, layer: int) -> torch.Tensor | None:
        """Returns the scores [n] of the neurons of a layer, in the order of `neurons`, where the set has scores."""
        self._expect(ArtifactKind.NEURON_SET, layer)
        return self.tensors.get(f"layer.{layer}.scores")

    def head_scores(self) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Returns scores float32 [n_layers, n_heads], and where the set has them, low and high ends of intervals."""
        self._expect(ArtifactKind.HEAD_SET)
        return self.tensors["scores"], self.tensors.get("low"), self.tensors.get("high")

    def subspace(self, layer: int) -> Subspace:
        self._expect(ArtifactKind.SUBSPACE, layer)
        return Subspace(**self._of_layer(layer))

    def affine_map(self, layer: int) -> AffineMap:
        self._expect(ArtifactKind.AFFINE_MAP, layer)
        return AffineMap(**self._of_layer(layer))

    def profile_tensors(self) -> dict[str, torch.Tensor]:
        """Returns a sparse policy's calibration under the policy's names; `info.provenance["policy"]` names it."""
        self._expect(ArtifactKind.SPARSITY_PROFILE)
        return self.tensors

    def only(self, layers: Sequence[int]) -> "Artifact":
        """Returns the artifact with these layers alone. Raises NotFound for an unknown layer, FailedPrecondition for a
        kind whose layers do not stand for themselves."""
        if self.info.kind not in LAYERED:
            raise FailedPrecondition("layers", f"a {self.info.kind.value} is exported whole; leave the layers empty")
        for layer in layers:
            self._expect(self.info.kind, layer)
        kept = {name: t for name, t in self.tensors.items() if int(name.split(".")[1]) in layers}
        return Artifact(replace(self.info, layers=tuple(sorted(layers))), kept)

    def _of_layer(self, layer: int) -> dict[str, torch.Tensor]:
        """Returns the tensors "layer.<l>.<name>" of a layer, by name."""
        prefix = f"layer.{layer}."
        return {name.removeprefix(prefix): t for name, t in self.tensors.items() if name.startswith(prefix)}

    def _expect(self, kind: ArtifactKind, layer: int | None = None) -> None:
        if self.info.kind is not kind:
            raise FailedPrecondition("", f"{self.info.id} is a {self.info.kind.value}, not a {kind.value}")
        if layer is not None and layer not in self.info.layers:
            raise NotFound("", f"{self.info.id} has no layer {layer}; it has {list(self.info.layers)}")

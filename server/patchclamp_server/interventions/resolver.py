"""Checks numbers of a program against the model: vectors and layers, from the request or the artifact store."""

import math
from typing import Protocol

import torch
from torch import Tensor

from patchclamp_server.artifacts.activation_rows import StoredActivations
from patchclamp_server.artifacts.autoencoders import Autoencoder, open_autoencoder
from patchclamp_server.artifacts.probes import Probe, stored_probe
from patchclamp_server.artifacts.tensor_file import TensorFile
from patchclamp_server.artifacts.types import Artifact, ArtifactInfo, ArtifactKind
from patchclamp_server.errors import FailedPrecondition, InvalidArgument, about
from patchclamp_server.interventions.program import StoredThreshold, Vector
from patchclamp_server.model.info import ModelInfo
from patchclamp_server.model.sites import Site

MAX_TOP_K = 128


class ArtifactLookup(Protocol):
    """Resolves artifact references; raises NotFound for an unknown one."""

    def get(self, ref: str) -> Artifact: ...

    def open(self, ref: str) -> tuple[ArtifactInfo, TensorFile]:
        """As `get`, with the tensors still in the store, to be read by rows."""
        ...


class Resolver:
    """Resolves and checks; `path` is always the field path of what is being resolved.

    A reference means one artifact for all that this resolver is asked, also where its tag moves meanwhile: a stored
    threshold belongs to the vector that the condition compares with it.
    """

    def __init__(self, info: ModelInfo, artifacts: ArtifactLookup | None) -> None:
        self.info = info
        self.artifacts = artifacts
        self._found: dict[str, Artifact] = {}
        self._activations: dict[str, StoredActivations] = {}
        self._opened: dict[str, tuple[str, Autoencoder]] = {}

    def width(self, site: Site, path: str) -> int:
        width = self.info.sites.get(site)
        if width is None:
            has = ", ".join(s.value for s in self.info.sites)
            raise InvalidArgument(f"{path}.site", f"{self.info.architecture} has no site {site.value}; it has {has}")
        return width

    def layers(self, layers: tuple[int, ...], all_layers: bool, path: str, field: str = "layers") -> tuple[int, ...]:
        if layers and all_layers:
            raise InvalidArgument(f"{path}.all_layers", "give layers or all_layers, not both")
        if all_layers:
            return tuple(range(self.info.n_layers))
        if not layers:
            raise InvalidArgument(f"{path}.{field}", "at least one layer is needed")
        for i, layer in enumerate(layers):
            if not 0 <= layer < self.info.n_layers:
                where = f"{path}.{field}[{i}]" if field == "layers" else f"{path}.{field}"
                raise InvalidArgument(where, f"unknown layer {layer}: the model has {self.info.n_layers}")
        if len(set(layers)) != len(layers):
            raise InvalidArgument(f"{path}.{field}", "a layer is named twice")
        return layers

    def artifact(self, ref: str, kind: ArtifactKind, path: str) -> Artifact:
        if self.artifacts is None:
            raise FailedPrecondition(path, "this server keeps no artifacts")
        with about(path):
            artifact = self._found.get(ref) or self._found.setdefault(ref, self.artifacts.get(ref))
        self._check(artifact.info, ref, kind, path)
        return artifact

    def activations(self, ref: str, path: str) -> StoredActivations:
        """Returns an activations artifact, whose rows are read when they are asked for."""
        if self.artifacts is None:
            raise FailedPrecondition(path, "this server keeps no artifacts")
        if ref not in self._activations:
            with about(path):
                info, file = self.artifacts.open(ref)
            self._check(info, ref, ArtifactKind.ACTIVATIONS, path)
            self._activations[ref] = StoredActivations(info, file)
        return self._activations[ref]

    def _check(self, info: ArtifactInfo, ref: str, kind: ArtifactKind, path: str) -> None:
        if info.kind is not kind:
            raise InvalidArgument(path, f"{ref} is a {info.kind.value}, not a {kind.value}")
        if info.model_fingerprint != self.info.fingerprint:
            raise FailedPrecondition(
                path, f"{ref} was made for model {info.model_fingerprint}, served is {self.info.fingerprint}"
            )

    def artifact_at(self, ref: str, kind: ArtifactKind, layers: tuple[int, ...], width: int, path: str) -> Artifact:
        """Returns an artifact of a kind with a width, which has all of these layers."""
        artifact = self.artifact(ref, kind, path)
        for layer in layers:
            if layer not in artifact.info.layers:
                has = ", ".join(map(str, artifact.info.layers))
                raise InvalidArgument(path, f"{ref} has no layer {layer}; it has {has}")
        if artifact.info.width != width:
            raise InvalidArgument(path, f"{ref} has width {artifact.info.width}, the edited site has {width}")
        return artifact

    def autoencoder(self, ref: str, path: str) -> Autoencoder:
        """Returns an autoencoder of the served model, whose rows are read when they are asked for."""
        return self._open_autoencoder(ref, path)[1]

    def autoencoder_id(self, ref: str, path: str) -> str:
        return self._open_autoencoder(ref, path)[0]

    def _open_autoencoder(self, ref: str, path: str) -> tuple[str, Autoencoder]:
        if self.artifacts is None:
            raise FailedPrecondition(path, "this server keeps no artifacts")
        if ref not in self._opened:
            info, autoencoder = open_autoencoder(ref, self.artifacts, self.info, path)
            spec = autoencoder.spec
            self._check_place(ref, spec.site, spec.layer, autoencoder.width, path)
            self._check_place(ref, spec.output_site, spec.output_layer, autoencoder.output_width, path)
            self._opened[ref] = (info.id, autoencoder)
        return self._opened[ref]

    def _check_place(self, ref: str, site: Site, layer: int, width: int, path: str) -> None:
        if self.info.sites.get(site) != width or layer >= self.info.n_layers:
            has = ", ".join(f"{each.value} {size}" for each, size in self.info.sites.items())
            own = f"{site.value} {width} of layer {layer}"
            message = f"{ref} is of {own}; the model has {self.info.n_layers} layers and {has}"
            raise FailedPrecondition(path, message)

    def vectors(
        self, vector: Vector, site: Site, layers: tuple[int, ...], width: int, path: str, *, unit: bool
    ) -> dict[int, tuple[Tensor, ...]]:
        """Returns the direction at each layer, divided by its norm if `unit`."""
        if vector.artifact is not None:
            artifact = self.artifact(vector.artifact, ArtifactKind.VECTOR, f"{path}.artifact")
            rows = {}
            for layer in layers:
                source = layer if vector.artifact_layer is None else vector.artifact_layer
                if source not in artifact.info.layers:
                    field = "artifact" if vector.artifact_layer is None else "artifact_layer"
                    raise InvalidArgument(f"{path}.{field}", f"{vector.artifact} has no vector for layer {source}")
                rows[layer] = artifact.direction(source).float()
        elif vector.values is not None:
            values = vector.values.float()
            if values.dim() not in (1, 2) or (values.dim() == 2 and values.shape[0] != len(layers)):
                raise InvalidArgument(
                    f"{path}.values",
                    f"shape {list(values.shape)} is neither [{width}] nor [{len(layers)}, {width}] (one row a layer)",
                )
            rows = {layer: values if values.dim() == 1 else values[i] for i, layer in enumerate(layers)}
        else:
            raise InvalidArgument(path, "an artifact or values are needed")
        bound: dict[int, tuple[Tensor, ...]] = {}
        for layer, row in rows.items():
            where = f"{path}.values" if vector.artifact is None else f"{path}.artifact"
            if row.shape[-1] != width:
                raise InvalidArgument(where, f"width {row.shape[-1]} does not fit {site.value}, which has {width}")
            if not bool(torch.isfinite(row).all()):
                raise InvalidArgument(where, "holds NaN or infinite numbers")
            if unit:
                norm = float(row.double().norm())
                if norm == 0.0:
                    raise InvalidArgument(where, "a zero vector has no direction")
                row = (row.double() / norm).float()
            bound[layer] = (row.contiguous(),)
        return bound

    def probe(self, ref: str, path: str) -> Probe:
        """Returns a probe of this model, by id or tag."""
        artifact = self.artifact(ref, ArtifactKind.PROBE, path)
        with about(path):
            probe = stored_probe(artifact)
        width = probe.weights[probe.layers[0]].shape[1]
        if self.info.sites.get(probe.site) != width or probe.layers[-1] >= self.info.n_layers:
            where = f"width {width} at {probe.site.value} of layer {probe.layers[-1]}"
            raise FailedPrecondition(path, f"{ref} is of {where}, which {self.info.name} has not")
        return probe

    def stored_threshold(self, wanted: StoredThreshold, vector: Vector, site: Site, layer: int, path: str) -> float:
        """Returns the threshold that a vector artifact carries for a condition at this site and layer.

        Raises InvalidArgument for a vector that is no artifact, FailedPrecondition for one that carries none.
        """
        where, name = f"{path}.stored_threshold", wanted.value
        if vector.artifact is None:
            raise InvalidArgument(where, f"expected a vector that is an artifact: numbers carry no {name}")
        info = self.artifact(vector.artifact, ArtifactKind.VECTOR, f"{path}.vector.artifact").info
        row = layer if vector.artifact_layer is None else vector.artifact_layer
        if info.site is not site or row != layer:
            stored_at = f"{info.site.value if info.site else 'no site'} of layer {row}"
            message = f"the {name} of {vector.artifact} is one of {stored_at}, not of {site.value} of layer {layer}"
            raise FailedPrecondition(where, message)
        # The evidence of an uploaded artifact is whatever its file says.
        cards = info.evidence.get("layers")
        for card in cards if isinstance(cards, list) else ():
            if isinstance(card, dict) and card.get("layer") == layer:
                value = card.get(name)
                if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
                    return float(value)
        raise FailedPrecondition(
            where, f"{vector.artifact} carries no {name} for layer {layer}; extract it again, or give a threshold"
        )


def check_finite(value: float, path: str) -> None:
    if not math.isfinite(value):
        raise InvalidArgument(path, f"must be finite, got {value}")


def checked_bounds(low: float | None, high: float | None, path: str) -> tuple[float, float]:
    if low is None and high is None:
        raise InvalidArgument(path, "min or max is needed")
    for name, value in (("min", low), ("max", high)):
        if value is not None:
            check_finite(value, f"{path}.{name}")
    bounds = (-math.inf if low is None else low, math.inf if high is None else high)
    if bounds[0] > bounds[1]:
        raise InvalidArgument(f"{path}.min", f"{bounds[0]} is above max {bounds[1]}")
    return bounds


def check_indices(ids: tuple[int, ...], n: int, path: str, what: str) -> None:
    for i, index in enumerate(ids):
        if not 0 <= index < n:
            raise InvalidArgument(f"{path}[{i}]", f"unknown {what} {index}: there are {n}")
    if len(set(ids)) != len(ids):
        raise InvalidArgument(path, f"a {what} is named twice")


def check_top_k(k: int, n: int, path: str) -> None:
    if not 1 <= k <= min(MAX_TOP_K, n):
        raise InvalidArgument(path, f"must be in [1, {min(MAX_TOP_K, n)}], got {k}")

"""This binds what a client asks to watch to the model: it resolves artifacts, checks indices and makes names distinct.

One item of a source keeps the name given; several items are called "<name>/L<layer>N<neuron>", "<name>/L<layer>" for a
direction at several layers, "<name>/L<layer>F<feature>" and "<name>/L<layer>H<head>".
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from patchclamp_server.artifacts.head_sets import select
from patchclamp_server.artifacts.store import ArtifactStore
from patchclamp_server.artifacts.types import ArtifactKind
from patchclamp_server.errors import FailedPrecondition, InvalidArgument, ResourceExhausted
from patchclamp_server.interventions.features import chosen_rows
from patchclamp_server.interventions.kinds.probes import DEFAULT_THRESHOLD, single_score
from patchclamp_server.interventions.resolver import Resolver, check_finite, check_indices
from patchclamp_server.model.info import ModelInfo
from patchclamp_server.model.sites import NEURON_SITES, Site
from patchclamp_server.monitoring.items import (
    Encoder,
    FeaturesOfAutoencoder,
    WatchedDirection,
    WatchedFeatures,
    WatchedHeads,
    WatchedNeurons,
    WatchedProbe,
    WatchItem,
)
from patchclamp_server.monitoring.watch import NEURON_KIND_OF, VECTOR_SITES, ItemKind, Watch

MAX_NAME_CHARACTERS = 128
# An item fires above this quantile of its own values unless the client says otherwise.
DEFAULT_QUANTILE = 0.99
# The threshold, and no quantile, of kinds whose values have a point of their own.
_DEFAULT_THRESHOLDS = {ItemKind.FEATURE: (0.0, 0.0), ItemKind.PROBABILITY: (DEFAULT_THRESHOLD, 0.0)}


class _Found(NamedTuple):
    suffix: str
    kind: ItemKind
    layer: int
    # This is the neuron or the head.
    unit: int = 0
    site: Site | None = None
    vector: Tensor | None = None
    bias: float = 0.0
    jump: float = 0.0


def bind_watch(
    items: Sequence[WatchItem], info: ModelInfo, artifacts: ArtifactStore | None, *, max_items: int
) -> Watch:
    """Returns the watch of these items. Raises InvalidArgument, NotFound or FailedPrecondition with the field path, and
    ResourceExhausted for more than `max_items`."""
    if not items:
        raise InvalidArgument("items", "at least one item is needed")
    binder = _Binder(info, artifacts)
    names: list[str] = []
    thresholds: list[float] = []
    quantiles: list[float] = []
    found: list[_Found] = []
    for i, item in enumerate(items):
        path = f"items[{i}]"
        if not 1 <= len(item.name) <= MAX_NAME_CHARACTERS:
            raise InvalidArgument(f"{path}.name", f"expected 1 to {MAX_NAME_CHARACTERS} characters")
        own = binder.find(item, path)
        threshold, quantile = _threshold(item, own[0].kind, path)
        if len(found) + len(own) > max_items:
            raise ResourceExhausted("items", f"more than {max_items} items, which is what this server watches in all")
        for one in own:
            names.append(item.name if len(own) == 1 else f"{item.name}/{one.suffix}")
            thresholds.append(threshold)
            quantiles.append(quantile)
        if len(set(names)) != len(names):
            raise InvalidArgument(f"{path}.name", f"{item.name!r} gives an item a name that another has")
        found += own
    with_vector = [one for one in found if one.vector is not None]
    rows = iter(range(len(with_vector)))
    return Watch(
        names=tuple(names),
        kinds=torch.tensor([one.kind for one in found], dtype=torch.int64),
        layers=torch.tensor([one.layer for one in found], dtype=torch.int64),
        units=torch.tensor([one.unit if one.vector is None else next(rows) for one in found], dtype=torch.int64),
        thresholds=torch.tensor(thresholds, dtype=torch.float64),
        vectors=torch.stack([one.vector for one in found if one.vector is not None])
        if with_vector
        else torch.empty(0, info.d_model),
        sites=tuple(one.site for one in found if one.site is not None),
        bias=torch.tensor([one.bias for one in with_vector], dtype=torch.float32),
        jump=torch.tensor([one.jump for one in with_vector], dtype=torch.float32),
        quantiles=torch.tensor(quantiles if any(quantiles) else [], dtype=torch.float64),
    )


def _threshold(item: WatchItem, kind: ItemKind, path: str) -> tuple[float, float]:
    """Returns threshold and quantile, of which one is 0."""
    if item.quantile is not None:
        if item.threshold is not None:
            raise InvalidArgument(f"{path}.threshold_quantile", "a threshold is given as well; expected one of both")
        if not 0.0 < item.quantile < 1.0:
            raise InvalidArgument(f"{path}.threshold_quantile", f"must be above 0 and below 1, got {item.quantile}")
        return 0.0, item.quantile
    if item.threshold is None:
        return _DEFAULT_THRESHOLDS.get(kind, (0.0, DEFAULT_QUANTILE))
    check_finite(item.threshold, f"{path}.threshold")
    return item.threshold, 0.0


class _Binder:
    def __init__(self, info: ModelInfo, artifacts: ArtifactStore | None) -> None:
        self.info = info
        self.artifacts = artifacts
        self.resolver = Resolver(info, artifacts)

    def find(self, item: WatchItem, path: str) -> list[_Found]:
        match item.source:
            case WatchedNeurons():
                return self.neurons(item.source, f"{path}.neurons")
            case WatchedDirection():
                return self.direction(item.source, f"{path}.direction")
            case WatchedFeatures():
                return self.features(item.source, f"{path}.features")
            case FeaturesOfAutoencoder():
                return self.numbered_features(item.source, f"{path}.features")
            case WatchedHeads():
                return self.heads(item.source, f"{path}.heads")
            case WatchedProbe():
                return self.probe(item.source, f"{path}.probe.probe")

    def neurons(self, source: WatchedNeurons, path: str) -> list[_Found]:
        chosen: list[tuple[int, Sequence[int]]] = [(source.layer, source.neurons)]
        if source.neuron_set is not None:
            if source.neurons or source.layer:
                raise InvalidArgument(f"{path}.neurons", "give neurons of a layer or a neuron_set, not both")
            artifact = self.resolver.artifact(source.neuron_set, ArtifactKind.NEURON_SET, f"{path}.neuron_set")
            chosen = [(layer, artifact.neurons(layer)[0].tolist()) for layer in artifact.info.layers]
        elif not source.neurons:
            raise InvalidArgument(f"{path}.neurons", "neurons or a neuron_set are needed")
        kind = self.neuron_kind(source.site or Site.MLP_POST, path)
        field = "neurons" if source.neuron_set is None else "neuron_set"
        found = []
        for layer, neurons in chosen:
            self.layer(layer, f"{path}.layer" if field == "neurons" else f"{path}.{field}")
            check_indices(tuple(neurons), self.info.d_ff, f"{path}.{field}", "neuron")
            found += [_Found(f"L{layer}N{neuron}", kind, layer, neuron) for neuron in neurons]
        return found

    def neuron_kind(self, site: Site, path: str) -> ItemKind:
        self.resolver.width(site, path)
        if site not in NEURON_KIND_OF:
            expected = ", ".join(s.value for s in NEURON_SITES if s in self.info.sites)
            raise InvalidArgument(f"{path}.site", f"expected a site of neurons: {expected}")
        return NEURON_KIND_OF[site]

    def direction(self, source: WatchedDirection, path: str) -> list[_Found]:
        site, layers = source.site, source.layers
        if source.vector.artifact is not None and (site is None or not layers):
            artifact = self.resolver.artifact(source.vector.artifact, ArtifactKind.VECTOR, f"{path}.vector.artifact")
            site = site or artifact.info.site
            layers = layers or artifact.info.layers
        site = self.site(site, path)
        layers = self.resolver.layers(layers, False, path)
        # Vectors have length 1, as in gates and readouts, so that a value seen here can be a threshold there.
        rows = self.resolver.vectors(source.vector, site, layers, self.info.d_model, f"{path}.vector", unit=True)
        return [_Found(f"L{layer}", ItemKind.DIRECTION, layer, site=site, vector=rows[layer][0]) for layer in layers]

    def features(self, source: WatchedFeatures, path: str) -> list[_Found]:
        site = self.site(source.site, path)
        self.layer(source.layer, f"{path}.layer")
        encoder = self.encoder(source.encoder, path)
        numbers = {source.encoder.field: encoder}
        for name, given in (("bias", source.bias), ("jump", source.jump)):
            numbers[name] = torch.zeros(len(encoder)) if given is None else given.float()
            if list(numbers[name].shape) != [len(encoder)]:
                raise InvalidArgument(f"{path}.{name}", f"shape {list(numbers[name].shape)} is not [{len(encoder)}]")
        for name, tensor in numbers.items():
            if not bool(torch.isfinite(tensor).all()):
                raise InvalidArgument(f"{path}.{name}", "holds NaN or infinite numbers")
        bias, jump = numbers["bias"].tolist(), numbers["jump"].tolist()
        return [
            _Found(f"L{source.layer}F{i}", ItemKind.FEATURE, source.layer, 0, site, row.contiguous(), bias[i], jump[i])
            for i, row in enumerate(encoder)
        ]

    def probe(self, source: WatchedProbe, path: str) -> list[_Found]:
        probe = self.resolver.probe(source.probe, path)
        if probe.site not in VECTOR_SITES:
            expected = ", ".join(s.value for s in VECTOR_SITES)
            message = f"{source.probe} reads {probe.site.value}; probes are watched at sites of the residual width: "
            raise FailedPrecondition(path, f"{message}{expected}. A readout, a gate and abort_when read this one")
        score = single_score(probe, source.probe, path)
        [layer] = probe.layers
        kind = ItemKind.NUMBER if score.is_number else ItemKind.PROBABILITY
        vector = torch.from_numpy(score.directions[layer].astype(np.float32))
        return [_Found(f"L{layer}", kind, layer, site=probe.site, vector=vector, bias=score.bias)]

    def numbered_features(self, source: FeaturesOfAutoencoder, path: str) -> list[_Found]:
        """Reads the rows of these features, and no others: the watch has a copy of them."""
        ref = source.autoencoder
        autoencoder = self.resolver.autoencoder(ref, f"{path}.autoencoder")
        site, layer = autoencoder.spec.site, autoencoder.spec.layer
        if site not in VECTOR_SITES:
            expected = ", ".join(s.value for s in VECTOR_SITES)
            message = f"{ref} reads {site.value}; features are watched at sites of the residual width: {expected}"
            raise InvalidArgument(f"{path}.autoencoder", message)
        rows = chosen_rows(autoencoder, ref, source.features, path)
        bias, jump = rows.folded_bias.tolist(), rows.threshold.tolist()
        return [
            _Found(f"L{layer}F{feature}", ItemKind.FEATURE, layer, 0, site, rows.encoder[i], bias[i], jump[i])
            for i, feature in enumerate(source.features)
        ]

    def encoder(self, given: Encoder, path: str) -> Tensor:
        """Returns the encoder as [k, d_model]."""
        matrix, width, field = given.matrix.float(), self.info.d_model, given.field
        turned = field == "encoder_width_by_features"
        rows = matrix.t() if turned else matrix
        if rows.dim() != 2 or not rows.numel() or rows.shape[1] != width:
            expected = f"[{width}, features]" if turned else f"[features, {width}]"
            message = f"shape {list(matrix.shape)} is not {expected}"
            if matrix.dim() == 2 and rows.shape[0] == width:
                other = "encoder_features_by_width" if turned else "encoder_width_by_features"
                message += f"; a matrix that stands the other way belongs into {other}"
            raise InvalidArgument(f"{path}.{field}", message)
        if field == "encoder" and rows.shape[0] == width:
            message = (
                f"a square matrix of {width} could stand either way: give it as encoder_features_by_width (a row for "
                "each feature) or encoder_width_by_features (a column for each, as W_enc of SAELens)"
            )
            raise InvalidArgument(f"{path}.{field}", message)
        return rows

    def heads(self, source: WatchedHeads, path: str) -> list[_Found]:
        if source.selection.head_set and self.artifacts is None:
            raise FailedPrecondition(f"{path}.heads.head_set", "this server keeps no artifacts")
        # `select` needs no store for listed heads.
        chosen = select(source.selection, self.artifacts, self.info, f"{path}.heads")  # type: ignore[arg-type]
        kind = ItemKind.HEAD if source.include_sink else ItemKind.HEAD_OFF_SINK
        return [_Found(f"L{layer}H{head}", kind, layer, head) for layer, head in chosen]

    def site(self, site: Site | None, path: str) -> Site:
        site = site or Site.RESID_POST
        self.resolver.width(site, path)
        if site not in VECTOR_SITES:
            expected = ", ".join(s.value for s in VECTOR_SITES)
            raise InvalidArgument(f"{path}.site", f"expected a site of the residual width: {expected}")
        return site

    def layer(self, layer: int, path: str) -> None:
        if not 0 <= layer < self.info.n_layers:
            raise InvalidArgument(path, f"unknown layer {layer}: the model has {self.info.n_layers}")

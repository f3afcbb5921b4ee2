"""A client asks for a watch by messages WatchItem of proto/patchclamp/v1/monitoring.proto. bind.py binds them."""

from dataclasses import dataclass

from torch import Tensor

from patchclamp_server.artifacts.head_sets import HeadSelection
from patchclamp_server.interventions.program import Vector
from patchclamp_server.model.sites import Site


@dataclass(frozen=True)
class WatchedNeurons:
    """Names neurons of a layer, or those of a neuron set in all of its layers. The default site is mlp_post."""

    layer: int = 0
    neurons: tuple[int, ...] = ()
    neuron_set: str | None = None
    site: Site | None = None


@dataclass(frozen=True, eq=False)
class WatchedDirection:
    """Without a site and layers, those of the artifact are taken."""

    vector: Vector
    site: Site | None = None
    layers: tuple[int, ...] = ()


@dataclass(frozen=True, eq=False)
class Encoder:
    """The encoder of a sparse autoencoder with k features. The message's `field` says which axis they are:

    encoder_features_by_width  [k, d_model]
    encoder_width_by_features  [d_model, k], as W_enc [d_in, d_sae] of SAELens
    encoder                    [k, d_model], deprecated: refused where k = d_model, which would fit either way
    """

    field: str
    matrix: Tensor


@dataclass(frozen=True, eq=False)
class WatchedFeatures:
    """bias and jump are [k]. The default site is resid_post."""

    encoder: Encoder
    layer: int
    site: Site | None = None
    bias: Tensor | None = None
    jump: Tensor | None = None


@dataclass(frozen=True)
class FeaturesOfAutoencoder:
    """Names features of an autoencoder that is an artifact, which says the site and the layer."""

    autoencoder: str
    features: tuple[int, ...]


@dataclass(frozen=True)
class WatchedHeads:
    """With `include_sink` keys at position 0 count too."""

    selection: HeadSelection
    include_sink: bool = False


@dataclass(frozen=True)
class WatchedProbe:
    """Names a probe artifact, whose site and layer are its own."""

    probe: str


@dataclass(frozen=True, eq=False)
class WatchItem:
    """The item fires above `threshold`, or above a `quantile` of its own values. With neither, it fires above 0 for
    features, above 0.5 for probabilities, and above the 0.99 quantile otherwise."""

    name: str
    source: WatchedNeurons | WatchedDirection | WatchedFeatures | FeaturesOfAutoencoder | WatchedHeads | WatchedProbe
    threshold: float | None = None
    quantile: float | None = None

"""What a client asks to be watched: the messages WatchItem of proto/patchclamp/v1/monitoring.proto. See bind.py."""

from dataclasses import dataclass

from torch import Tensor

from patchclamp_server.artifacts.head_sets import HeadSelection
from patchclamp_server.interventions.program import Vector
from patchclamp_server.model.sites import Site


@dataclass(frozen=True)
class WatchedNeurons:
    """Neurons of a layer, or those of a neuron set in all of its layers. The default site is mlp_post."""

    layer: int = 0
    neurons: tuple[int, ...] = ()
    neuron_set: str | None = None
    site: Site | None = None


@dataclass(frozen=True, eq=False)
class WatchedDirection:
    """Without a site and layers: those of the artifact."""

    vector: Vector
    site: Site | None = None
    layers: tuple[int, ...] = ()


@dataclass(frozen=True, eq=False)
class Encoder:
    """The encoder of a sparse autoencoder, of k features. `field`, of the message, says which of its two axes they are:

    encoder_features_by_width  [k, d_model]
    encoder_width_by_features  [d_model, k], as W_enc [d_in, d_sae] of SAELens
    encoder                    [k, d_model], deprecated: refused where k = d_model, which would fit either way
    """

    field: str
    matrix: Tensor


@dataclass(frozen=True, eq=False)
class WatchedFeatures:
    """bias and jump [k]. The default site is resid_post."""

    encoder: Encoder
    layer: int
    site: Site | None = None
    bias: Tensor | None = None
    jump: Tensor | None = None


@dataclass(frozen=True)
class WatchedHeads:
    """`include_sink`: keys at position 0 count too."""

    selection: HeadSelection
    include_sink: bool = False


@dataclass(frozen=True, eq=False)
class WatchItem:
    """It fires above `threshold`, or above a `quantile` of its own values. Default, with neither: 0 for features, else
    the 0.99 quantile."""

    name: str
    source: WatchedNeurons | WatchedDirection | WatchedFeatures | WatchedHeads
    threshold: float | None = None
    quantile: float | None = None

"""Watches: neurons, features, directions and heads that the server measures in everything it serves.

from patchclamp.monitoring import watch_direction, watch_heads, watch_neurons

items = [watch_neurons("suspects", 12, [3, 345]), watch_direction("joy", "joyful_sad", layers=16, threshold="p99.9")]
client.create_watch(items, tags=["safety"])            # an artifact; nothing is measured yet
client.start_watch("safety")                           # measured from here on, and in Prometheus
client.watch_statistics("safety").items[0].mean
client.record_reference("safety", tags=["safety-normal"], use=True).result()   # what drift is measured against
for batch in client.watch_activations("safety", max_events=10):
    print(batch.activations)

One function a kind of item; monitoring.proto says what the value of each is. Several things in one item have the names
"<name>/L<layer>N<neuron>" and the like.

An item fires at a token when its value is above `threshold`: a number, or "p99", the 99th percentile of its own values,
of the reference that the watch is started with, else of the first tokens it sees. The default is "p99", and 0 for
features.
"""

from collections.abc import Iterable, Mapping
from typing import Literal, TypeAlias

from patchclamp.fields import build, one_or_several
from patchclamp.heads import HeadsLike, selection_message
from patchclamp.names import SITES, SiteName, value_of, value_or_unspecified
from patchclamp.programs.vectors import VectorLike, vector_of
from patchclamp.tensors import Numbers, tensor
from patchclamp.v1 import monitoring_pb2 as pb

# A number, or "p" and a percentile.
Threshold: TypeAlias = float | str
EncoderLayout: TypeAlias = Literal["features_by_width", "width_by_features"]
# Field of WatchedFeatures that holds an encoder so laid out.
_LAYOUTS: Mapping[str, str] = {
    "features_by_width": "encoder_features_by_width",
    "width_by_features": "encoder_width_by_features",
}


def watch_neurons(
    name: str,
    layer: int,
    neurons: Iterable[int],
    *,
    site: SiteName | None = None,
    threshold: Threshold | None = None,
) -> pb.WatchItem:
    """Watches neurons of a layer: their activations at mlp_post, unless site is "mlp_gate" or "mlp_up"."""
    source = build(pb.WatchedNeurons, layer=layer, neurons=neurons, site=value_or_unspecified(SITES, site, "site"))
    return _item(name, threshold, neurons=source)


def watch_neuron_set(
    name: str, neuron_set: str, *, site: SiteName | None = None, threshold: Threshold | None = None
) -> pb.WatchItem:
    """Watches all neurons of a stored neuron set (id or tag); for site see watch_neurons."""
    source = build(pb.WatchedNeurons, neuron_set=neuron_set, site=value_or_unspecified(SITES, site, "site"))
    return _item(name, threshold, neurons=source)


def watch_direction(
    name: str,
    direction: VectorLike,
    *,
    layers: int | Iterable[int] = (),
    site: SiteName | None = None,
    threshold: Threshold | None = None,
) -> pb.WatchItem:
    """Watches the projection h·v/|v| of the residual stream on a direction.

    layers, site: by default those of the stored vector; numbers need layers, and are at resid_post unless told
    otherwise.
    """
    source = build(
        pb.WatchedDirection,
        site=value_or_unspecified(SITES, site, "site"),
        layers=one_or_several(layers, "layers", "an int"),
        vector=vector_of(direction, "direction"),
    )
    return _item(name, threshold, direction=source)


def watch_probe(name: str, probe: str, *, threshold: Threshold | None = None) -> pb.WatchItem:
    """Watches the probability of a stored probe, or the number of a ridge probe, where the probe is.

    threshold: by default 0.5, of numbers "p99". The probe has one layer, at a site of the residual width, and two
    labels or a number.
    """
    return _item(name, threshold, probe=build(pb.WatchedProbe, probe=probe))


def watch_features(
    name: str,
    layer: int,
    encoder: Numbers,
    *,
    layout: EncoderLayout | None = None,
    bias: "Numbers | None" = None,
    jump: "Numbers | None" = None,
    site: SiteName = "resid_post",
    threshold: Threshold | None = None,
) -> pb.WatchItem:
    """Watches features of a sparse autoencoder: some of its encoder, bias [k], thresholds of JumpReLU [k].

    layout: "width_by_features" for [width, k], a column for each feature, as W_enc [d_in, d_sae] of SAELens and Gemma
    Scope; "features_by_width" for [k, width], a row for each, as the weight of a torch.nn.Linear, which is the default.
    A square encoder could be either: it needs the layout, ValueError.
    """
    matrix = tensor(encoder, "encoder")
    if layout is None and len(matrix.shape) == 2 and matrix.shape[0] == matrix.shape[1]:
        message = (
            f"the encoder is square, {list(matrix.shape)}: say layout='features_by_width' (a row for each feature) or "
            "layout='width_by_features' (a column for each, as W_enc of SAELens)"
        )
        raise ValueError(message)
    chosen = value_of(_LAYOUTS, layout or "features_by_width", "layout")
    source = build(
        pb.WatchedFeatures,
        site=value_of(SITES, site, "site"),
        layer=layer,
        bias=None if bias is None else tensor(bias, "bias"),
        jump=None if jump is None else tensor(jump, "jump"),
    )
    getattr(source, chosen).CopyFrom(matrix)
    return _item(name, threshold, features=source)


def watch_autoencoder(
    name: str, autoencoder: str, features: int | Iterable[int], *, threshold: Threshold | None = None
) -> pb.WatchItem:
    """Watches features of a stored autoencoder (id or tag) by their numbers; the server reads no others."""
    listed = one_or_several(features, "features", "an int")
    source = build(pb.WatchedFeatures, autoencoder=autoencoder, features=listed)
    return _item(name, threshold, features=source)


def watch_heads(
    name: str,
    heads: HeadsLike,
    *,
    top_k: int = 0,
    include_sink: bool = False,
    threshold: Threshold | None = None,
) -> pb.WatchItem:
    """Watches the largest attention probability of heads: (layer, head) pairs, or the top_k best of a head set.

    The first token is left out: a head with nothing to do looks there, with a probability near 1. include_sink:
    whether it counts.
    """
    source = build(pb.WatchedHeads, heads=selection_message(heads, top_k), include_sink=include_sink)
    return _item(name, threshold, heads=source)


def _item(
    name: str,
    threshold: Threshold | None,
    *,
    neurons: pb.WatchedNeurons | None = None,
    direction: pb.WatchedDirection | None = None,
    features: pb.WatchedFeatures | None = None,
    heads: pb.WatchedHeads | None = None,
    probe: pb.WatchedProbe | None = None,
) -> pb.WatchItem:
    number, quantile = (None, quantile_of(threshold)) if isinstance(threshold, str) else (threshold, None)
    return build(
        pb.WatchItem,
        name=name,
        neurons=neurons,
        direction=direction,
        features=features,
        heads=heads,
        probe=probe,
        threshold=number,
        threshold_quantile=quantile,
    )


def quantile_of(text: str) -> float:
    """Returns 0.99 for "p99". Raises ValueError for what is no percentile above 0 and below 100."""
    try:
        percentile = float(text.removeprefix("p")) if text.startswith("p") else 0.0
    except ValueError:
        percentile = 0.0
    if not 0.0 < percentile < 100.0:
        raise ValueError(f"threshold {text!r}: expected a number, or a percentile such as 'p99' or 'p99.9'")
    return percentile / 100.0

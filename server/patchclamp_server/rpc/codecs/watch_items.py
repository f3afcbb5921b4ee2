"""Turns watched items into dataclasses of monitoring/items.py. Refuses what may not be asked by field path."""

from collections.abc import Sequence
from typing import Any, Literal

from patchclamp.v1 import monitoring_pb2 as pb
from patchclamp_server.errors import InvalidArgument
from patchclamp_server.interventions.field_checks import chosen, distinct, finite, required
from patchclamp_server.interventions.kinds.vectors import decode_vector
from patchclamp_server.interventions.tensor_messages import decode_tensor
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
from patchclamp_server.monitoring.stored_tensors import check_item_name
from patchclamp_server.rpc.codecs.head import decode_heads
from patchclamp_server.rpc.codecs.program import decode_site

MAX_NAME_BYTES = 128


def decode_items(protos: Sequence[pb.WatchItem]) -> tuple[WatchItem, ...]:
    """Returns the items; whether the model has what they name shows when they are bound."""
    if not protos:
        raise InvalidArgument("items", "expected at least one item")
    return tuple(_item(proto, f"items[{i}]") for i, proto in enumerate(protos))


def _item(proto: pb.WatchItem, field: str) -> WatchItem:
    check_item_name(proto.name, f"{field}.name")
    if len(proto.name.encode()) > MAX_NAME_BYTES:
        raise InvalidArgument(f"{field}.name", f"expected at most {MAX_NAME_BYTES} bytes of UTF-8")
    threshold = finite(proto.threshold, f"{field}.threshold") if proto.HasField("threshold") else None
    quantile = proto.threshold_quantile if proto.HasField("threshold_quantile") else None
    name = chosen(proto, "source", field)
    source = _SOURCES[name](getattr(proto, name), f"{field}.{name}")
    return WatchItem(proto.name, source, threshold, quantile)


def _neurons(proto: pb.WatchedNeurons, field: str) -> WatchedNeurons:
    site = decode_site(proto.site, f"{field}.site") if proto.site else None
    if proto.neuron_set:
        for name in ("neurons", "layer"):
            if getattr(proto, name):
                message = "a neuron_set is given as well; expected one of neurons, neuron_set"
                raise InvalidArgument(f"{field}.{name}", message)
        return WatchedNeurons(neuron_set=proto.neuron_set, site=site)
    if not proto.neurons:
        raise InvalidArgument(f"{field}.neurons", "expected neurons, or neuron_set")
    return WatchedNeurons(proto.layer, distinct(proto.neurons, f"{field}.neurons"), site=site)


def _direction(proto: pb.WatchedDirection, field: str) -> WatchedDirection:
    required(proto, "vector", field)
    return WatchedDirection(
        vector=decode_vector(proto.vector, f"{field}.vector"),
        site=decode_site(proto.site, f"{field}.site") if proto.site else None,
        layers=distinct(proto.layers, f"{field}.layers"),
    )


def _features(proto: pb.WatchedFeatures, field: str) -> WatchedFeatures | FeaturesOfAutoencoder:
    if proto.autoencoder:
        return _features_of_autoencoder(proto, field)
    if proto.features:
        raise InvalidArgument(f"{field}.autoencoder", "features are given by number; expected an autoencoder")
    numbers = {
        name: decode_tensor(getattr(proto, name), f"{field}.{name}", ndims=(1,)) if proto.HasField(name) else None
        for name in ("bias", "jump")
    }
    return WatchedFeatures(
        encoder=_encoder(proto, field),
        layer=proto.layer,
        site=decode_site(proto.site, f"{field}.site") if proto.site else None,
        **numbers,
    )


def _features_of_autoencoder(proto: pb.WatchedFeatures, field: str) -> FeaturesOfAutoencoder:
    names: tuple[Any, ...] = (*_ENCODERS, "bias", "jump")
    for name in names:
        if proto.HasField(name):
            raise InvalidArgument(f"{field}.{name}", "an autoencoder is given as well; expected one of both")
    for name in ("site", "layer"):
        if getattr(proto, name):
            raise InvalidArgument(f"{field}.{name}", "the autoencoder says it; expected none beside an autoencoder")
    if not proto.features:
        raise InvalidArgument(f"{field}.features", "expected at least one feature of the autoencoder")
    return FeaturesOfAutoencoder(proto.autoencoder, distinct(proto.features, f"{field}.features"))


def _encoder(proto: pb.WatchedFeatures, field: str) -> Encoder:
    """Returns the encoder of the one field of three that is set."""
    given = [name for name in _ENCODERS if proto.HasField(name)]
    if not given:
        raise InvalidArgument(f"{field}.{_ENCODERS[0]}", f"missing; expected one of {', '.join(_ENCODERS[:2])}")
    if len(given) > 1:
        raise InvalidArgument(f"{field}.{given[1]}", f"{given[0]} is given as well; expected one of both")
    [name] = given
    matrix = decode_tensor(getattr(proto, name), f"{field}.{name}", ndims=(2,))
    return Encoder(name, matrix)


def _heads(proto: pb.WatchedHeads, field: str) -> WatchedHeads:
    required(proto, "heads", field)
    return WatchedHeads(decode_heads(proto.heads, f"{field}.heads"), proto.include_sink)


def _probe(proto: pb.WatchedProbe, field: str) -> WatchedProbe:
    if not proto.probe:
        raise InvalidArgument(f"{field}.probe", "expected the id or tag of a probe")
    return WatchedProbe(proto.probe)


_ENCODERS: tuple[Literal["encoder_features_by_width", "encoder_width_by_features", "encoder"], ...] = (
    "encoder_features_by_width",
    "encoder_width_by_features",
    "encoder",
)
_SOURCES: dict[str, Any] = {
    "neurons": _neurons,
    "direction": _direction,
    "features": _features,
    "heads": _heads,
    "probe": _probe,
}

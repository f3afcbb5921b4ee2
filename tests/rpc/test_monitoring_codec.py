"""Messages of MonitoringService as dataclasses, and back: defaults as monitoring.proto has them, refusals by field."""

from typing import Any

import numpy as np
import pytest
import torch

from patchclamp.v1 import head_pb2, program_pb2, tensor_pb2
from patchclamp.v1 import monitoring_pb2 as pb
from patchclamp_server.artifacts.head_sets import Head, HeadSelection
from patchclamp_server.artifacts.types import NO_TAGS, Tags
from patchclamp_server.errors import InvalidArgument, NotFound, RequestError
from patchclamp_server.interventions.program import Phase
from patchclamp_server.model.sites import Site
from patchclamp_server.monitoring.accumulator import Sums
from patchclamp_server.monitoring.activations import Activations
from patchclamp_server.monitoring.drift import Drift
from patchclamp_server.monitoring.items import (
    FeaturesOfAutoencoder,
    WatchedDirection,
    WatchedFeatures,
    WatchedHeads,
    WatchedNeurons,
)
from patchclamp_server.monitoring.running import RunningWatch
from patchclamp_server.monitoring.scale import Scale, Source
from patchclamp_server.monitoring.shared import Listed, Replica
from patchclamp_server.monitoring.statistics import Statistics
from patchclamp_server.monitoring.stored import WatchAsked
from patchclamp_server.monitoring.stored_run import Said, StoredRun
from patchclamp_server.monitoring.watch import ItemKind, Watch, WatchOptions
from patchclamp_server.rpc.codecs.monitoring import (
    Followed,
    Recorded,
    decode_following,
    decode_recording,
    decode_start,
    encode_activations,
    encode_listed,
    encode_running,
)
from patchclamp_server.rpc.codecs.watch_items import decode_items
from patchclamp_server.rpc.codecs.watch_statistics import encode_statistics

GENERATED, PROMPT = program_pb2.PHASE_GENERATED, program_pb2.PHASE_PROMPT
NEURONS = pb.WatchedNeurons(layer=1, neurons=[3, 5])
HEADS = head_pb2.HeadSelection(heads=head_pb2.HeadIds(heads=[head_pb2.HeadId(layer=1, head=3)]))
WATCH = Watch(
    names=("a", "b"),
    kinds=torch.full((2,), ItemKind.NEURON),
    layers=torch.zeros(2, dtype=torch.int64),
    units=torch.tensor([0, 1]),
    thresholds=torch.zeros(2, dtype=torch.float64),
    vectors=torch.empty(0, 4),
    sites=(),
    bias=torch.empty(0),
    jump=torch.empty(0),
)
RUNNING = RunningWatch("w", "sha256:1", WATCH, WatchOptions("w", 0.5, frozenset(Phase)), "sha256:2", 1.5, 7)


def numbers(*shape: int, dtype: Any = tensor_pb2.DATA_TYPE_FLOAT32) -> tensor_pb2.Tensor:
    values = np.ones(shape, dtype="<f4")
    return tensor_pb2.Tensor(dtype=dtype, shape=shape, data=values.tobytes())


def item(**fields: Any) -> pb.WatchItem:
    return pb.WatchItem(**{"name": "one", **fields})


def refused(decode: Any, *arguments: Any) -> RequestError:
    with pytest.raises(RequestError) as caught:
        decode(*arguments)
    return caught.value


def test_neurons_are_of_a_layer_or_of_a_set() -> None:
    listed, stored = decode_items([item(neurons=NEURONS), item(neurons=pb.WatchedNeurons(neuron_set="toxic"))])
    assert (listed.name, listed.threshold, listed.source) == ("one", None, WatchedNeurons(1, (3, 5)))
    assert stored.source == WatchedNeurons(neuron_set="toxic")
    [gates] = decode_items([item(neurons=pb.WatchedNeurons(layer=1, neurons=[3], site=program_pb2.SITE_MLP_GATE))])
    assert gates.source == WatchedNeurons(1, (3,), site=Site.MLP_GATE)


def test_a_direction_has_the_site_and_layers_of_its_artifact_unless_told() -> None:
    vector = program_pb2.Vector(artifact="joyful", unit=True)
    told = pb.WatchedDirection(site=program_pb2.SITE_RESID_PRE, layers=[2, 1], vector=vector)
    bare, given = decode_items([item(direction=pb.WatchedDirection(vector=vector)), item(direction=told)])
    assert isinstance(bare.source, WatchedDirection)
    assert (bare.source.site, bare.source.layers) == (None, ())
    assert (bare.source.vector.artifact, bare.source.vector.unit) == ("joyful", True)
    assert isinstance(given.source, WatchedDirection)
    assert (given.source.site, given.source.layers) == (Site.RESID_PRE, (2, 1))


def test_an_item_has_a_threshold_or_a_quantile() -> None:
    given, left = decode_items([item(neurons=NEURONS, threshold_quantile=0.5), item(neurons=NEURONS, threshold=0.0)])
    assert (given.threshold, given.quantile) == (None, 0.5)
    assert (left.threshold, left.quantile) == (0.0, None)


@pytest.mark.parametrize("field", ["encoder", "encoder_features_by_width", "encoder_width_by_features"])
def test_features_come_with_their_encoder_and_its_layout(field: str) -> None:
    [features] = decode_items([item(features=pb.WatchedFeatures(layer=2, jump=numbers(3), **{field: numbers(3, 4)}))])
    assert isinstance(features.source, WatchedFeatures)
    assert (features.source.layer, features.source.site, features.source.bias) == (2, None, None)
    assert (features.source.encoder.field, features.source.encoder.matrix.shape) == (field, (3, 4))
    assert features.source.jump is not None


def test_heads_are_listed_or_the_best_of_a_set() -> None:
    best = head_pb2.HeadSelection(head_set="retrieval", top_k=2)
    listed, stored = decode_items(
        [
            item(heads=pb.WatchedHeads(heads=HEADS)),
            item(heads=pb.WatchedHeads(heads=best, include_sink=True), threshold=0.5),
        ]
    )
    assert listed.source == WatchedHeads(HeadSelection((Head(1, 3),)))
    assert (stored.source, stored.threshold) == (
        WatchedHeads(HeadSelection(head_set="retrieval", top_k=2), include_sink=True),
        0.5,
    )


def features(**fields: Any) -> pb.WatchItem:
    return item(features=pb.WatchedFeatures(**{"encoder": numbers(2, 4), **fields}))


def direction(**fields: Any) -> pb.WatchItem:
    return item(direction=pb.WatchedDirection(**fields))


VECTOR = program_pb2.Vector(artifact="joyful")
BAD_ITEMS: list[tuple[pb.WatchItem, str]] = [
    (pb.WatchItem(neurons=NEURONS), "name"),
    (item(name="a\nb", neurons=NEURONS), "name"),
    (item(name="é" * 65, neurons=NEURONS), "name"),
    (item(), "source"),
    (item(neurons=NEURONS, threshold=float("nan")), "threshold"),
    (item(neurons=pb.WatchedNeurons(layer=1)), "neurons.neurons"),
    (item(neurons=pb.WatchedNeurons(neurons=[1], site=99)), "neurons.site"),
    (item(neurons=pb.WatchedNeurons(neurons=[1, 1])), "neurons.neurons[1]"),
    (item(neurons=pb.WatchedNeurons(neurons=[1], neuron_set="s")), "neurons.neurons"),
    (item(neurons=pb.WatchedNeurons(layer=1, neuron_set="s")), "neurons.layer"),
    (direction(), "direction.vector"),
    (direction(vector=program_pb2.Vector()), "direction.vector.source"),
    (direction(vector=program_pb2.Vector(artifact="")), "direction.vector.artifact"),
    (direction(vector=program_pb2.Vector(values=numbers(2, 2, 2))), "direction.vector.values.shape"),
    (direction(vector=VECTOR, site=99), "direction.site"),
    (direction(vector=VECTOR, layers=[1, 1]), "direction.layers[1]"),
    (item(features=pb.WatchedFeatures(layer=1)), "features.encoder_features_by_width"),
    (features(encoder_width_by_features=numbers(4, 2)), "features.encoder"),
    (
        item(features=pb.WatchedFeatures(encoder_width_by_features=numbers(4))),
        "features.encoder_width_by_features.shape",
    ),
    (features(encoder=numbers(4)), "features.encoder.shape"),
    (features(encoder=numbers(2, 4, dtype=0)), "features.encoder.dtype"),
    (features(bias=numbers(2, 1)), "features.bias.shape"),
    (features(jump=tensor_pb2.Tensor(dtype=1, shape=[2], data=b"1")), "features.jump.data"),
    (features(site=99), "features.site"),
    (item(heads=pb.WatchedHeads()), "heads.heads"),
    (item(heads=pb.WatchedHeads(heads=head_pb2.HeadSelection())), "heads.heads.source"),
    (item(heads=pb.WatchedHeads(heads=head_pb2.HeadSelection(head_set=""))), "heads.heads.head_set"),
]


@pytest.mark.parametrize(("wrong", "field"), BAD_ITEMS, ids=[field for _, field in BAD_ITEMS])
def test_a_wrong_item_is_refused_by_its_path(wrong: pb.WatchItem, field: str) -> None:
    error = refused(decode_items, [item(neurons=NEURONS), wrong])
    assert isinstance(error, InvalidArgument)
    assert error.field == f"items[1].{field}"


def test_a_watch_of_nothing_is_refused() -> None:
    assert refused(decode_items, []).field == "items"


def test_a_start_that_says_nothing_has_the_defaults() -> None:
    asked = decode_start(pb.StartWatchRequest(watch="safety", name="live"))
    assert asked == WatchAsked("safety", WatchOptions("live", 1.0, frozenset({Phase.GENERATED}), 4096, ()))


def test_a_start_has_what_it_was_given() -> None:
    request = pb.StartWatchRequest(
        watch="w",
        name="n",
        sampling_rate=0.5,
        phases=[PROMPT],
        window_tokens=9,
        buckets=[-1, 2],
        reference="r",
        calibration_tokens=99,
        export_items=True,
    )
    options = WatchOptions("n", 0.5, frozenset({Phase.PROMPT}), 9, (-1.0, 2.0), 99, True)
    assert decode_start(request) == WatchAsked("w", options, "r")


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"name": ""}, "name"),
        ({"name": "Live"}, "name"),
        ({"name": "a" * 64}, "name"),
        ({"sampling_rate": 0.0}, "sampling_rate"),
        ({"sampling_rate": 1.5}, "sampling_rate"),
        ({"sampling_rate": float("nan")}, "sampling_rate"),
        ({"phases": [0]}, "phases[0]"),
        ({"phases": [GENERATED, 9]}, "phases[1]"),
        ({"phases": [GENERATED, GENERATED]}, "phases[1]"),
        ({"window_tokens": 2**32 - 1}, "window_tokens"),
        ({"buckets": [1, 1]}, "buckets"),
        ({"buckets": [0, float("inf")]}, "buckets"),
        ({"buckets": [float("nan")]}, "buckets"),
        ({"buckets": range(33)}, "buckets"),
        ({"calibration_tokens": 4097}, "calibration_tokens"),
    ],
)
def test_a_wrong_option_is_refused_by_its_name(fields: dict[str, Any], field: str) -> None:
    request = pb.StartWatchRequest(**{"watch": "w", "name": "n", **fields})
    error = refused(decode_start, request)
    assert isinstance(error, InvalidArgument)
    assert error.field == field


def test_a_recording_leaves_the_window_to_the_watch() -> None:
    assert decode_recording(pb.RecordReferenceRequest(name="w")) == Recorded("w", 0, "", NO_TAGS, False)
    request = pb.RecordReferenceRequest(name="w", tokens=2**24, description="d", tags=["t"], use=True)
    assert decode_recording(request) == Recorded("w", 2**24, "d", Tags(("t",)), True)


@pytest.mark.parametrize(
    ("fields", "field"), [({"tokens": 2**24 + 1}, "tokens"), ({"tags": ["ok", "../up"]}, "tags[1]")]
)
def test_a_wrong_recording_is_refused_by_its_field(fields: dict[str, Any], field: str) -> None:
    assert refused(decode_recording, pb.RecordReferenceRequest(name="w", **fields)).field == field


def test_items_that_are_followed_are_named() -> None:
    request = pb.WatchActivationsRequest(name="w", items=["b"], threshold=0.0, max_events=3)
    assert decode_following(request, WATCH) == Followed("w", (1,), 0.0, 3)
    assert decode_following(pb.WatchActivationsRequest(name="w"), WATCH) == Followed("w", (), None, 0)


@pytest.mark.parametrize(
    ("fields", "kind", "field"),
    [
        ({"items": ["a", "c"]}, NotFound, "items[1]"),
        ({"items": ["a", "a"]}, InvalidArgument, "items[1]"),
        ({"threshold": float("inf")}, InvalidArgument, "threshold"),
        ({"max_events": 2**64 - 1}, InvalidArgument, "max_events"),
    ],
)
def test_a_wrong_following_is_refused_by_its_field(
    fields: dict[str, Any], kind: type[RequestError], field: str
) -> None:
    error = refused(decode_following, pb.WatchActivationsRequest(name="w", **fields), WATCH)
    assert (type(error), error.field) == (kind, field)


def test_a_running_watch_tells_all_it_runs_with() -> None:
    message = encode_running(RUNNING)
    assert (message.name, message.watch, message.reference, message.tokens) == ("w", "sha256:1", "sha256:2", 7)
    assert (list(message.items), list(message.phases)) == (["a", "b"], [PROMPT, GENERATED])
    assert (message.sampling_rate, message.window_tokens) == (0.5, 4096)
    assert (list(message.buckets), message.calibration_tokens, message.export_items) == ([], 1024, False)
    assert message.started.ToMilliseconds() == 1500
    assert message.state == pb.WATCH_STATE_RUNNING


def test_a_watch_of_the_store_that_does_not_run_here_tells_why_and_what_others_say() -> None:
    run = StoredRun("sha256:1", WatchOptions("w", 0.5), "sha256:2", 1.5)
    replicas = (Replica("here-1", Said("full", 0), 2.0), Replica("there-2", Said("", 9), 1.0))
    message = encode_listed(Listed("w", None, run, "full", replicas))
    assert (message.name, message.watch, message.reference, message.sampling_rate) == ("w", "sha256:1", "sha256:2", 0.5)
    assert (message.state, message.reason, message.tokens) == (pb.WATCH_STATE_REFUSED, "full", 0)
    assert [(each.replica, each.state, each.reason, each.tokens) for each in message.replicas] == [
        ("here-1", pb.WATCH_STATE_REFUSED, "full", 0),
        ("there-2", pb.WATCH_STATE_RUNNING, "", 9),
    ]
    assert not message.configured
    assert encode_listed(Listed("w", RUNNING, None)).configured


def statistics(drift: Drift | None = None) -> Statistics:
    """Item a has seen 1, 2 and 3; item b nothing that was finite."""
    sums = Sums(
        tokens=np.array([3, 0]),
        fired=np.array([2, 0]),
        not_finite=np.array([0, 4]),
        left_out=np.array([7, 2]),
        positive=np.array([6.5, 0.0]),
        negative=np.array([0.5, 0.0]),
        total_squares=np.array([14.0, 0.0]),
        min=np.array([1.0, np.inf]),
        max=np.array([3.0, -np.inf]),
        histogram=np.array([[1, 1, 1], [0, 0, 0]]),
        bucket_counts=np.array([[0, 3]]),
    )
    return Statistics(
        sums,
        edges=np.array([[1.0, 2.0], [1.0, 2.0]]),
        scale=Scale(np.array([1.5, 2.5]), ((0.0,),), Source.FIRST_TOKENS),
        kind_names=("neuron",),
        kind_of=np.zeros(2, dtype=np.int64),
        rows=4,
        sinks=5,
        calibrated=4,
        calibration=1024,
        drift=drift,
    )


def test_statistics_are_of_each_item() -> None:
    message = encode_statistics(RUNNING, statistics(), ())
    first, second = message.items
    assert (first.name, first.tokens, first.fired, first.mean, first.min, first.max) == ("a", 3, 2, 2.0, 1.0, 3.0)
    assert first.standard_deviation == pytest.approx((2 / 3) ** 0.5)
    assert [q.probability for q in first.quantiles] == [0.05, 0.5, 0.95, 0.99]
    assert 1.0 <= first.quantiles[1].value <= 2.0
    assert (first.threshold, second.threshold, first.kind) == (1.5, 2.5, pb.WATCH_ITEM_KIND_NEURON)
    assert (first.tokens_left_out, second.tokens_left_out) == (7, 2)
    assert not first.HasField("drift")
    assert not first.HasField("drift_excess")
    assert not message.HasField("mean_drift")
    # What nothing was seen of has zeros, and not infinities, which JSON lacks.
    assert (second.not_finite, second.mean, second.min, second.max, len(second.quantiles)) == (4, 0.0, 0.0, 0.0, 0)


def test_statistics_of_some_items_still_have_the_drift_of_all() -> None:
    drift = Drift(np.array([0.2, 0.4]), np.array([0.1, 0.1]), np.array([0.01, 0.01]))
    message = encode_statistics(RUNNING, statistics(drift), (1,))
    assert [each.name for each in message.items] == ["b"]
    [item] = message.items
    assert (item.drift, item.drift_noise, item.drift_excess) == (0.4, 0.1, pytest.approx(0.3))
    assert (message.mean_drift, message.max_drift) == (pytest.approx(0.3), 0.4)
    assert (message.mean_drift_noise, message.mean_drift_excess) == (0.1, pytest.approx(0.2))
    by_chance = 0.1 + 0.01 * (2 * np.log(2)) ** 0.5
    assert (message.max_drift_noise, message.max_drift_excess) == pytest.approx((by_chance, 0.4 - by_chance))


def test_statistics_tell_of_each_kind_and_of_what_is_still_derived() -> None:
    message = encode_statistics(RUNNING, statistics(), ())
    [neurons] = message.kinds
    assert (neurons.kind, neurons.items, neurons.values, neurons.fired) == (pb.WATCH_ITEM_KIND_NEURON, 2, 3, 2)
    assert (neurons.mean, neurons.min, neurons.max, list(neurons.buckets)) == (2.0, 1.0, 3.0, [0.0])
    assert neurons.values_left_out == 9
    assert message.sink_tokens == 5
    assert message.calibration == pb.WatchCalibration(scale=pb.WATCH_SCALE_FIRST_TOKENS, tokens=4, total=1024)


def test_activations_say_where_they_occurred() -> None:
    batch = Activations(
        items=np.array([1, 0]),
        values=np.array([2.5, 0.5]),
        token_ids=np.array([7, 8]),
        positions=np.array([9, 0]),
        sequences=np.array([3, 4]),
        generated=np.array([True, False]),
        times=np.array([1.5, 2.0]),
        dropped=0,
    )
    message = encode_activations(batch, WATCH.names, {7: " day", 8: "x"}, dropped=6)
    first, second = message.activations
    assert (first.item, first.value, first.token_id, first.token) == ("b", 2.5, 7, " day")
    assert (first.position, first.sequence, first.phase) == (9, 3, GENERATED)
    assert (first.time.ToMilliseconds(), second.phase, message.dropped) == (1500, PROMPT, 6)


def test_features_are_named_by_an_autoencoder_and_their_numbers() -> None:
    features = pb.WatchedFeatures(autoencoder="sae", features=[7, 3])
    [item] = decode_items([pb.WatchItem(name="f", features=features)])
    assert item.source == FeaturesOfAutoencoder("sae", (7, 3))


@pytest.mark.parametrize(
    ("fields", "path"),
    [
        ({"autoencoder": "sae"}, "features"),
        ({"features": [1]}, "autoencoder"),
        ({"autoencoder": "sae", "features": [1, 1]}, "features[1]"),
        ({"autoencoder": "sae", "features": [1], "layer": 2}, "layer"),
        ({"autoencoder": "sae", "features": [1], "site": program_pb2.SITE_MLP_OUT}, "site"),
        ({"autoencoder": "sae", "features": [1], "encoder": numbers(1, 4)}, "encoder"),
        (
            {"autoencoder": "sae", "features": [1], "encoder_features_by_width": numbers(1, 4)},
            "encoder_features_by_width",
        ),
        ({"autoencoder": "sae", "features": [1], "bias": numbers(1)}, "bias"),
        ({"autoencoder": "sae", "features": [1], "jump": numbers(1)}, "jump"),
    ],
)
def test_features_are_named_in_one_way(fields: dict[str, Any], path: str) -> None:
    with pytest.raises(InvalidArgument) as refused:
        decode_items([pb.WatchItem(name="f", features=pb.WatchedFeatures(**fields))])
    assert refused.value.field == f"items[0].features.{path}"

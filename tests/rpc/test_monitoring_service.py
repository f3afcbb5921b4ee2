"""MonitoringService through a real channel: what a watch counts is what readouts of the same tokens show; refusals;
streams that end; references; Prometheus; watches that run from the start.

The tiny random llama: two layers of 64 neurons and four heads, width 32, a token a byte.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from live import LiveServer
from prometheus_client.parser import text_string_to_metric_families
from safetensors.torch import save
from statuses import Failure, failure
from watch_runs import until

from patchclamp import Client, PatchclampError
from patchclamp.monitoring import watch_direction, watch_features, watch_heads, watch_neuron_set, watch_neurons
from patchclamp.programs import Program, generated, read_heads, read_neurons, read_projection
from patchclamp.v1 import artifact_pb2
from patchclamp.v1 import monitoring_pb2 as pb
from patchclamp.v1.monitoring_pb2_grpc import MonitoringServiceStub
from patchclamp_server.artifacts.store import ArtifactStore
from patchclamp_server.artifacts.types import ArtifactKind
from patchclamp_server.engine.config import EngineConfig
from patchclamp_server.model.load import load_model
from patchclamp_server.model.sites import Site
from patchclamp_server.monitoring.watch import ItemKind, Watch
from patchclamp_server.rpc.config import WatchAtStart
from patchclamp_server.rpc.services.monitoring import MAX_STREAMS
from patchclamp_server.security.configuration import ConfigurationError

WIDTH, NEURONS = 32, 64
MAX_WATCHES, MAX_ITEMS = 3, 200
INVALID, NOT_FOUND = grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND
PRECONDITION, EXHAUSTED = grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.RESOURCE_EXHAUSTED
JOY = torch.linspace(-1.0, 1.0, WIDTH)
ENCODER = torch.eye(WIDTH)[:2]
FOREIGN = "sha256:" + "0" * 64


@pytest.fixture(scope="module")
def server(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    engine = EngineConfig(max_watches=MAX_WATCHES, max_watched_items=MAX_ITEMS)
    directory = tmp_path_factory.mktemp("watch_artifacts")
    with LiveServer(load_model(str(tiny_llama_dir)), directory, engine=engine) as server:
        store, fingerprint = ArtifactStore(directory), server.model.info.fingerprint
        vector = {"layer.0": JOY, "layer.1": JOY}
        neurons = {"layer.0.neurons": torch.tensor([5, 6]), "layer.1.neurons": torch.tensor([7])}
        heads = {"scores": torch.tensor([[0.0, 0.7, 0.0, 0.0], [0.0, 0.0, 0.0, 0.9]])}
        put = store.put
        put(ArtifactKind.VECTOR, vector, model_fingerprint=fingerprint, site=Site.RESID_PRE, tags=["joyful"])
        put(ArtifactKind.NEURON_SET, neurons, model_fingerprint=fingerprint, tags=["toxic"])
        put(ArtifactKind.NEURON_SET, neurons, model_fingerprint=FOREIGN, tags=["foreign"])
        put(ArtifactKind.HEAD_SET, heads, model_fingerprint=fingerprint, tags=["retrieval"])
        yield server


@pytest.fixture(scope="module")
def client(server: LiveServer) -> Iterator[Client]:
    with Client(server.address) as client:
        yield client


@pytest.fixture(scope="module")
def channel(server: LiveServer) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(server.address) as channel:
        yield channel


@pytest.fixture(scope="module")
def stub(channel: grpc.Channel) -> MonitoringServiceStub:
    return MonitoringServiceStub(channel)


@pytest.fixture(autouse=True)
def none_running(stub: MonitoringServiceStub) -> Iterator[None]:
    """A test begins without watches, whatever became of the one before."""
    yield
    for watch in stub.ListWatches(pb.ListWatchesRequest()).watches:
        stub.StopWatch(pb.StopWatchRequest(name=watch.name))


def created(stub: MonitoringServiceStub, *items: pb.WatchItem) -> str:
    """The id of a watch of these items."""
    answer: pb.CreateWatchResponse = stub.CreateWatch(pb.CreateWatchRequest(items=items))
    return answer.artifact.id


def started(stub: MonitoringServiceStub, *items: pb.WatchItem, name: str = "w", **options: Any) -> pb.RunningWatch:
    answer: pb.StartWatchResponse = stub.StartWatch(
        pb.StartWatchRequest(watch=created(stub, *items), name=name, **options)
    )
    return answer.watch


def statistics(stub: MonitoringServiceStub, name: str = "w", *items: str) -> pb.GetWatchStatisticsResponse:
    answer: pb.GetWatchStatisticsResponse = stub.GetWatchStatistics(
        pb.GetWatchStatisticsRequest(name=name, items=items)
    )
    return answer


def generate(client: Client, tokens: int = 20, text: str = "hello", **options: Any) -> Any:
    return client.generate(text, max_tokens=tokens, ignore_eos=True, **options).result()


def refused(call: Any, request: Any) -> Failure:
    with pytest.raises(grpc.RpcError) as caught:
        read(call(request))
    return failure(caught.value)


def read(answer: Any) -> None:
    """To the end, where it is a stream."""
    if isinstance(answer, grpc.Call):
        list(answer)


def field_of(refusal: Failure) -> str:
    return str(refusal.details["ErrorInfo"].metadata["field"])


@contextmanager
def following(stub: MonitoringServiceStub, **request: Any) -> Iterator[Any]:
    """Activations from here on."""
    call = stub.WatchActivations(pb.WatchActivationsRequest(**{"name": "w", **request}))
    call.initial_metadata()
    try:
        yield call
    finally:
        call.cancel()


def taken(call: Any, n: int) -> list[pb.Activation]:
    """The next n, at least."""
    found: list[pb.Activation] = []
    while len(found) < n:
        found += next(call).activations
    return found


def test_every_kind_of_item_is_resolved_and_named(stub: MonitoringServiceStub, client: Client) -> None:
    items = [
        watch_neurons("one", 1, [3]),
        watch_neurons("two", 0, [1, 2]),
        watch_neuron_set("set", "toxic"),
        watch_direction("joy", "joyful"),
        watch_direction("sent", JOY.tolist(), layers=1),
        watch_features("sae", 1, ENCODER.tolist()),
        watch_heads("head", [(0, 3)]),
        watch_heads("best", "retrieval", top_k=2),
    ]
    answer = stub.CreateWatch(pb.CreateWatchRequest(items=items, description="all", tags=["everything"]))
    several = {
        "two": ["L0N1", "L0N2"],
        "set": ["L0N5", "L0N6", "L1N7"],
        "joy": ["L0", "L1"],
        "sae": ["L1F0", "L1F1"],
        "best": ["L1H3", "L0H1"],
    }
    expected = [f"{each.name}/{suffix}" for each in items for suffix in several.get(each.name, [""])]
    assert list(answer.items) == [name.rstrip("/") for name in expected]
    stored = client.get_artifact("everything")
    assert (stored.id, stored.kind, stored.description) == (answer.artifact.id, "watch", "all")
    assert stored.provenance == {"items": len(answer.items)}


@pytest.mark.parametrize(
    ("item", "code", "field"),
    [
        (watch_neurons("n", 2, [0]), INVALID, "items[0].neurons.layer"),
        (watch_neurons("n", 0, [NEURONS]), INVALID, "items[0].neurons.neurons[0]"),
        (watch_neuron_set("n", "nothing"), NOT_FOUND, "items[0].neurons.neuron_set"),
        (watch_neuron_set("n", "joyful"), INVALID, "items[0].neurons.neuron_set"),
        (watch_neuron_set("n", "foreign"), PRECONDITION, "items[0].neurons.neuron_set"),
        (watch_direction("d", "nothing"), NOT_FOUND, "items[0].direction.vector.artifact"),
        (watch_direction("d", [1.0] * WIDTH), INVALID, "items[0].direction.layers"),
        (watch_direction("d", [1.0], layers=0), INVALID, "items[0].direction.vector.values"),
        (watch_direction("d", "joyful", layers=9), INVALID, "items[0].direction.layers[0]"),
        (watch_direction("d", "joyful", site="mlp_post"), INVALID, "items[0].direction.site"),
        (watch_features("f", 0, [[1.0, 2.0]]), INVALID, "items[0].features.encoder_features_by_width"),
        (watch_features("f", 0, ENCODER.tolist(), bias=[0.0]), INVALID, "items[0].features.bias"),
        (watch_features("f", 7, ENCODER.tolist()), INVALID, "items[0].features.layer"),
        (watch_heads("h", [(0, 4)]), INVALID, "items[0].heads.heads.heads.heads[0].head"),
        (watch_heads("h", "nothing"), NOT_FOUND, "items[0].heads.heads.head_set"),
        (watch_neurons("n", 0, range(NEURONS)), EXHAUSTED, "items"),
    ],
)
def test_what_the_model_or_the_store_has_not_is_refused_by_path(
    stub: MonitoringServiceStub, item: pb.WatchItem, code: grpc.StatusCode, field: str
) -> None:
    items = [item]
    if code is EXHAUSTED:
        items = [watch_neurons(f"n{i}", i % 2, range(NEURONS)) for i in range(4)]
    refusal = refused(stub.CreateWatch, pb.CreateWatchRequest(items=items))
    assert (refusal.code, field_of(refusal)) == (code, field)


def test_two_items_of_one_name_are_refused(stub: MonitoringServiceStub) -> None:
    refusal = refused(
        stub.CreateWatch, pb.CreateWatchRequest(items=[watch_neurons("n", 0, [1]), watch_neurons("n", 1, [1])])
    )
    assert (refusal.code, refusal.fields) == (INVALID, ["items[1].name"])


def test_a_model_that_is_not_served_is_not_found(stub: MonitoringServiceStub) -> None:
    request = pb.CreateWatchRequest(model="other", items=[watch_neurons("n", 0, [1])])
    assert refused(stub.CreateWatch, request).code is NOT_FOUND


def test_a_watch_runs_from_its_start_to_its_stop(stub: MonitoringServiceStub, client: Client) -> None:
    generate(client)
    running = started(stub, watch_neurons("n", 0, [1]), sampling_rate=1.0, window_tokens=9, buckets=[0, 1])
    assert (running.tokens, running.window_tokens, list(running.buckets)) == (0, 9, [0, 1])
    assert running.state == pb.WATCH_STATE_RUNNING
    generate(client, 20)
    listed = stub.ListWatches(pb.ListWatchesRequest())
    # The last token is not run through the model.
    assert [(each.name, each.tokens) for each in listed.watches] == [("w", 19)]
    assert (listed.max_watches, listed.max_items) == (MAX_WATCHES, MAX_ITEMS)
    assert stub.StopWatch(pb.StopWatchRequest(name="w")).watch.tokens == 19
    assert not stub.ListWatches(pb.ListWatchesRequest()).watches


def test_what_is_counted_is_what_readouts_show(stub: MonitoringServiceStub, client: Client) -> None:
    started(
        stub,
        watch_neurons("n", 1, [3, 4], threshold=0.0),
        watch_direction("joy", "joyful", layers=0, threshold=0.5),
        watch_features("sae", 1, ENCODER.t().tolist(), layout="width_by_features"),
        watch_heads("h", [(1, 2)], include_sink=True, threshold=0.0),
    )
    program = Program(
        readouts=[
            read_neurons([3, 4], layers=1, name="n", scope=generated()),
            read_projection([JOY.tolist()], site="resid_pre", layers=0, name="joy", scope=generated()),
            read_projection(ENCODER.tolist(), layers=1, name="sae", scope=generated()),
            read_heads([2], layers=1, name="h", scope=generated()),
        ]
    )
    result = generate(client, 30, program=program)
    values = [value for token in result.tokens for value in token.readouts]

    def seen(name: str, column: int = 0) -> torch.Tensor:
        return torch.tensor([v.values[column] for v in values if v.name == name], dtype=torch.float64)

    expected = {
        "n/L1N3": seen("n", 0),
        "n/L1N4": seen("n", 1),
        "joy": seen("joy"),
        "sae/L1F0": seen("sae", 0).clamp(min=0),
        "sae/L1F1": seen("sae", 1).clamp(min=0),
        "h": seen("h"),
    }
    answer = statistics(stub)
    assert [item.name for item in answer.items] == list(expected)
    for item, numbers in zip(answer.items, expected.values(), strict=True):
        assert item.tokens == len(numbers) == 29
        assert item.fired == int((numbers > (0.5 if item.name == "joy" else 0.0)).sum())
        assert item.mean == pytest.approx(float(numbers.mean()), abs=1e-5)
        assert item.standard_deviation == pytest.approx(float(numbers.std(correction=0)), abs=1e-4)
        assert (item.min, item.max) == pytest.approx((float(numbers.min()), float(numbers.max())), abs=1e-5)
        assert item.min <= item.quantiles[0].value <= item.quantiles[3].value <= item.max


def test_statistics_of_some_items_are_in_the_order_asked_for(stub: MonitoringServiceStub) -> None:
    started(stub, watch_neurons("n", 0, [1, 2, 3]))
    answer = statistics(stub, "w", "n/L0N3", "n/L0N1")
    assert [item.name for item in answer.items] == ["n/L0N3", "n/L0N1"]
    assert not answer.items[0].quantiles


@pytest.mark.parametrize(
    ("method", "request_", "code", "field"),
    [
        ("StopWatch", pb.StopWatchRequest(name="x"), NOT_FOUND, "name"),
        ("GetWatchStatistics", pb.GetWatchStatisticsRequest(name="x"), NOT_FOUND, "name"),
        ("GetWatchStatistics", pb.GetWatchStatisticsRequest(name="w", items=["x"]), NOT_FOUND, "items[0]"),
        ("RecordReference", pb.RecordReferenceRequest(name="x"), NOT_FOUND, "name"),
        ("RecordReference", pb.RecordReferenceRequest(name="w", tokens=2**25), INVALID, "tokens"),
        ("WatchActivations", pb.WatchActivationsRequest(name="x"), NOT_FOUND, "name"),
        ("WatchActivations", pb.WatchActivationsRequest(name="w", items=["n", "n"]), INVALID, "items[1]"),
        ("StartWatch", pb.StartWatchRequest(name="v"), INVALID, "watch"),
        ("StartWatch", pb.StartWatchRequest(name="v", watch="nothing"), NOT_FOUND, "watch"),
        ("StartWatch", pb.StartWatchRequest(name="v", watch="joyful"), INVALID, "watch"),
        ("StartWatch", pb.StartWatchRequest(name="v", watch="safety", reference="none"), NOT_FOUND, "reference"),
        ("StartWatch", pb.StartWatchRequest(name="v", watch="safety", reference="safety"), INVALID, "reference"),
        ("StartWatch", pb.StartWatchRequest(name="w", watch="safety"), PRECONDITION, "name"),
        ("StartWatch", pb.StartWatchRequest(name="V", watch="safety"), INVALID, "name"),
    ],
)
def test_what_cannot_be_done_is_refused_by_field(
    stub: MonitoringServiceStub, method: str, request_: Any, code: grpc.StatusCode, field: str
) -> None:
    stub.CreateWatch(pb.CreateWatchRequest(items=[watch_neurons("n", 0, [1])], tags=["safety"]))
    stub.StartWatch(pb.StartWatchRequest(watch="safety", name="w"))
    refusal = refused(getattr(stub, method), request_)
    assert (refusal.code, field_of(refusal)) == (code, field)


def test_there_is_a_cap_on_watches_and_on_items_in_all(stub: MonitoringServiceStub) -> None:
    half = created(stub, watch_neurons("a", 0, range(NEURONS)), watch_neurons("b", 1, range(NEURONS)))
    one = created(stub, watch_neurons("n", 0, [1]))
    stub.StartWatch(pb.StartWatchRequest(watch=half, name="a"))
    refusal = refused(stub.StartWatch, pb.StartWatchRequest(watch=half, name="b"))
    assert (refusal.code, field_of(refusal)) == (EXHAUSTED, "watch")
    assert "RetryInfo" in refusal.details
    for name in ("b", "c"):
        stub.StartWatch(pb.StartWatchRequest(watch=one, name=name))
    refusal = refused(stub.StartWatch, pb.StartWatchRequest(watch=one, name="d"))
    assert (refusal.code, field_of(refusal)) == (EXHAUSTED, "name")


def test_activations_are_told_with_token_position_and_value(
    server: LiveServer, stub: MonitoringServiceStub, client: Client
) -> None:
    started(stub, watch_neurons("n", 1, [3]))
    program = Program(readouts=[read_neurons([3], layers=1, name="n", scope=generated())])
    with following(stub, threshold=-1e9) as call:
        result = generate(client, 10, program=program)
        found = taken(call, 9)
    readouts = {v.position: v.values[0] for token in result.tokens for v in token.readouts}
    assert {each.position: each.value for each in found} == pytest.approx(readouts)
    tokens = {token.position: token.id for token in result.tokens}
    assert all(tokens[each.position] == each.token_id for each in found)
    # A token a byte: some are half a character.
    assert all(each.token == server.model.tokenizer.decode([each.token_id]) for each in found)
    assert {each.item for each in found} == {"n"}
    assert len({each.sequence for each in found}) == 1
    assert all(each.time.ToMilliseconds() >= 0 for each in found)


def test_only_what_is_above_a_threshold_is_told(stub: MonitoringServiceStub, client: Client) -> None:
    started(stub, watch_neurons("n", 1, [3, 4], threshold=0.01))
    with following(stub) as own, following(stub, items=["n/L1N4"], threshold=-1e9) as all_of_one:
        generate(client, 10)
        counted = sum(item.fired for item in statistics(stub).items)
        assert counted > 0
        assert all(each.value > 0.01 for each in taken(own, counted))
        assert [each.item for each in taken(all_of_one, 9)] == ["n/L1N4"] * 9


def test_a_stream_ends_after_as_many_events_as_were_asked_for(stub: MonitoringServiceStub, client: Client) -> None:
    started(stub, watch_neurons("n", 1, range(8)))
    with following(stub, threshold=-1e9, max_events=11) as call:
        generate(client, 10)
        assert sum(len(message.activations) for message in call) == 11


def test_a_stream_ends_with_its_watch(stub: MonitoringServiceStub) -> None:
    started(stub, watch_neurons("n", 1, [3]))
    with following(stub) as call:
        stub.StopWatch(pb.StopWatchRequest(name="w"))
        assert list(call) == []
        assert call.code() is grpc.StatusCode.OK


def test_a_slow_reader_is_told_what_it_missed_and_serving_goes_on(
    server: LiveServer, stub: MonitoringServiceStub, client: Client
) -> None:
    started(stub, watch_neurons("n", 0, range(NEURONS)), watch_neurons("m", 1, range(NEURONS)))
    dropped = 'patchclamp_watch_events_dropped_total{watch="w"}'
    with following(stub, threshold=-1e9) as call:
        while not server.metric(dropped):
            with ThreadPoolExecutor(8) as pool:
                list(pool.map(lambda text: generate(client, 240, text), "abcdefgh"))
        values, missed = sum(item.tokens for item in statistics(stub).items), server.metric(dropped)
        stub.StopWatch(pb.StopWatchRequest(name="w"))
        messages = list(call)
    assert sum(message.dropped for message in messages) == missed > 0
    assert sum(len(message.activations) for message in messages) + missed == values


def test_a_cancelled_call_leaves_nothing_in_the_engine(
    server: LiveServer, stub: MonitoringServiceStub, client: Client
) -> None:
    started(stub, watch_neurons("n", 0, range(NEURONS)), watch_neurons("m", 1, range(NEURONS)))
    with following(stub, threshold=-1e9):
        pass
    # A place is given back after the rest.
    calls = [stub.WatchActivations(pb.WatchActivationsRequest(name="w")) for _ in range(MAX_STREAMS - 1)]
    for call in calls:
        call.initial_metadata()
    until(lambda: recording_begins(stub, while_it_is=EXHAUSTED))
    for call in calls:
        call.cancel()
    # More events than would wait for it: they would be dropped.
    generate(client, 240)
    assert server.metric('patchclamp_watch_events_dropped_total{watch="w"}') == 0


def test_cancelling_gives_the_place_back(stub: MonitoringServiceStub) -> None:
    started(stub, watch_neurons("n", 1, [3]))
    calls = [stub.WatchActivations(pb.WatchActivationsRequest(name="w")) for _ in range(MAX_STREAMS)]
    for call in calls:
        call.initial_metadata()
    assert refused(stub.WatchActivations, pb.WatchActivationsRequest(name="w")).code is EXHAUSTED
    for call in calls:
        call.cancel()
    until(lambda: recording_begins(stub, while_it_is=EXHAUSTED))


def recording_begins(stub: MonitoringServiceStub, while_it_is: grpc.StatusCode) -> bool:
    """False when it is refused by this status. One that began is cancelled."""
    call = stub.RecordReference(pb.RecordReferenceRequest(name="w"))
    try:
        next(call)
    except grpc.RpcError as error:
        if failure(error).code is not while_it_is:
            raise
        return False
    call.cancel()
    return True


def test_a_reference_is_recorded_and_drift_measured_against_it(stub: MonitoringServiceStub, client: Client) -> None:
    started(stub, watch_neurons("n", 1, range(8)), window_tokens=100)
    call = stub.RecordReference(
        pb.RecordReferenceRequest(name="w", tokens=150, description="usual", tags=["usual"], use=True)
    )
    assert next(call).progress == pb.RecordReferenceProgress(tokens=0, total=150)
    generate(client, 200)
    *progress, last = list(call)
    assert [each.progress.tokens for each in progress] == sorted(each.progress.tokens for each in progress)
    assert last.result.kind == artifact_pb2.ARTIFACT_KIND_WATCH_REFERENCE
    stored = client.get_artifact("usual")
    [running] = stub.ListWatches(pb.ListWatchesRequest()).watches
    assert stored.provenance == {"watch": running.watch, "tokens": 150, "sampling_rate": 1, "phases": ["generated"]}
    assert running.reference == stored.id
    assert not statistics(stub).HasField("mean_drift")
    generate(client, 200)
    answer = statistics(stub)
    assert all(0 <= item.drift <= 1 and item.HasField("drift") for item in answer.items)
    assert answer.max_drift == max(item.drift for item in answer.items)
    assert answer.mean_drift == pytest.approx(sum(item.drift for item in answer.items) / 8)


def test_a_reference_belongs_to_its_watch(stub: MonitoringServiceStub, client: Client) -> None:
    watch = started(stub, watch_neurons("n", 1, [3]), window_tokens=10).watch
    call = stub.RecordReference(pb.RecordReferenceRequest(name="w", tags=["ten"]))
    next(call)
    generate(client, 12)
    assert list(call)[-1].HasField("result")
    stub.StopWatch(pb.StopWatchRequest(name="w"))
    running = stub.StartWatch(pb.StartWatchRequest(watch=watch, name="w", reference="ten", window_tokens=10)).watch
    assert running.reference == client.get_artifact("ten").id
    generate(client, 12)
    assert statistics(stub).HasField("max_drift")
    other = created(stub, watch_neurons("n", 1, [4]))
    refusal = refused(stub.StartWatch, pb.StartWatchRequest(watch=other, name="v", reference="ten"))
    assert (refusal.code, field_of(refusal)) == (PRECONDITION, "reference")


def test_a_watch_records_one_reference_at_a_time_and_a_cancelled_one_is_none(stub: MonitoringServiceStub) -> None:
    started(stub, watch_neurons("n", 1, [3]))
    request = pb.RecordReferenceRequest(name="w")
    first = stub.RecordReference(request)
    next(first)
    assert refused(stub.RecordReference, request).code is PRECONDITION
    first.cancel()
    until(lambda: recording_begins(stub, while_it_is=PRECONDITION))


def test_a_recording_ends_with_its_watch(stub: MonitoringServiceStub) -> None:
    started(stub, watch_neurons("n", 1, [3]))
    call = stub.RecordReference(pb.RecordReferenceRequest(name="w"))
    next(call)
    stub.StopWatch(pb.StopWatchRequest(name="w"))
    with pytest.raises(grpc.RpcError) as caught:
        list(call)
    assert (failure(caught.value).code, field_of(failure(caught.value))) == (NOT_FOUND, "name")


def samples_of(server: LiveServer, watch: str) -> dict[str, float]:
    """By name and labels but the name of the watch."""
    found = {}
    for family in text_string_to_metric_families(server.metrics()):
        for sample in family.samples:
            labels = dict(sample.labels)
            if labels.pop("watch", None) == watch:
                found[" ".join([sample.name, *labels.values()])] = sample.value
    return found


def test_prometheus_is_told_of_the_items_of_each_kind_together(
    server: LiveServer, stub: MonitoringServiceStub, client: Client
) -> None:
    """Values of a neuron, a direction and a head have nothing in common that a mean could be of."""
    neurons = watch_neurons("n", 1, [3, 4], threshold=0.0)
    started(stub, neurons, watch_heads("h", [(1, 2)], threshold=0.5), buckets=[0], window_tokens=10)
    assert "patchclamp_watch_max neuron" not in samples_of(server, "w")
    generate(client, 12)
    *items, head = statistics(stub).items
    shown = samples_of(server, "w")
    fired = sum(item.fired for item in items)
    neuron = {
        "patchclamp_watch_values_total": 22,
        "patchclamp_watch_fired_total": fired,
        "patchclamp_watch_not_finite_total": 0,
        "patchclamp_watch_positive_sum_total": shown["patchclamp_watch_positive_sum_total neuron"],
        "patchclamp_watch_negative_sum_total": shown["patchclamp_watch_negative_sum_total neuron"],
        "patchclamp_watch_min": min(item.min for item in items),
        "patchclamp_watch_max": max(item.max for item in items),
    }
    heads = {
        "patchclamp_watch_values_total": 11,
        "patchclamp_watch_fired_total": head.fired,
        "patchclamp_watch_not_finite_total": 0,
        "patchclamp_watch_positive_sum_total": pytest.approx(11 * head.mean),
        "patchclamp_watch_negative_sum_total": 0,
        "patchclamp_watch_min": head.min,
        "patchclamp_watch_max": head.max,
    }
    assert shown == {
        "patchclamp_watch_tokens_total": 11,
        "patchclamp_watch_sink_tokens_total": 0,
        "patchclamp_watch_events_dropped_total": 0,
        "patchclamp_watch_calibrating": 0,
        **{f"{name} neuron": value for name, value in neuron.items()},
        **{f"{name} head": value for name, value in heads.items()},
        "patchclamp_watch_activation_bucket neuron 0.0": 22 - fired,
        "patchclamp_watch_activation_bucket neuron +Inf": 22,
        "patchclamp_watch_activation_bucket head 0.0": 0,
        "patchclamp_watch_activation_bucket head +Inf": 11,
    }
    # What a mean over any time is made of.
    above, below = (shown[f"patchclamp_watch_{sign}_sum_total neuron"] for sign in ("positive", "negative"))
    assert (above - below) / 22 == pytest.approx(sum(item.mean for item in items) / 2)
    assert min(above, below) > 0
    assert server.metric("patchclamp_watches") == 1
    assert server.metric("patchclamp_watch_items") == 3
    assert server.metric("patchclamp_watches_limit") == MAX_WATCHES
    assert server.metric("patchclamp_watch_items_limit") == MAX_ITEMS
    assert server.metric("patchclamp_watches_refused") == 0


def test_counts_by_thresholds_that_still_move_are_not_in_prometheus(
    server: LiveServer, stub: MonitoringServiceStub, client: Client
) -> None:
    started(stub, watch_neurons("n", 1, [3, 4]), calibration_tokens=20, export_items=True)
    generate(client, 12)
    answer, shown = statistics(stub), samples_of(server, "w")
    assert answer.calibration == pb.WatchCalibration(scale=pb.WATCH_SCALE_FIRST_TOKENS, tokens=11, total=20)
    assert (shown["patchclamp_watch_calibrating"], shown["patchclamp_watch_values_total neuron"]) == (1, 22)
    assert not any("fired" in name or "bucket" in name or "threshold" in name for name in shown)
    generate(client, 12)
    answer, shown = statistics(stub), samples_of(server, "w")
    assert (answer.calibration.tokens, shown["patchclamp_watch_calibrating"]) == (20, 0)
    assert shown["patchclamp_watch_fired_total neuron"] == sum(item.fired for item in answer.items)
    bounds = {name.split()[-1] for name in shown if name.startswith("patchclamp_watch_activation_bucket")}
    assert {float(bound) for bound in bounds - {"+Inf"}} == set(answer.kinds[0].buckets)


def test_an_item_has_series_of_its_own_where_the_watch_asks_for_it(
    server: LiveServer, stub: MonitoringServiceStub, client: Client
) -> None:
    plain, exported = (
        started(stub, watch_neurons("n", 1, [3, 4], threshold=0.0), name=name, buckets=[0], export_items=name == "e")
        for name in ("w", "e")
    )
    assert (plain.export_items, exported.export_items) == (False, True)
    generate(client, 12)
    assert not any("item" in name for name in samples_of(server, "w"))
    shown, items = samples_of(server, "e"), statistics(stub, "e").items
    for item in items:
        assert shown[f"patchclamp_watch_item_values_total {item.name}"] == 11
        assert shown[f"patchclamp_watch_item_fired_total {item.name}"] == item.fired
        assert shown[f"patchclamp_watch_item_threshold {item.name}"] == 0
        sums = [shown[f"patchclamp_watch_item_{sign}_sum_total {item.name}"] for sign in ("positive", "negative")]
        assert sums[0] - sums[1] == pytest.approx(11 * item.mean)


def test_drift_is_shown_once_there_is_a_reference_and_a_full_window(
    server: LiveServer, stub: MonitoringServiceStub, client: Client
) -> None:
    started(stub, watch_neurons("n", 1, [3, 4]), window_tokens=10)
    call = stub.RecordReference(pb.RecordReferenceRequest(name="w", use=True))
    next(call)
    generate(client, 12)
    list(call)
    assert "patchclamp_watch_drift_ratio mean" not in samples_of(server, "w")
    generate(client, 12)
    answer, shown = statistics(stub), samples_of(server, "w")
    assert shown["patchclamp_watch_drift_ratio mean"] == answer.mean_drift
    assert shown["patchclamp_watch_drift_ratio max"] == answer.max_drift
    # Ten tokens against ten: most of it is chance.
    assert shown["patchclamp_watch_drift_noise_ratio mean"] == answer.mean_drift_noise > 0.3
    assert shown["patchclamp_watch_drift_excess_ratio mean"] == answer.mean_drift_excess < 0.5
    assert shown["patchclamp_watch_drift_excess_ratio max"] == answer.max_drift_excess


def test_series_vanish_with_their_watch(server: LiveServer, stub: MonitoringServiceStub, client: Client) -> None:
    started(stub, watch_neurons("n", 1, [3]), name="gone")
    generate(client, 3)
    assert samples_of(server, "gone")
    stub.StopWatch(pb.StopWatchRequest(name="gone"))
    assert not samples_of(server, "gone")
    assert "gone" not in server.metrics()


def test_a_watch_travels_as_a_file(server: LiveServer, stub: MonitoringServiceStub, client: Client) -> None:
    watch = created(stub, watch_neurons("n", 1, [3]), watch_direction("joy", "joyful"))
    file = client.download_artifact(watch)
    assert client.put_artifact(file, kind="watch").id == watch


def test_a_watch_of_what_the_model_has_not_is_not_taken_in(client: Client, stub: MonitoringServiceStub) -> None:
    watch = Watch(
        names=("n",),
        kinds=torch.tensor([ItemKind.NEURON]),
        layers=torch.tensor([1]),
        units=torch.tensor([NEURONS]),
        thresholds=torch.zeros(1, dtype=torch.float64),
        vectors=torch.empty(0, WIDTH),
        sites=(),
        bias=torch.empty(0),
        jump=torch.empty(0),
    )
    with pytest.raises(PatchclampError, match="neuron 64") as caught:
        client.put_artifact(save(watch.tensors()), kind="watch")
    assert (caught.value.code, caught.value.violations[0].field) == ("INVALID_ARGUMENT", "chunk")
    foreign = client.put_artifact(save(watch.tensors()), kind="watch", model_fingerprint=FOREIGN)
    refusal = refused(stub.StartWatch, pb.StartWatchRequest(watch=foreign.id, name="w"))
    assert (refusal.code, field_of(refusal)) == (PRECONDITION, "watch")


def test_drain_ends_the_streams(tiny_llama_dir: Path, tmp_path: Path) -> None:
    model = load_model(str(tiny_llama_dir))
    with LiveServer(model, tmp_path, drain_seconds=600.0) as server, grpc.insecure_channel(server.address) as channel:
        stub = MonitoringServiceStub(channel)
        started(stub, watch_neurons("n", 1, [3]))
        recording = stub.RecordReference(pb.RecordReferenceRequest(name="w"))
        next(recording)
        with following(stub) as call:
            server.run(server.server.stop())
            for stream in (call, recording):
                with pytest.raises(grpc.RpcError) as caught:
                    list(stream)
                assert failure(caught.value).code is grpc.StatusCode.UNAVAILABLE


def test_the_end_of_the_engine_ends_the_streams(tiny_llama_dir: Path, tmp_path: Path) -> None:
    model = load_model(str(tiny_llama_dir))
    with LiveServer(model, tmp_path) as server, grpc.insecure_channel(server.address) as channel:
        stub = MonitoringServiceStub(channel)
        started(stub, watch_neurons("n", 1, [3]))
        recording = stub.RecordReference(pb.RecordReferenceRequest(name="w"))
        next(recording)
        with following(stub) as call:
            server.server.engine.shutdown()
            for stream in (call, recording):
                with pytest.raises(grpc.RpcError) as caught:
                    list(stream)
                assert failure(caught.value).code is grpc.StatusCode.UNAVAILABLE


def test_a_watch_that_is_configured_runs_from_the_start(tiny_llama_dir: Path, tmp_path: Path) -> None:
    model = load_model(str(tiny_llama_dir))
    with LiveServer(model, tmp_path) as server, Client(server.address) as client:
        client.create_watch([watch_neurons("n", 1, [3])], tags=["safety"])
        client.start_watch("safety", window_tokens=5)
        recording = client.record_reference("safety", tags=["usual"])
        next(recording)
        generate(client, 8)
        recording.result()
    watches = (WatchAtStart("plain", "safety"), WatchAtStart("compared", "safety", "usual"))
    with LiveServer(model, tmp_path, watches=watches) as server, Client(server.address) as client:
        generate(client, 8)
        found = client.list_watches().watches
        assert [(watch.name, bool(watch.reference), watch.tokens) for watch in found] == [
            ("plain", False, 7),
            ("compared", True, 7),
            # Started with the first server, and never stopped.
            ("safety", False, 7),
        ]
        assert [watch.configured for watch in found] == [True, True, False]


@pytest.mark.parametrize(
    ("watch", "message"),
    [(("w", "nothing", ""), "nothing"), (("W", "nothing", ""), "name"), (("w", "joyful", ""), "is a vector")],
)
def test_a_configured_watch_that_cannot_run_is_an_error_at_the_start(
    tiny_llama_dir: Path, tmp_path: Path, watch: Sequence[str], message: str
) -> None:
    model = load_model(str(tiny_llama_dir))
    ArtifactStore(tmp_path).put(
        ArtifactKind.VECTOR,
        {"layer.0": JOY},
        model_fingerprint=model.info.fingerprint,
        site=Site.RESID_PRE,
        tags=["joyful"],
    )
    server = LiveServer(model, tmp_path, watches=(WatchAtStart(*watch),))
    with pytest.raises(ConfigurationError, match=message), server:
        pass

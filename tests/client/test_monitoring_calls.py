"""Watches: what the clients and the command line send to MonitoringService, and what they make of the answers."""

import argparse
import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from canned import REFERENCE, WATCH, Monitoring

from patchclamp import AsyncClient, Client
from patchclamp.cli import main
from patchclamp.cli.app import build_parser
from patchclamp.cli.watch.create import items_file
from patchclamp.cli.watch.item_spec import direction, features, head_list, neuron_set, neurons
from patchclamp.monitoring import (
    watch_autoencoder,
    watch_direction,
    watch_features,
    watch_heads,
    watch_neuron_set,
    watch_neurons,
)
from patchclamp.results import Activations, Progress
from patchclamp.results.monitoring import WatchCalibration
from patchclamp.tensors import tensor
from patchclamp.v1 import head_pb2
from patchclamp.v1 import monitoring_pb2 as pb
from patchclamp.v1 import program_pb2 as program

Serve = Callable[..., str]
JOY = watch_direction("joy", "joyful", layers=16, threshold=2.0)


@pytest.fixture
def server() -> Monitoring:
    return Monitoring()


@pytest.fixture
def client(serve: Serve, server: Monitoring, monkeypatch: pytest.MonkeyPatch) -> Any:
    address = serve(monitoring=server)
    monkeypatch.setenv("PATCHCLAMP_ADDRESS", address)
    with Client(address) as client:
        yield client


def heads_of(*heads: tuple[int, int]) -> head_pb2.HeadSelection:
    listed = [head_pb2.HeadId(layer=layer, head=head) for layer, head in heads]
    return head_pb2.HeadSelection(heads=head_pb2.HeadIds(heads=listed))


def test_an_item_is_one_message_of_its_kind() -> None:
    expected = pb.WatchItem(name="n", neurons=pb.WatchedNeurons(layer=12, neurons=[3, 345]), threshold=0.0)
    assert watch_neurons("n", 12, [3, 345], threshold=0.0) == expected
    assert watch_neuron_set("n", "toxic") == pb.WatchItem(name="n", neurons=pb.WatchedNeurons(neuron_set="toxic"))
    gates = pb.WatchedNeurons(layer=1, neurons=[2], site=program.SITE_MLP_GATE)
    assert watch_neurons("g", 1, [2], site="mlp_gate") == pb.WatchItem(name="g", neurons=gates)
    ups = pb.WatchedNeurons(neuron_set="toxic", site=program.SITE_MLP_UP)
    assert watch_neuron_set("u", "toxic", site="mlp_up") == pb.WatchItem(name="u", neurons=ups)
    stored = pb.WatchedDirection(layers=[16], vector=program.Vector(artifact="joyful"))
    assert pb.WatchItem(name="joy", direction=stored, threshold=2.0) == JOY
    sent = pb.WatchedDirection(
        site=program.SITE_RESID_PRE, layers=[1, 2], vector=program.Vector(values=tensor([1.0], "v"))
    )
    assert watch_direction("v", [1.0], layers=[1, 2], site="resid_pre") == pb.WatchItem(name="v", direction=sent)
    features = pb.WatchedFeatures(
        site=program.SITE_RESID_POST,
        layer=3,
        encoder_features_by_width=tensor([[1.0, 2.0]], "encoder"),
        bias=tensor([0.5], "bias"),
    )
    assert watch_features("f", 3, [[1.0, 2.0]], bias=[0.5]) == pb.WatchItem(name="f", features=features)
    heads = pb.WatchedHeads(heads=heads_of((18, 6)))
    assert watch_heads("h", [(18, 6)]) == pb.WatchItem(name="h", heads=heads)
    heads.include_sink = True
    assert watch_heads("h", [(18, 6)], include_sink=True) == pb.WatchItem(name="h", heads=heads)


def test_a_threshold_is_a_number_or_a_percentile() -> None:
    assert watch_neuron_set("n", "toxic", threshold="p99.9").threshold_quantile == pytest.approx(0.999)
    assert watch_neuron_set("n", "toxic", threshold=2).threshold == 2.0
    assert not watch_neuron_set("n", "toxic").HasField("threshold")
    for wrong in ("99", "p0", "p100", "p", "high", "p-1"):
        with pytest.raises(ValueError, match="percentile such as 'p99'"):
            watch_neurons("n", 1, [2], threshold=wrong)


def test_an_encoder_has_the_layout_of_its_keyword_and_a_square_one_needs_it() -> None:
    """W_enc of SAELens is [d_in, d_sae]."""
    columns = watch_features("f", 3, [[1.0], [2.0]], layout="width_by_features")
    assert columns.features.encoder_width_by_features == tensor([[1.0], [2.0]], "encoder")
    square = [[1.0, 2.0], [3.0, 4.0]]
    with pytest.raises(ValueError, match=r"square, \[2, 2\]: say layout='features_by_width'"):
        watch_features("f", 3, square)
    rows = watch_features("f", 3, square, layout="features_by_width")
    assert rows.features.encoder_features_by_width == tensor(square, "encoder")
    with pytest.raises(ValueError, match="layout 'rows' is unknown"):
        watch_features("f", 3, square, layout="rows")  # type: ignore[arg-type]


def test_a_watch_is_created_with_its_items(client: Client, server: Monitoring) -> None:
    created = client.create_watch([JOY], tags=["safety"], description="mine")
    assert server.request == pb.CreateWatchRequest(items=[JOY], tags=["safety"], description="mine")
    assert (created.artifact.id, created.artifact.kind) == (WATCH.id, "watch")
    assert created.items == ("joy", "suspects/L12N3")


def test_a_watch_starts_with_its_options(client: Client, server: Monitoring) -> None:
    running = client.start_watch(
        "stored",
        "safety",
        sampling_rate=0.5,
        phases=["generated"],
        window_tokens=64,
        buckets=[-1, 1],
        reference="r",
        calibration_tokens=99,
        export_items=True,
    )
    assert server.request == pb.StartWatchRequest(
        watch="stored",
        name="safety",
        sampling_rate=0.5,
        phases=[program.PHASE_GENERATED],
        window_tokens=64,
        buckets=[-1, 1],
        reference="r",
        calibration_tokens=99,
        export_items=True,
    )
    assert (running.phases, running.reference, running.tokens) == (("generated",), REFERENCE.id, 100)
    assert running.started == "1970-01-01T00:00:00Z"


def test_a_watch_has_the_name_of_its_tag_unless_another_is_given(client: Client, server: Monitoring) -> None:
    client.start_watch("safety")
    assert server.request == pb.StartWatchRequest(watch="safety", name="safety")


def test_one_phase_is_not_taken_for_several(client: Client) -> None:
    with pytest.raises(TypeError, match="phases"):
        client.start_watch("safety", phases="generated")


def test_statistics_are_by_item(client: Client, server: Monitoring) -> None:
    found = client.watch_statistics("safety", ["joy"])
    assert server.request == pb.GetWatchStatisticsRequest(name="safety", items=["joy"])
    joy, suspect = found.items
    assert (joy.fired, joy.mean, joy.quantiles[0].value, joy.drift) == (25, 0.5, 0.25, 0.75)
    assert (suspect.not_finite, suspect.tokens_left_out, suspect.drift) == (2, 3, None)
    assert (found.mean_drift, found.max_drift) == (0.75, 0.75)
    assert (joy.kind, joy.threshold, joy.drift_noise, joy.drift_excess) == ("direction", 1.5, 0.25, 0.5)
    assert (found.mean_drift_excess, found.max_drift_noise, found.sink_tokens) == (0.5, 0.375, 7)
    [directions] = found.kinds
    assert (directions.kind, directions.values, directions.buckets) == ("direction", 100, (-1.0, 1.0))
    assert directions.values_left_out == 4
    assert found.calibration == WatchCalibration("first_tokens", 100, 1024)


def test_running_watches_come_with_the_caps(client: Client) -> None:
    running = client.list_watches()
    assert [watch.name for watch in running.watches] == ["safety"]
    assert (running.max_watches, running.max_items, running.replica) == (16, 4096, "here-1")
    here, there = running.watches[0].replicas
    assert (here.state, here.tokens) == ("running", 100)
    assert (there.replica, there.state, there.reason) == ("there-2", "refused", "16 watches are running")
    assert client.stop_watch("safety").tokens == 100


def test_a_reference_is_recorded_with_progress(client: Client, server: Monitoring) -> None:
    events: list[object] = []
    artifact = client.record_reference("safety", tokens=64, tags=["normal"], use=True).result(events.append)
    assert server.request == pb.RecordReferenceRequest(name="safety", tokens=64, tags=["normal"], use=True)
    assert events[0] == Progress("tokens", 32, 64)
    assert (artifact.id, artifact.kind) == (REFERENCE.id, "watch_reference")


def test_activations_come_in_batches_and_tell_what_was_dropped(client: Client, server: Monitoring) -> None:
    batches: list[Activations] = []
    counts = client.watch_activations("safety", items=["joy"], threshold=0.0, max_events=2).result(batches.append)
    assert server.request == pb.WatchActivationsRequest(name="safety", items=["joy"], threshold=0.0, max_events=2)
    assert [batch.dropped for batch in batches] == [0, 3]
    [first] = batches[0].activations
    assert (first.item, first.value, first.token, first.phase, first.seconds) == ("joy", 2.5, " day", "generated", 1.5)
    assert (counts.activations, counts.dropped) == (2, 3)


async def test_the_async_client_does_the_same(serve: Serve) -> None:
    async with AsyncClient(serve(monitoring=Monitoring())) as client:
        created = await client.create_watch([JOY])
        started = await client.start_watch("safety")
        listed = await client.list_watches()
        found = await client.watch_statistics("safety")
        reference = await client.record_reference("safety").result()
        counts = await client.watch_activations("safety").result()
        stopped = await client.stop_watch("safety")
    assert created.artifact.id == started.watch == stopped.watch == WATCH.id
    assert (listed.max_watches, found.items[0].name, reference.id) == (16, "joy", REFERENCE.id)
    assert counts.activations == 2


def test_an_item_in_one_argument_has_a_name_a_source_and_a_threshold() -> None:
    assert neurons("L12N345") == watch_neurons("L12N345", 12, [345])
    assert neurons("L12N3,345") == watch_neurons("L12", 12, [3, 345])
    assert neurons("L12N345@mlp_up:2") == watch_neurons("L12N345@mlp_up", 12, [345], site="mlp_up", threshold=2.0)
    assert neurons("L12N3,345@mlp_gate") == watch_neurons("L12@mlp_gate", 12, [3, 345], site="mlp_gate")
    assert neurons("suspects=L12N3,345:1.5") == watch_neurons("suspects", 12, [3, 345], threshold=1.5)
    assert neuron_set("toxic:p99.9") == watch_neuron_set("toxic", "toxic", threshold="p99.9")
    assert neuron_set("toxic:-.5") == watch_neuron_set("toxic", "toxic", threshold=-0.5)
    assert direction("joy=joyful@14-15,20:2") == watch_direction("joy", "joyful", layers=[14, 15, 20], threshold=2)
    assert direction("joyful") == watch_direction("joyful", "joyful")
    assert head_list("L18H6:.8") == watch_heads("L18H6", [(18, 6)], threshold=0.8)
    assert head_list("L18H6,L17H3") == watch_heads("heads", [(18, 6), (17, 3)])
    assert head_list("copying=retrieval") == watch_heads("copying", "retrieval")
    assert features("sae#345") == watch_autoencoder("sae#345", "sae", 345)
    assert features("sae#3,7") == watch_autoencoder("sae", "sae", [3, 7])
    assert features("topics=sae#3,7:2.5") == watch_autoencoder("topics", "sae", [3, 7], threshold=2.5)


def test_an_id_is_not_taken_for_a_threshold_and_names_by_its_first_digits() -> None:
    ref = "sha256:" + "12" * 32
    assert neuron_set(ref) == watch_neuron_set("121212121212", ref)
    assert direction(f"{ref}@3:-1") == watch_direction("121212121212", ref, layers=[3], threshold=-1)


@pytest.mark.parametrize(
    ("read", "text"),
    [
        (neurons, "L12"),
        (neurons, "L12N3:high"),
        (neurons, "L12N3@attn_z"),
        (neurons, "L12N3:p100"),
        (neurons, "a=b=L12N3"),
        (neuron_set, "=toxic"),
        (features, "sae"),
        (features, "sae#x"),
        (features, "sae#3:high"),
        (direction, "joyful@all"),
        (direction, "joyful@5-3"),
        (head_list, "L18H6,retrieval"),
    ],
)
def test_what_is_no_item_is_refused(read: Callable[[str], pb.WatchItem], text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError):
        read(text)


def test_items_come_from_a_file_too(tmp_path: Path) -> None:
    file = tmp_path / "items.json"
    file.write_text(json.dumps({"items": [{"name": "joy", "neurons": {"layer": 1, "neurons": [2]}}]}))
    assert items_file(str(file)) == [watch_neurons("joy", 1, [2])]
    file.write_text('{"things": []}')
    with pytest.raises(argparse.ArgumentTypeError, match="things"):
        items_file(str(file))


@pytest.mark.usefixtures("client")
def test_create_sends_all_items_under_the_name(server: Monitoring, capsys: pytest.CaptureFixture[str]) -> None:
    items = ["--neurons", "L1N2", "--direction", "joy=joyful@16:2", "--heads", "retrieval", "--neurons", "L3N4"]
    assert main(["watch", "create", "safety", *items, "--top", "5", "--include-sink"]) == 0
    assert server.request == pb.CreateWatchRequest(
        items=[
            watch_neurons("L1N2", 1, [2]),
            JOY,
            watch_heads("retrieval", "retrieval", top_k=5, include_sink=True),
            neurons("L3N4"),
        ],
        tags=["safety"],
    )
    printed = capsys.readouterr()
    assert printed.out.splitlines() == ["joy", "suspects/L12N3"]
    assert f"safety = {WATCH.id}" in printed.err


@pytest.mark.usefixtures("client")
def test_a_watch_of_nothing_is_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["watch", "create", "safety"]) == 2
    assert "nothing to watch" in capsys.readouterr().err


@pytest.mark.usefixtures("client")
def test_the_best_heads_of_no_head_set_are_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["watch", "create", "safety", "--heads", "L1H2", "--top", "3"]) == 2
    assert "--top keeps the best heads of a head set, and none is watched" in capsys.readouterr().err


@pytest.mark.usefixtures("client")
def test_start_sends_what_was_given(server: Monitoring) -> None:
    options = ["--sampling-rate", ".25", "--phases", "prompt", "generated", "--buckets", "-1", "1", "--reference", "r"]
    options += ["--calibration-tokens", "99", "--export-items"]
    assert main(["watch", "start", "safety", "live", "--window-tokens", "64", *options]) == 0
    assert server.request == pb.StartWatchRequest(
        watch="safety",
        name="live",
        sampling_rate=0.25,
        phases=[program.PHASE_PROMPT, program.PHASE_GENERATED],
        window_tokens=64,
        buckets=[-1, 1],
        reference="r",
        calibration_tokens=99,
        export_items=True,
    )


@pytest.mark.usefixtures("client")
def test_tables_are_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["watch", "list"]) == 0
    printed = capsys.readouterr()
    assert "safety  2" in printed.out
    assert "1 of 2 servers" in printed.out
    assert "safety does not run on there-2: 16 watches are running" in printed.err
    assert "1 of 16 watches, 2 of 4096 items" in printed.err
    assert main(["watch", "stats", "safety"]) == 0
    printed = capsys.readouterr()
    header, joy, suspect = printed.out.splitlines()
    columns = "item  tokens  left out  threshold  fired  mean  deviation  min  q0.5  max  drift  by chance"
    assert header.split() == columns.split()
    assert joy.split() == ["joy", "100", "0", "1.5", "25.0%", "0.5", "1.5", "-2", "0.25", "3", "0.750", "0.250"]
    assert len(suspect.split()) == 10
    assert suspect.split()[:3] == ["suspects/L12N3", "100", "3"]
    assert "tokens left out (attention sinks" in printed.err
    assert "direction: 1 items, mean 0.5, -2 to 3" in printed.err
    assert "first tokens: 100 of 1024" in printed.err
    assert "7 first tokens of sequences" in printed.err
    assert "mean 0.750, of which 0.500 beyond chance; largest 0.750, of which 0.375 beyond chance" in printed.err
    assert "2 values were not finite" in printed.err
    assert main(["watch", "stop", "safety"]) == 0
    assert "100 tokens" in capsys.readouterr().err


@pytest.mark.usefixtures("client")
def test_follow_prints_a_line_for_each_activation(server: Monitoring, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["watch", "follow", "safety", "--item", "joy", "--threshold", "0", "--max-events", "2"]) == 0
    assert server.request == pb.WatchActivationsRequest(name="safety", items=["joy"], threshold=0, max_events=2)
    printed = capsys.readouterr()
    assert [line.split()[-2:] for line in printed.out.splitlines()] == [["'", "day'"]] * 2
    assert "3 left out" in printed.err
    assert main(["watch", "follow", "safety", "--json"]) == 0
    activations = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(each["sequence"], each["token"]) for each in activations] == [(1, " day"), (2, " day")]


def test_commands_of_the_guide_are_as_the_command_line_takes_them() -> None:
    guide = (Path(__file__).parents[2] / "docs/user/monitoring.md").read_text()
    lines = [shlex.split(line, comments=True) for line in guide.splitlines() if line.startswith("patchclamp watch ")]
    assert {line[2] for line in lines} == {"create", "start", "stats", "follow", "reference", "list", "stop"}
    for line in lines:
        build_parser().parse_args(line[1:])


@pytest.mark.usefixtures("client")
def test_a_reference_is_recorded_under_its_tag(server: Monitoring, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["watch", "reference", "safety", "normal", "--tokens", "64", "--use", "--json"]) == 0
    assert server.request == pb.RecordReferenceRequest(name="safety", tokens=64, tags=["normal"], use=True)
    assert json.loads(capsys.readouterr().out)["kind"] == "watch_reference"

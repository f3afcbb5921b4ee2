"""FindConceptCircuit through a real channel: a planted circuit is found, refusals by field path, cancellation, jobs."""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from live import LiveServer
from patience import PATIENCE_SECONDS
from planted_circuit import HEADS, NEURONS, TEXTS, save_planted_circuit
from statuses import failure

from patchclamp import Client, requests
from patchclamp.errors import PatchclampError
from patchclamp.programs import ablate_heads, add, set_neurons
from patchclamp.results import FoundConceptCircuit
from patchclamp.v1 import steering_pb2 as pb
from patchclamp.v1.steering_pb2_grpc import SteeringServiceStub
from patchclamp_server.model.load import load_model

OPTIONS: dict[str, Any] = {"layers": [1], "neurons": 2, "heads": 2, "random_sets": 5}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    directory: Path = tmp_path_factory.mktemp("planted")
    save_planted_circuit(directory)
    with LiveServer(load_model(str(directory)), tmp_path_factory.mktemp("artifacts")) as live:
        yield live


@pytest.fixture(scope="module")
def client(server: LiveServer) -> Iterator[Client]:
    with Client(server.address) as connected:
        yield connected


@pytest.fixture(scope="module")
def found(client: Client) -> FoundConceptCircuit:
    return client.find_concept_circuit(TEXTS, "joy", tags=["joy"], **OPTIONS).result()


def test_a_planted_circuit_is_recovered_exactly(found: FoundConceptCircuit) -> None:
    assert {(each.neuron.layer, each.neuron.neuron) for each in found.neurons.best} == NEURONS
    assert {(each.head.layer, each.head.head) for each in found.best_heads} == HEADS
    assert found.best_layer == 1
    assert [each.layer for each in found.layers] == [1]


def test_zeroing_it_takes_the_separation_and_random_sets_take_none(found: FoundConceptCircuit) -> None:
    assert found.separation > 0
    assert abs(found.both_zeroed.separation) < 0.05 * found.separation
    for part, zeroed in found.zeroed.items():
        assert len(zeroed.random_separations) == 5
        assert zeroed.separation < min(zeroed.random_separations), part
        assert zeroed.random_separation > 0.9 * found.separation
    assert not any("zeroing" in warning for warning in found.warnings)


def test_three_artifacts_are_stored_and_name_each_other(client: Client, found: FoundConceptCircuit) -> None:
    stored = {kind: client.get_artifact(f"joy-{kind}") for kind in ("vector", "neurons", "heads")}
    assert [each.kind for each in stored.values()] == ["vector", "neuron_set", "head_set"]
    assert [each.id for each in stored.values()] == [found.vector.id, found.neurons.artifact.id, found.heads.id]
    for kind in ("neurons", "heads"):
        assert stored[kind].provenance["parameters"]["vector"] == found.vector.id
        assert set(stored[kind].evidence["zeroed"]) == {kind, "both"}
    assert stored["vector"].evidence["heldout_scenarios"] == 2
    assert stored["vector"].provenance["target"] == "joy"


def test_what_is_found_can_be_served_at_once(client: Client, found: FoundConceptCircuit) -> None:
    edits = [
        add("joy-vector", layers=1),
        set_neurons("joy-neurons", 0.0),
        *(ablate_heads([each.head.head], layers=each.head.layer) for each in found.best_heads),
    ]
    receipt = client.generate("tea j .", program=edits, max_tokens=1).result().receipt
    assert all(edit.rows > 0 for edit in receipt.edits)


def test_a_taken_tag_is_refused_before_the_work(client: Client, found: FoundConceptCircuit) -> None:
    with pytest.raises(PatchclampError, match=r"ALREADY_EXISTS: .*the tag 'joy-vector' names"):
        client.find_concept_circuit(TEXTS, "joy", tags=["joy"], **OPTIONS).result()
    again = client.find_concept_circuit(TEXTS, "joy", tags=["joy"], replace_tags=True, seed=1, **OPTIONS).result()
    assert again.neurons.artifact.replaced_tags == {"joy-neurons": found.neurons.artifact.id}


def test_it_can_be_a_job(client: Client) -> None:
    job = client.start_job(requests.find_concept_circuit(TEXTS, "joy", **OPTIONS))
    result = client.follow_job(job.id).result()
    assert isinstance(result, FoundConceptCircuit)
    assert {(each.head.layer, each.head.head) for each in result.best_heads} == HEADS


def scenario(*values: tuple[str, list[str]]) -> dict[str, Any]:
    return {"values": [{"label": v, "prompts": [{"text": text} for text in texts]} for v, texts in values]}


GOOD = [scenario(("joy", [f"{i} j ."]), ("fear", [f"{i} f ."])) for i in range(4)]


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"scenarios": GOOD[:2]}, "scenarios"),
        ({"scenarios": [*GOOD, scenario(("joy", ["j"]))]}, "scenarios[4].values"),
        ({"scenarios": [*GOOD, scenario(("joy", ["j"]), ("calm", ["c"]))]}, "scenarios[4].values"),
        ({"scenarios": [*GOOD, scenario(("joy", ["j"]), ("joy", ["c"]))]}, "scenarios[4].values[1].label"),
        ({"scenarios": [*GOOD, scenario(("joy", ["j"]), ("fear", []))]}, "scenarios[4].values[1].prompts"),
        ({"scenarios": [*GOOD, scenario(("joy", ["j"]), ("fear", [""]))]}, "scenarios[4].values[1].prompts[0].text"),
        (
            {"scenarios": [*GOOD, scenario(("joy", ["j" * 300]), ("fear", ["f"]))]},
            "scenarios[4].values[0].prompts[0].text",
        ),
        ({"scenarios": [scenario(("joy", ["j"] * 1000), ("fear", ["f"] * 1000))] * 3}, "scenarios"),
        ({"target": "calm"}, "target"),
        ({"target": ""}, "target"),
        ({"site": "SITE_MLP_OUT"}, "site"),
        ({"layers": [2]}, "layers[0]"),
        ({"layers": [1, 1]}, "layers[1]"),
        ({"site": "SITE_RESID_MID", "layers": [0]}, "layers[0]"),
        ({"site": "SITE_RESID_PRE", "layers": [0]}, "layers[0]"),
        ({"neurons": 129}, "neurons"),
        ({"heads": 9}, "heads"),
        ({"random_sets": 101}, "random_sets"),
        ({"holdout_fraction": 1.0}, "holdout_fraction"),
        ({"pooling": 9}, "pooling"),
        ({"tags": ["x" * 125]}, "tags[0]"),
        ({"tags": ["../x"]}, "tags[0]"),
    ],
)
def test_what_cannot_be_searched_is_refused_by_its_field(
    server: LiveServer, fields: dict[str, Any], field: str
) -> None:
    given = {"scenarios": GOOD, "target": "joy", "layers": [1], "random_sets": 1, **fields}
    with grpc.insecure_channel(server.address) as channel:
        stub = SteeringServiceStub(channel)
        with pytest.raises(grpc.RpcError) as error:
            list(stub.FindConceptCircuit(pb.FindConceptCircuitRequest(**given)))
    refused = failure(error.value)
    assert (refused.code, refused.fields) == (grpc.StatusCode.INVALID_ARGUMENT, [field])


async def test_cancelling_the_call_ends_what_the_engine_runs_for_it(server: LiveServer) -> None:
    given = {"scenarios": GOOD * 100, "target": "joy", "layers": [1], "neurons": 2, "heads": 1, "random_sets": 20}
    async with grpc.aio.insecure_channel(server.address) as channel:
        call = SteeringServiceStub(channel).FindConceptCircuit(pb.FindConceptCircuitRequest(**given))
        async for event in call:
            if event.progress.stage == "writes":
                break
        call.cancel()
        engine = server.server.engine
        for _ in range(int(PATIENCE_SECONDS * 20)):
            stats = engine.stats()
            if not stats.running and not stats.waiting:
                return
            await asyncio.sleep(0.05)
    pytest.fail("sequences of the job are still there")

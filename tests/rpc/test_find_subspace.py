"""FindSubspace through a real channel: a planted circle and a planted variable, and the programs that they become."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from live import LiveServer
from planted_subspace import CAPITALS, DIGITS, LETTERS, MINUS, PLUS, WIDTH, save_planted_subspace
from safetensors.torch import save
from statuses import failure

from patchclamp import Client
from patchclamp.programs import last, patch, rotate_in_plane
from patchclamp.subspaces import circular_plane, interchange
from patchclamp.v1 import steering_pb2 as pb
from patchclamp.v1.steering_pb2_grpc import SteeringServiceStub
from patchclamp_server.model.load import load_model

VALUES = {letter: [f"x{digit}", f"yy{digit}"] for digit, letter in zip(DIGITS, LETTERS, strict=True)}
PAIRS = [
    (base, other, "+" if other in PLUS else "-")
    for i, base in enumerate(CAPITALS)
    for other in (CAPITALS[(i + 1) % 24], CAPITALS[(i + 6) % 24])
]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    directory: Path = tmp_path_factory.mktemp("planted")
    save_planted_subspace(directory)
    with LiveServer(load_model(str(directory)), tmp_path_factory.mktemp("artifacts")) as live:
        yield live


@pytest.fixture(scope="module")
def client(server: LiveServer) -> Iterator[Client]:
    with Client(server.address) as connected:
        yield connected


def said(client: Client, prompt: str, *program: Any) -> str:
    text: str = client.generate(prompt, program=list(program), max_tokens=1).result().text
    return text


def test_a_planted_circle_is_found_and_its_rotation_leads_each_value_on(client: Client) -> None:
    found = client.find_subspace(circular_plane(VALUES), layers=[0, 1], tags=["digits"]).result()
    assert [each.layer for each in found.layers] == [0, 1]
    for each in found.layers:
        assert each.circularity > 0.98
        assert each.shuffled_circularity < each.circularity - 0.1
        assert len(each.angles) == len(DIGITS)
    assert (found.artifact.kind, found.artifact.site, found.artifact.layers) == ("subspace", "resid_post", (0, 1))
    assert found.artifact.provenance["method"] == "circular_plane"
    assert found.artifact.evidence["best_layer"] == found.best_layer
    for k in (1, 3, 6):
        turn = rotate_in_plane("digits", 2 * math.pi * k / 7, layers=1, scope=last(1))
        assert [said(client, f"x{digit}", turn) for digit in DIGITS] == list(LETTERS[k:] + LETTERS[:k])
    assert [said(client, f"x{digit}") for digit in DIGITS] == list(LETTERS)


def test_progress_counts_prompts_and_layers(client: Client) -> None:
    told: list[Any] = []
    client.find_subspace(circular_plane(VALUES), layers=[1]).result(told.append)
    stages = [(event.stage, event.done, event.total) for event in told if hasattr(event, "stage")]
    assert stages == [*(("activations", i + 1, 14) for i in range(14)), ("planes", 1, 1)]


def test_a_variable_is_found_and_exchanging_it_beats_a_random_subspace(client: Client) -> None:
    method = interchange(PAIRS, rank=1, max_steps=80, learning_rate=0.1)
    found = client.find_subspace(method, layers=[1], site="resid_pre", tags=["sign"]).result()
    [evidence] = found.layers
    assert evidence.full_accuracy == 1.0
    assert evidence.accuracy > 0.9
    assert evidence.accuracy > evidence.random_accuracy
    assert 0 < evidence.steps <= 80
    assert found.artifact.provenance["parameters"]["rank"] == 1
    assert (found.artifact.site, found.warnings) == ("resid_pre", ())


def test_pairs_that_keep_their_answers_are_judged_against_what_the_source_says(client: Client) -> None:
    """Of as many rows as the state has nothing of the base is left, and each kept pair says what its source says."""
    kept = [(digit, other, letter) for digit, other, letter in zip(DIGITS, DIGITS[1:], LETTERS, strict=False)]
    method = interchange(PAIRS, kept, rank=32, max_steps=1)
    [evidence] = client.find_subspace(method, layers=[1]).result().layers
    assert (evidence.accuracy, evidence.full_accuracy, evidence.kept_accuracy) == (1.0, 1.0, 0.0)


def test_a_patch_in_the_subspace_of_a_variable_exchanges_it_and_one_beside_it_does_not(client: Client) -> None:
    for tag, dimension in (("capital-sign", 0), ("noise", 5)):
        file = save({"layer.0.rotation": torch.eye(WIDTH)[dimension : dimension + 1].clone()})
        client.put_artifact(file, kind="subspace", site="resid_post", tags=[tag])
    client.read_activations(list(CAPITALS), "resid_post", layers=[0], store=True, tags=["runs"]).result()
    for i, base in enumerate(CAPITALS[:6]):
        exchanged, kept = (
            patch("runs", text=i + 1, positions=[-1], subspace=tag, layers=0) for tag in ("capital-sign", "noise")
        )
        own, other = "+-" if base in PLUS else "-+"
        assert [said(client, base, *program) for program in ([], [exchanged], [kept])] == [own, other, own]


def test_a_scope_exchanges_other_tokens(client: Client) -> None:
    """Of two tokens in scope the last is one, and the model answers by it."""
    method = interchange([(f"Q{a}", f"R{b}", "+") for a, b in zip(MINUS, PLUS, strict=True)], max_steps=2)
    [evidence] = client.find_subspace(method, layers=[0], scope=last(2)).result().layers
    assert evidence.full_accuracy == 1.0


VALUE = [{"value": str(i), "prompts": [{"text": f"x{i}"}]} for i in range(5)]
PAIR = {"base": {"text": "A"}, "source": {"text": "B"}, "answer": "-"}


def plane(*values: Any, **fields: Any) -> dict[str, Any]:
    return {"circular_plane": {"values": values or VALUE, **fields}}


def pairs(*pairs: Any, **fields: Any) -> dict[str, Any]:
    return {"distributed_alignment": {"pairs": pairs or [PAIR, PAIR], **fields}}


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({}, "method"),
        (plane(*VALUE[:3]), "circular_plane.values"),
        (plane(*VALUE, {"value": "9"}), "circular_plane.values[5].prompts"),
        (plane(*VALUE, VALUE[0]), "circular_plane.values[5]"),
        (plane(components=1), "circular_plane.components"),
        ({**plane(), "layers": [2]}, "layers[0]"),
        ({**plane(), "scope": {"include": [{"positions": {"start": 7}}]}}, "circular_plane.values[0].prompts[0]"),
        (pairs(PAIR), "distributed_alignment.pairs"),
        (pairs(kept=[PAIR]), "distributed_alignment.kept"),
        (pairs(rank=33), "distributed_alignment.rank"),
        (pairs(PAIR, {**PAIR, "answer": ""}), "distributed_alignment.pairs[1].answer"),
        (pairs(training={"learning_rate": 0.0}), "distributed_alignment.training.learning_rate"),
        (
            {**pairs(PAIR, {**PAIR, "source": {"text": "BC"}}), "scope": {"include": [{"phase": "PHASE_PROMPT"}]}},
            "distributed_alignment.pairs[1].source",
        ),
        (pairs(holdout_fraction=1.0), "distributed_alignment.holdout_fraction"),
    ],
)
def test_what_cannot_be_searched_is_refused_by_its_field(
    server: LiveServer, fields: dict[str, Any], field: str
) -> None:
    with grpc.insecure_channel(server.address) as channel:
        stub = SteeringServiceStub(channel)
        with pytest.raises(grpc.RpcError) as error:
            list(stub.FindSubspace(pb.FindSubspaceRequest(**fields)))
    refused = failure(error.value)
    assert (refused.code, refused.fields) == (grpc.StatusCode.INVALID_ARGUMENT, [field])

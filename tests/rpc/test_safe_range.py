"""Strengths of a calibrated vector are compared with the range that is in its evidence card."""

from collections.abc import Iterator
from typing import Any

import grpc
import pytest
import torch
from live import LiveServer
from test_generation_service import generate
from test_request_warnings import responses_of, told
from test_session import Client

from patchclamp.v1 import generation_pb2 as pb
from patchclamp.v1 import program_pb2 as program
from patchclamp.v1.generation_pb2_grpc import GenerationServiceStub
from patchclamp_server.artifacts.store import ArtifactStore
from patchclamp_server.artifacts.types import ArtifactKind, Tags
from patchclamp_server.model.sites import Site

BEYOND = program.REQUEST_WARNING_CODE_BEYOND_SAFE_RANGE
# So short that no edit is strong.
LENGTHS = {0: 0.005, 1: 0.02}
CARDS = {
    "add": {"safe": [{"layer": 0, "low": -0.5, "high": 1.0}, {"layer": 1, "low": -0.25, "high": 0.5}]},
    "rotate_towards": {"safe": [{"layer": 1, "low": 0.0, "high": 0.4}]},
    "replace": {"safe": [{"layer": 1, "low": 0.0, "high": 0.1}]},
}


@pytest.fixture(scope="module", autouse=True)
def calibrated(live_server: LiveServer) -> Iterator[None]:
    info = live_server.model.info
    store = ArtifactStore(live_server.server.config.artifacts_url)
    ones = torch.ones(info.d_model) / info.d_model**0.5
    fields: dict[str, Any] = {"model_fingerprint": info.fingerprint, "site": Site.RESID_POST}
    tensors = {f"layer.{layer}": length * ones for layer, length in LENGTHS.items()}
    tags = Tags(("calibrated",), replace=True)
    made = store.put(ArtifactKind.VECTOR, tensors, evidence={"calibration": CARDS}, tags=tags, **fields)
    yield
    store.delete(made.id)


def edit(strength: float = 1.0, kind: str = "add", **fields: Any) -> program.Edit:
    vector = program.Vector(artifact="calibrated", unit=fields.pop("unit", False))
    if "artifact_layer" in fields:
        vector.artifact_layer = fields.pop("artifact_layer")
    own = {"radians": fields.pop("radians")} if "radians" in fields else {}
    where = {"site": program.SITE_RESID_POST, "layers": [1], **fields}
    return program.Edit(strength=strength, **{kind: {"vector": vector, **own}}, **where)


def warnings_of(channel: grpc.Channel, *edits: program.Edit) -> list[tuple[int, str]]:
    finished = generate(channel, program=program.Program(edits=edits))[2]
    return [each for each in told(finished.receipt) if each[0] == BEYOND]


@pytest.mark.parametrize(
    "inside",
    [
        edit(0.5),
        edit(-0.25),
        edit(0.75, layers=[0]),
        edit(0.5, layers=[0, 1]),
        # Of length 1 the vector moves 50 times as far.
        edit(0.01, unit=True),
        edit(0.5, preserve_norm=True),
        edit(1.0, "rotate_towards", radians=0.4),
        edit(0.5, "rotate_towards", radians=0.8),
        edit(0.1, "replace"),
    ],
)
def test_a_strength_within_the_range_is_not_warned_of(channel: grpc.Channel, inside: program.Edit):
    assert warnings_of(channel, inside) == []


@pytest.mark.parametrize(
    "outside",
    [
        edit(0.51),
        edit(-0.26),
        edit(0.75, layers=[0, 1]),
        edit(0.0101, unit=True),
        edit(0.51, preserve_norm=True),
        edit(1.0, "rotate_towards", radians=0.41),
        edit(0.5, "rotate_towards", radians=0.9),
        edit(0.11, "replace"),
    ],
)
def test_a_strength_beyond_it_is(channel: grpc.Channel, outside: program.Edit):
    assert warnings_of(channel, edit(0.1), outside) == [(BEYOND, "program.edits[1]")]


@pytest.mark.parametrize(
    "other",
    [
        edit(0.9, site=program.SITE_RESID_PRE),
        edit(0.9, artifact_layer=0),
        edit(0.9, "rotate_towards", layers=[0], radians=3.0),
        edit(0.9, "replace", unit=True),
        edit(0.9, "project_out"),
    ],
)
def test_what_was_not_calibrated_is_not_warned_of(channel: grpc.Channel, other: program.Edit):
    assert warnings_of(channel, other) == []


def test_the_warning_comes_before_the_first_token_and_says_the_range(channel: grpc.Channel):
    first, *rest = responses_of(channel, program=program.Program(edits=[edit(8.0, name="push")]))
    [warning] = [w for w in first.warnings if w.code == BEYOND]
    assert "'push'" in warning.message
    assert "from -0.25 to 0.5" in warning.message
    assert "or were not tried" in warning.message
    assert not any(response.warnings for response in rest)


def test_a_score_and_the_edited_side_of_a_comparison_are_warned(channel: grpc.Channel):
    stub = GenerationServiceStub(channel)
    strong = program.Program(edits=[edit(0.6)])
    score = stub.Score(pb.ScoreRequest(prompt=pb.Prompt(text="score"), text=" me", program=strong))
    assert told(score.receipt) == [(BEYOND, "program.edits[0]")]
    asked = pb.GenerateRequest(
        prompt=pb.Prompt(text="hello"), program=strong, stop=pb.StopConditions(max_tokens=2, ignore_eos=True)
    )
    warned = set()
    for response in stub.Compare(pb.CompareRequest(request=asked)):
        text = response.text
        if text.response.warnings:
            warned.add((text.side, "before"))
        if text.response.finished.receipt.warnings:
            warned.add((text.side, "receipt"))
    assert warned == {(pb.COMPARE_SIDE_EDITED, "before"), (pb.COMPARE_SIDE_EDITED, "receipt")}


def test_a_strength_that_a_session_sets_is_warned_of(channel: grpc.Channel):
    for strength, expected in ((0.4, []), (0.6, [(BEYOND, "program.edits[0]")])):
        session = Client(channel, program=program.Program(edits=[edit(0.1, name="push")]))
        session.send(advance=pb.Advance(tokens=2))
        session.tokens(2)
        session.send(set_strength=pb.SetStrength(edit="push", strength=strength))
        session.send(advance=pb.Advance(tokens=2))
        session.tokens(2)
        session.send(stop=pb.Stop())
        assert told(session.finished().receipt) == expected
        session.close()


@pytest.mark.parametrize("card", [[], {"add": 3}, {"add": {"safe": [{"layer": 1, "low": "x", "high": True}, 4]}}])
def test_a_card_that_says_something_else_warns_of_nothing(live_server: LiveServer, channel: grpc.Channel, card: Any):
    info = live_server.model.info
    store = ArtifactStore(live_server.server.config.artifacts_url)
    fields: dict[str, Any] = {"model_fingerprint": info.fingerprint, "site": Site.RESID_POST}
    made = store.put(
        ArtifactKind.VECTOR, {"layer.1": torch.ones(info.d_model)}, evidence={"calibration": card}, **fields
    )
    vector = program.Vector(artifact=made.id)
    adding = program.Edit(site=program.SITE_RESID_POST, layers=[1], strength=2.0, add={"vector": vector})
    assert warnings_of(channel, adding) == []
    store.delete(made.id)

"""A condition takes the midpoint that its vector's extraction measured, or is refused where there is none."""

from pathlib import Path
from typing import Any

import pytest
import torch
from engine_runs import loaded
from steering_fixtures import Live
from test_steering_service import events_of, extraction

from patchclamp.programs import Program as ClientProgram
from patchclamp.programs import abort_when, add, vector, when
from patchclamp.v1 import generation_pb2, program_pb2
from patchclamp.v1.generation_pb2_grpc import GenerationServiceStub
from patchclamp_server.artifacts.store import ArtifactStore
from patchclamp_server.artifacts.tensor_file import TensorFile
from patchclamp_server.artifacts.types import Artifact, ArtifactInfo, ArtifactKind, Tags
from patchclamp_server.errors import FailedPrecondition, InvalidArgument, RequestError
from patchclamp_server.interventions.bind import bind
from patchclamp_server.interventions.program import Program
from patchclamp_server.model.sites import Site
from patchclamp_server.rpc.codecs.program import decode_program

INFO = loaded("llama").info
CARD: dict[str, Any] = {"layers": [{"layer": 0, "midpoint": -3.5}, {"layer": 1, "midpoint": 7.25}]}
WHERE = "program.abort_when[0].condition.stored_threshold"


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(tmp_path)


def put(
    store: ArtifactStore, evidence: dict[str, Any], tags: Tags | tuple[str, ...] = ("v",), sign: float = 1.0
) -> str:
    tensors = {f"layer.{layer}": sign * torch.arange(1.0, 1.0 + INFO.d_model) for layer in (0, 1)}
    fields: dict[str, Any] = {"model_fingerprint": INFO.fingerprint, "site": Site.RESID_POST, "evidence": evidence}
    return store.put(ArtifactKind.VECTOR, tensors, tags=tags, **fields).id


def decoded(*conditions: program_pb2.AbortCondition) -> Program:
    return decode_program(ClientProgram(abort_when=conditions).message())


def threshold_of(store: ArtifactStore, condition: program_pb2.AbortCondition) -> float:
    return bind(decoded(condition), INFO, store).aborts[0].condition.threshold


def refused(store: ArtifactStore, condition: program_pb2.AbortCondition, kind: type[RequestError]) -> str:
    with pytest.raises(kind) as error:
        bind(decoded(condition), INFO, store)
    return error.value.field


@pytest.mark.parametrize(("layer", "midpoint"), [(0, -3.5), (1, 7.25)])
def test_the_midpoint_is_that_of_the_layer(store: ArtifactStore, layer: int, midpoint: float) -> None:
    put(store, CARD)
    assert threshold_of(store, abort_when("v", layer=layer, above="midpoint")) == midpoint
    assert threshold_of(store, abort_when("v", layer=layer, below="midpoint")) == midpoint


class MovingTag:
    """A store whose tag "v" is another one's as soon as it has been asked for."""

    def __init__(self, store: ArtifactStore) -> None:
        self._store = store

    def get(self, ref: str) -> Artifact:
        artifact = self._store.get(ref)
        put(self._store, {"layers": [{"layer": 0, "midpoint": 1.0}]}, tags=Tags(("v",), replace=True), sign=-1.0)
        return artifact

    def open(self, ref: str) -> tuple[ArtifactInfo, TensorFile]:
        return self._store.open(ref)


def test_the_midpoint_and_the_direction_are_those_of_one_artifact_though_its_tag_moves(store: ArtifactStore) -> None:
    put(store, CARD)
    condition = bind(decoded(abort_when("v", layer=0, above="midpoint")), INFO, MovingTag(store)).aborts[0].condition
    assert (condition.threshold, bool(condition.unit.sum() > 0)) == (-3.5, True)


def test_a_program_of_another_midpoint_has_another_fingerprint(store: ArtifactStore) -> None:
    ids = put(store, CARD), put(store, {"layers": [{"layer": 0, "midpoint": 1.0}]}, tags=())
    programs = [bind(decoded(abort_when(ref, layer=0, above="midpoint")), INFO, store) for ref in ids]
    assert programs[0].fingerprint != programs[1].fingerprint


@pytest.mark.parametrize(
    "evidence",
    [
        {},
        {"layers": "none"},
        {"layers": [3]},
        {"layers": [{"layer": 1, "midpoint": 2.0}]},
        {"layers": [{"layer": 0}]},
        {"layers": [{"layer": 0, "midpoint": "high"}]},
        {"layers": [{"layer": 0, "midpoint": True}]},
    ],
)
def test_a_vector_without_a_midpoint_for_the_layer_is_refused(store: ArtifactStore, evidence: dict[str, Any]) -> None:
    put(store, evidence)
    assert refused(store, abort_when("v", layer=0, above="midpoint"), FailedPrecondition) == WHERE


def test_a_midpoint_of_another_site_or_layer_is_refused(store: ArtifactStore) -> None:
    put(store, CARD)
    elsewhere = abort_when("v", layer=0, site="resid_pre", above="midpoint")
    assert refused(store, elsewhere, FailedPrecondition) == WHERE
    row = program_pb2.Vector(artifact="v", artifact_layer=1)
    assert refused(store, abort_when(row, layer=0, above="midpoint"), FailedPrecondition) == WHERE


def test_numbers_carry_no_midpoint(store: ArtifactStore) -> None:
    inline = abort_when([1.0] * INFO.d_model, layer=0, above="midpoint")
    assert refused(store, inline, InvalidArgument) == WHERE


def test_a_midpoint_is_no_cosine(store: ArtifactStore) -> None:
    put(store, CARD)
    field = refused(store, abort_when("v", layer=0, above="midpoint", cosine=True), InvalidArgument)
    assert field == "program.abort_when[0].condition.cosine"


def test_a_threshold_beside_a_stored_one_is_refused() -> None:
    both = abort_when("v", layer=0, above="midpoint")
    both.condition.threshold = 1.0
    with pytest.raises(InvalidArgument, match="expected one of threshold, stored_threshold") as error:
        decoded(both)
    assert error.value.field == WHERE


async def test_an_extracted_vector_gates_at_its_midpoint(live: Live) -> None:
    result = (await events_of(live, extraction(layers=[0], tags=["bang"])))[-1].result
    midpoint = result.layers[0].midpoint
    stub = GenerationServiceStub(live.channel)

    async def finished(text: str, program: ClientProgram) -> generation_pb2.Finished:
        prompt = generation_pb2.Prompt(text=text)
        stop = generation_pb2.StopConditions(max_tokens=0)
        asked = generation_pb2.GenerateRequest(prompt=prompt, program=program.message(), stop=stop)
        return [r async for r in stub.Generate(asked)][-1].finished

    # The vector is that of the last token, where positives end with "!" and negatives with "?".
    last = program_pb2.TokenSelector(last_k=1)
    gate = when("bang", layer=0, above="midpoint")
    gate.condition.scope.include.append(last)
    program = ClientProgram([add(vector("bang", layer=0), layers=[1], gate=gate, strength=1e-3)])
    for text, firings in (("the lamp!", 1), ("the lamp?", 0)):
        [receipt] = (await finished(text, program)).receipt.edits
        assert receipt.gate_firings == firings
        assert receipt.gate_threshold == pytest.approx(midpoint)

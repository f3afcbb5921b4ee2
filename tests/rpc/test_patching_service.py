"""PatchActivations and the edit `patch` through a real channel, on a tiny random llama of two layers; refusals."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from live import LiveServer
from statuses import Failure, failure

from patchclamp.v1 import activation_pb2 as pb
from patchclamp.v1 import generation_pb2, program_pb2
from patchclamp.v1.activation_pb2_grpc import ActivationServiceStub
from patchclamp.v1.generation_pb2_grpc import GenerationServiceStub
from patchclamp_server.artifacts.store import ArtifactStore
from patchclamp_server.artifacts.types import ArtifactKind
from patchclamp_server.model.load import load_model

CLEAN, CORRUPT = "The key is red", "The key is new"


@pytest.fixture(scope="module")
def server(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    with LiveServer(load_model(str(tiny_llama_dir)), tmp_path_factory.mktemp("artifacts")) as server:
        yield server


@pytest.fixture(scope="module")
def channel(server: LiveServer) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(server.address) as channel:
        yield channel


@pytest.fixture(scope="module")
def stub(channel: grpc.Channel) -> ActivationServiceStub:
    return ActivationServiceStub(channel)


def text(words: str) -> generation_pb2.Prompt:
    return generation_pb2.Prompt(text=words)


def pair(**fields: Any) -> pb.PatchPair:
    given = {"clean": text(CLEAN), "corrupt": text(CORRUPT), "answer": "a", "other_answer": "b"} | fields
    return pb.PatchPair(**{name: value for name, value in given.items() if value is not None})


def request(**fields: Any) -> pb.PatchActivationsRequest:
    return pb.PatchActivationsRequest(**{"pairs": [pair()], **fields})


def position(name: str, start: int, end: int | None = None) -> pb.PatchPositions:
    return pb.PatchPositions(name=name, positions=program_pb2.PositionRange(start=start, end=end))


def test_a_grid_comes_cell_by_cell_and_then_what_it_is_of(stub: ActivationServiceStub) -> None:
    asked = request(sites=["SITE_RESID_PRE", "SITE_ATTN_Z"], positions=[position("all", 0)], by_head=True)
    *told, last = stub.PatchActivations(asked)
    progress = [event.progress for event in told if event.WhichOneof("event") == "progress"]
    cells = [event.cell for event in told if event.WhichOneof("event") == "cell"]
    assert len(cells) == 2 + 2 * (1 + 4)
    assert cells[0].effect == cells[0].low == cells[0].high == 1.0
    assert cells[0].metric == last.result.source_metric
    assert [(c.layer, c.head if c.HasField("head") else None) for c in cells[2:7]] == [
        (0, head) for head in (None, 0, 1, 2, 3)
    ]
    assert (list(last.result.layers), list(last.result.positions)) == ([0, 1], ["all"])
    assert progress[-1].done == progress[-1].total == last.result.requests


def test_columns_are_single_positions_from_the_end_where_none_are_named(stub: ActivationServiceStub) -> None:
    *_, last = stub.PatchActivations(request(pairs=[pair(), pair(clean=text("A key"), corrupt=text("No key"))]))
    names = list(last.result.positions)
    assert names == [str(p) for p in range(-len(names), 0)]
    assert [*last.result.sites] == [program_pb2.SITE_RESID_PRE, program_pb2.SITE_ATTN_OUT, program_pb2.SITE_MLP_OUT]


def refusal(stub: ActivationServiceStub, asked: pb.PatchActivationsRequest) -> Failure:
    with pytest.raises(grpc.RpcError) as refused:
        list(stub.PatchActivations(asked))
    return failure(refused.value)


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"pairs": []}, "pairs"),
        ({"pairs": [pair()] * 1001}, "pairs"),
        ({"pairs": [pair(clean=None)]}, "pairs[0].clean"),
        ({"pairs": [pair(), pair(corrupt=generation_pb2.Prompt())]}, "pairs[1].corrupt.form"),
        ({"pairs": [pair(corrupt=text(""))]}, "pairs[0].corrupt.text"),
        ({"pairs": [pair(corrupt=text(CLEAN))]}, "pairs[0].corrupt"),
        ({"pairs": [pair(answer="")]}, "pairs[0].answer"),
        ({"pairs": [pair(other_answer="")]}, "pairs[0].other_answer"),
        ({"pairs": [pair(other_answer="a")]}, "pairs[0].other_answer"),
        ({"pairs": [pair(answer="a" * 300)]}, "pairs[0]"),
        ({"direction": 7}, "direction"),
        ({"metric": 9}, "metric"),
        ({"sites": ["SITE_UNSPECIFIED"]}, "sites[0]"),
        ({"sites": ["SITE_MLP_OUT", "SITE_MLP_OUT"]}, "sites[1]"),
        ({"layers": [0, 2]}, "layers[1]"),
        ({"layer_window": 3}, "layer_window"),
        ({"by_head": True}, "by_head"),
        ({"positions": [position("", 0)]}, "positions[0].name"),
        ({"positions": [position("a", 0), position("a", 1)]}, "positions[1].name"),
        ({"positions": [pb.PatchPositions(name="a")]}, "positions[0].positions"),
        ({"positions": [position("a", -900, -800)]}, "positions[0].positions"),
        ({"positions": [position("a", 200)]}, "positions[0].positions"),
        ({"positions": [position("a", 3, 2)]}, "positions[0].positions"),
        ({"pairs": [pair(corrupt=text(CORRUPT + "er"))], "positions": [position("a", 0)]}, "positions[0].positions"),
    ],
)
def test_what_cannot_be_patched_is_refused_by_its_field(
    stub: ActivationServiceStub, fields: dict[str, Any], field: str
) -> None:
    refused = refusal(stub, request(**fields))
    assert (refused.code, refused.fields) == (grpc.StatusCode.INVALID_ARGUMENT, [field])


def test_another_model_than_the_one_that_is_served_is_not_found(stub: ActivationServiceStub) -> None:
    assert refusal(stub, request(model="another")).code is grpc.StatusCode.NOT_FOUND


@pytest.fixture(scope="module")
def stored(server: LiveServer) -> dict[str, torch.Tensor]:
    """Rows of four tokens of one text at the end of both blocks, stored as "run"."""
    fourth = torch.arange(4)
    places = {f"resid_post.{layer}": torch.randn(4, 32) for layer in (0, 1)}
    tensors = {"text": 0 * fourth, "position": fourth, "token": fourth, "length": 0 * fourth + 4, **places}
    store = ArtifactStore(server.server.config.artifacts_url)
    fingerprint = server.model.info.fingerprint
    store.put(ArtifactKind.ACTIVATIONS, tensors, model_fingerprint=fingerprint, tags=("run",))
    return tensors


def generate(channel: grpc.Channel, *positions: tuple[int, int]) -> generation_pb2.Finished:
    pairs = [program_pb2.PatchPosition(position=p, source=s) for p, s in positions]
    edit = program_pb2.Edit(
        site="SITE_RESID_POST", all_layers=True, patch=program_pb2.Patch(activations="run", positions=pairs)
    )
    asked = generation_pb2.GenerateRequest(
        prompt=text(CLEAN),
        program=program_pb2.Program(edits=[edit]),
        stop=generation_pb2.StopConditions(max_tokens=2, ignore_eos=True),
    )
    return [*GenerationServiceStub(channel).Generate(asked)][-1].finished


def test_a_stored_run_is_put_into_a_generation_and_the_receipt_counts_it(
    channel: grpc.Channel, stored: dict[str, torch.Tensor]
) -> None:
    finished = generate(channel, (-1, -1), (0, 2))
    assert [edit.rows + edit.rows_from_cache for edit in finished.receipt.edits] == [4]
    everything = generate(channel)
    assert [edit.rows + edit.rows_from_cache for edit in everything.receipt.edits] == [8]


def test_a_position_before_the_prompt_is_refused_where_the_prompt_is_known(
    channel: grpc.Channel, stored: dict[str, torch.Tensor]
) -> None:
    with pytest.raises(grpc.RpcError) as refused:
        generate(channel, (-90, 0))
    assert failure(refused.value).fields == ["program.edits[0].patch.positions[0].position"]

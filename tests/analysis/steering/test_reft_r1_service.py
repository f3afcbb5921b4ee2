"""ReFT-r1 through a real channel: progress, evidence, what serves the vector, refusals by field path, cancellation."""

import asyncio

import grpc
import pytest
import torch
from google.protobuf.json_format import MessageToDict
from steering_fixtures import Live
from test_extraction_inputs import demonstrations, request_for, texts, vector_of
from test_steering_service import WORDS, events_of, pair, refused

from patchclamp.v1 import generation_pb2, program_pb2
from patchclamp.v1 import steering_pb2 as pb
from patchclamp.v1.generation_pb2_grpc import GenerationServiceStub
from patchclamp_server.model.load import LoadedModel
from patchclamp_server.rpc.codecs import extraction_inputs
from patchclamp_server.text.prompt import PromptEncoder

JOY, SAD = "what a lovely day it is!", "oh no, not again today?"


def reft_r1(n: int = 8, training: pb.Training | None = None, **fields: object) -> pb.ExtractVectorsRequest:
    pairs = [pair(f"the {WORDS[i % 8]} {i} is lovely!", f"no {WORDS[i % 8]} {i} is left?") for i in range(n)]
    return request_for("reft_r1", pairs=pairs, training=training or pb.Training(max_steps=3, batch_size=4), **fields)


def labelled() -> pb.ExtractVectorsRequest:
    """All texts of a side are the same, so that it does not matter which are held out."""
    source = texts(joy=[JOY] * 4, sad=[SAD] * 5)
    return request_for("reft_r1", texts=source, target="joy", training=pb.Training(max_steps=4), layers=[1])


async def test_progress_counts_the_steps_of_each_layer_and_the_result_comes_last(live: Live) -> None:
    *progress, last = await events_of(live, reft_r1(tags=["reft"]))
    seen = [(e.progress.stage, e.progress.done, e.progress.total) for e in progress]
    steps = {layer: [(f"training of layer {layer}", step, 3) for step in (1, 2, 3)] for layer in (0, 1)}
    assert seen == [*steps[0], ("evidence", 1, 2), *steps[1], ("evidence", 2, 2)]
    result = last.result
    assert [layer.training.steps for layer in result.layers] == [3, 3]
    assert set(result.baselines) == {"difference_of_means"}
    assert "by their largest token" in result.measure
    provenance = MessageToDict(result.artifact.provenance)
    assert provenance["method"] == "reft_r1"
    assert provenance["parameters"]["batch_size"] == 4
    assert provenance["pairs"] == 8


async def test_the_evidence_is_the_same_in_the_answer_and_on_the_artifact(live: Live) -> None:
    result = (await events_of(live, reft_r1(n=16)))[-1].result
    card = MessageToDict(result.artifact.evidence)
    assert (card["training_positives"], card["heldout_negatives"]) == (12, 4)
    assert card["best_layer"] == result.best_layer
    for told, kept in zip(result.layers, card["layers"], strict=True):
        assert told.heldout_accuracy == pytest.approx(kept["heldout_accuracy"])
        for field, value in kept["training"].items():
            assert getattr(told.training, field) == pytest.approx(value), field
    best = next(layer for layer in result.layers if layer.layer == result.best_layer)
    assert result.baselines["difference_of_means"] == pytest.approx(best.training.difference_accuracy)


async def test_the_loss_of_the_evidence_is_what_the_edit_add_serves(live: Live, tiny_llama: LoadedModel) -> None:
    result = (await events_of(live, labelled()))[-1].result
    [layer] = result.layers
    assert float((await vector_of(live, result, 1)).norm()) == pytest.approx(layer.norm, rel=1e-5)
    first, *rest = PromptEncoder(tiny_llama.tokenizer, tiny_llama.info).encode_text(JOY).ids
    add = program_pb2.Edit(
        site=program_pb2.SITE_RESID_POST,
        layers=[1],
        strength=1.0,
        add={"vector": program_pb2.Vector(artifact=result.artifact.id)},
        # The first token is an attention sink, which training leaves alone.
        scope={"include": [{"positions": {"start": 1}}]},
    )
    for program, loss in ((None, layer.training.unedited_loss), ({"edits": [add]}, layer.training.loss)):
        request = generation_pb2.ScoreRequest(
            prompt={"tokens": {"ids": [first]}}, tokens={"ids": rest}, program=program
        )
        scored = await GenerationServiceStub(live.channel).Score(request)
        assert -sum(token.logprob for token in scored.tokens) / len(rest) == pytest.approx(loss, rel=1e-4)


async def test_what_tells_the_sides_apart_is_trained_from_texts_by_label(live: Live) -> None:
    result = (await events_of(live, labelled()))[-1].result
    [layer] = result.layers
    assert (layer.heldout_accuracy, layer.training.auroc) == (1.0, 1.0)
    provenance = MessageToDict(result.artifact.provenance)["texts"]
    assert (provenance["target"], provenance["positives"], provenance["negatives"]) == ("joy", 4, 5)


async def test_the_same_request_gives_the_same_vector(live: Live) -> None:
    first, second = [(await events_of(live, reft_r1(seed=3, layers=[1])))[-1].result for _ in range(2)]
    torch.testing.assert_close(await vector_of(live, first, 1), await vector_of(live, second, 1), rtol=1e-4, atol=1e-5)


async def test_training_ends_early_where_the_held_out_loss_no_longer_falls(live: Live) -> None:
    training = pb.Training(max_steps=5000, learning_rate=9.0, patience=1)
    result = (await events_of(live, reft_r1(training=training, layers=[1])))[-1].result
    assert 0 < result.layers[0].training.steps < 5000


REFUSED = {
    "too few pairs": (reft_r1(n=2), "pairs"),
    "no texts": (request_for("reft_r1"), "pairs"),
    "a positive of one token": (
        request_for("reft_r1", pairs=[pair("ab", "cd")] * 3 + [pair("a", "cd")]),
        "pairs[3].positive",
    ),
    "the same text on both sides": (request_for("reft_r1", pairs=[pair("abc", "abc")] * 4), "pairs"),
    "demonstrations": (request_for("reft_r1", demonstrations=demonstrations()), "demonstrations"),
    "a pooling": (reft_r1(pooling=pb.TOKEN_POOLING_MEAN), "pooling"),
    "a scope": (reft_r1(scope={"include": [{"last_k": 1}]}), "scope"),
    "no target": (request_for("reft_r1", texts=texts(a=["aa"] * 4, b=["bb"] * 4)), "target"),
    "too few texts": (request_for("reft_r1", texts=texts(a=["aa"] * 4, b=["bb"] * 2), target="a"), "texts"),
    "texts of one token": (request_for("reft_r1", texts=texts(a=["a"] * 4, b=["b"] * 4), target="a"), "texts"),
    "no learning rate": (reft_r1(training=pb.Training(learning_rate=0.0)), "training.learning_rate"),
    "too many steps": (reft_r1(training=pb.Training(max_steps=20_001)), "training.max_steps"),
    "a batch too large": (reft_r1(training=pb.Training(batch_size=1025)), "training.batch_size"),
}


@pytest.mark.parametrize("name", REFUSED)
async def test_what_cannot_be_trained_is_refused_by_field(live: Live, name: str) -> None:
    request, field = REFUSED[name]
    assert await refused(live, request) == (grpc.StatusCode.INVALID_ARGUMENT, [field])


async def test_more_layers_than_are_trained_in_one_call_are_refused(
    live: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(extraction_inputs, "MAX_LAYERS", 1)
    assert await refused(live, reft_r1()) == (grpc.StatusCode.INVALID_ARGUMENT, ["layers"])
    assert (await events_of(live, reft_r1(layers=[1])))[-1].HasField("result")


async def test_cancelling_the_call_leaves_the_exclusive_door_to_others(live: Live) -> None:
    call = live.steering.ExtractVectors(reft_r1(training=pb.Training(max_steps=20_000, patience=10_000)))
    assert (await call.read()).progress.stage == "training of layer 0"
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call.read()
    # The next job gets its turn, which it would not before the first has left.
    assert (await events_of(live, reft_r1(layers=[1])))[-1].HasField("result")
    assert not live.server.engine.exclusive.busy

"""ExtractVectors through a real channel: progress, the stored vector, refusals by field path, cancellation."""

import asyncio
from collections.abc import Callable

import grpc
import pytest
import torch
from google.protobuf.json_format import MessageToDict
from google.rpc import error_details_pb2, status_pb2
from steering_fixtures import Live

from patchclamp.v1 import artifact_pb2, generation_pb2, program_pb2
from patchclamp.v1 import steering_pb2 as pb
from patchclamp.v1.artifact_pb2_grpc import ArtifactServiceStub
from patchclamp.v1.generation_pb2_grpc import GenerationServiceStub
from patchclamp_server.analysis.steering.evidence import shuffled
from patchclamp_server.analysis.steering.registry import INPUTS, METHODS
from patchclamp_server.artifacts.formats import safetensors

WORDS = ("river", "stone", "lamp", "garden", "window", "letter", "bridge", "kettle")


def pair(positive: str, negative: str) -> pb.ContrastPair:
    prompt = generation_pb2.Prompt
    return pb.ContrastPair(positive=prompt(text=positive), negative=prompt(text=negative))


def extraction(pairs: int = 8, **fields: object) -> pb.ExtractVectorsRequest:
    """Positives end with "!", negatives with "?": a model of random weights can tell them apart."""
    request = pb.ExtractVectorsRequest(method=pb.EXTRACTION_METHOD_DIFFERENCE_OF_MEANS, **fields)  # type: ignore[arg-type]
    request.pairs.extend(pair(f"the {WORDS[i % 8]} {i}!", f"the {WORDS[i % 8]} {i}?") for i in range(pairs))
    return request


async def events_of(live: Live, request: pb.ExtractVectorsRequest) -> list[pb.ExtractVectorsResponse]:
    return [event async for event in live.steering.ExtractVectors(request)]


async def refused(live: Live, request: pb.ExtractVectorsRequest) -> tuple[grpc.StatusCode, list[str]]:
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await events_of(live, request)
    status = status_pb2.Status.FromString(dict(error.value.trailing_metadata() or ())["grpc-status-details-bin"])
    fields = []
    for detail in status.details:
        bad = error_details_pb2.BadRequest()
        if detail.Unpack(bad):
            fields += [violation.field for violation in bad.field_violations]
    return error.value.code(), fields


@pytest.mark.parametrize("method", sorted(name for name in METHODS if ("pairs",) in INPUTS[name]))
async def test_progress_comes_in_stages_and_the_result_last(live: Live, method: str) -> None:
    request = extraction()
    request.method = pb.ExtractionMethod.Value(f"EXTRACTION_METHOD_{method.upper()}")
    *progress, last = await events_of(live, request)
    seen = [(e.progress.stage, e.progress.done, e.progress.total) for e in progress]
    activations = [("activations", done, 16) for done in range(1, 17)]
    directions, evidence = ([(stage, done, 2) for done in (1, 2)] for stage in ("directions", "evidence"))
    tokens = [("tokens", done, 4) for done in range(1, 5)]
    assert seen == activations + directions + tokens + evidence
    assert [e.layer for e in last.result.layers] == [0, 1]
    assert last.result.artifact.provenance["method"] == method


async def test_a_tag_that_is_taken_is_refused_before_the_work_and_replaced_when_asked(live: Live) -> None:
    first = (await events_of(live, extraction(tags=["taken"])))[-1].result.artifact
    refused = live.steering.ExtractVectors(extraction(layers=[1], tags=["taken"]))
    # No progress comes before it.
    with pytest.raises(grpc.aio.AioRpcError, match=f"the tag 'taken' names {first.id}") as error:
        await anext(aiter(refused))
    assert error.value.code() is grpc.StatusCode.ALREADY_EXISTS
    again = (await events_of(live, extraction(layers=[1], tags=["taken"], replace_tags=True)))[-1].result.artifact
    assert dict(again.replaced_tags) == {"taken": first.id}


async def test_the_stored_vector_can_be_downloaded_with_its_provenance(live: Live) -> None:
    request = extraction(layers=[1], tags=["question-mark"], description="ends with an exclamation mark", seed=2**63)
    result = (await events_of(live, request))[-1].result
    artifacts = ArtifactServiceStub(live.channel)
    stored = (await artifacts.GetArtifact(artifact_pb2.GetArtifactRequest(ref="question-mark"))).artifact
    assert stored == result.artifact
    assert (stored.kind, stored.site, list(stored.layers)) == (1, program_pb2.SITE_RESID_POST, [1])
    assert stored.description == "ends with an exclamation mark"
    provenance = MessageToDict(stored.provenance)
    assert provenance["pairs"] == 8
    assert provenance["parameters"]["seed"] == str(2**63)
    assert provenance["pairs_digest"].startswith("sha256:")
    download = artifacts.Download(
        artifact_pb2.DownloadRequest(ref=stored.id, format=artifact_pb2.ARTIFACT_FORMAT_SAFETENSORS)
    )
    vector = safetensors.decode(b"".join([part.chunk async for part in download])).tensors["layer.1"]
    assert float(vector.norm()) == pytest.approx(result.layers[0].norm, rel=1e-5)


async def test_the_evidence_is_the_same_in_the_answer_and_on_the_artifact(live: Live) -> None:
    result = (await events_of(live, extraction(pairs=16, seed=5)))[-1].result
    card = MessageToDict(result.artifact.evidence)
    assert (card["trainingPairs"] if "trainingPairs" in card else card["training_pairs"], card["heldout_pairs"]) == (
        12,
        4,
    )
    assert card["best_layer"] == result.best_layer
    for told, kept in zip(result.layers, card["layers"], strict=True):
        assert told.heldout_accuracy == pytest.approx(kept["heldout_accuracy"])
        assert told.random_accuracy == pytest.approx(kept["random_accuracy"])
        assert told.explained_variance == pytest.approx(kept["explained_variance"])
        assert (told.midpoint, told.margin) == pytest.approx((kept["midpoint"], kept["margin"]))
        assert told.participation_ratio == pytest.approx(kept["participation_ratio"])
        assert (told.pooled_tokens, told.tokens_left_out) == (kept["pooled_tokens"], kept["tokens_left_out"]) == (32, 0)
    assert list(result.warnings) == list(card["warnings"])
    # The last token alone tells the sides apart.
    assert min(e.heldout_accuracy for e in result.layers) == 1.0


async def test_the_evidence_is_that_of_the_pairs_that_were_held_out(live: Live) -> None:
    """The held-out pairs have their sides exchanged: what was learned from the others is wrong of every one."""
    request, seed = extraction(pairs=16), 5
    for index in shuffled(16, seed)[12:]:
        exchanged = request.pairs[index]
        positive, negative = exchanged.positive.text, exchanged.negative.text
        exchanged.positive.text, exchanged.negative.text = negative, positive
    request.seed = seed
    result = (await events_of(live, request))[-1].result
    assert {layer.heldout_accuracy for layer in result.layers} == {0.0}


async def test_the_three_forms_of_a_prompt_are_accepted(live: Live) -> None:
    request = extraction(pairs=2)
    chat = generation_pb2.ChatMessages(messages=[generation_pb2.ChatMessage(role="user", content="good day")])
    tokens = generation_pb2.TokenIds(ids=[40, 41, 42])
    request.pairs.add(positive=generation_pb2.Prompt(chat=chat), negative=generation_pb2.Prompt(tokens=tokens))
    assert (await events_of(live, request))[-1].HasField("result")


def _with(change: Callable[[pb.ExtractVectorsRequest], object], **fields: object) -> pb.ExtractVectorsRequest:
    request = extraction(**fields)  # type: ignore[arg-type]
    change(request)
    return request


REFUSED = {
    "no method": (_with(lambda r: r.ClearField("method")), "method"),
    "an unknown method": (_with(lambda r: setattr(r, "method", 99)), "method"),
    "no pairs": (extraction(pairs=0), "pairs"),
    "two pairs": (extraction(pairs=2), "pairs"),
    "too many pairs": (_with(lambda r: r.pairs.extend([r.pairs[0]] * 4096)), "pairs"),
    "a pair with one side": (_with(lambda r: r.pairs[3].ClearField("negative")), "pairs[3].negative"),
    "a prompt without a form": (_with(lambda r: r.pairs[2].positive.Clear()), "pairs[2].positive"),
    "an empty prompt": (_with(lambda r: setattr(r.pairs[1].positive, "text", "")), "pairs[1].positive.text"),
    "an over-long prompt": (_with(lambda r: setattr(r.pairs[1].negative, "text", "a" * 300)), "pairs[1].negative.text"),
    "an unknown token": (
        _with(lambda r: r.pairs[0].positive.tokens.ids.extend([1, 9999])),
        "pairs[0].positive.tokens.ids[1]",
    ),
    "an unknown layer": (extraction(layers=[0, 2]), "layers[1]"),
    "a layer twice": (extraction(layers=[1, 1]), "layers[1]"),
    "a site that is not residual": (extraction(site=program_pb2.SITE_MLP_POST), "site"),
    "an unknown site": (extraction(site=77), "site"),
    "an unknown pooling": (extraction(pooling=9), "pooling"),
    "nothing held out": (extraction(holdout_fraction=0.0), "holdout_fraction"),
    "everything held out": (extraction(holdout_fraction=1.0), "holdout_fraction"),
    "a fraction that is no number": (extraction(holdout_fraction=float("nan")), "holdout_fraction"),
    "a tag that is a path": (extraction(tags=["fine", "../up"]), "tags[1]"),
    "a description without end": (extraction(description="x" * 20_000), "description"),
    "the same text on both sides": (
        _with(lambda r: [p.negative.CopyFrom(p.positive) for p in r.pairs]),
        "pairs",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
async def test_what_cannot_be_extracted_is_refused_by_field(live: Live, name: str) -> None:
    request, field = REFUSED[name]
    code, fields = await refused(live, request)
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert len(fields) == 1
    assert fields[0].startswith(field)


async def test_another_model_is_not_found(live: Live) -> None:
    assert (await refused(live, extraction(model="another")))[0] is grpc.StatusCode.NOT_FOUND


async def test_cancelling_the_call_cancels_the_requests_in_the_engine(live: Live) -> None:
    request = pb.ExtractVectorsRequest(method=pb.EXTRACTION_METHOD_DIFFERENCE_OF_MEANS)
    request.pairs.extend(pair(f"{i}!" + "a" * 200, f"{i}?" + "b" * 200) for i in range(32))
    call = live.steering.ExtractVectors(request)
    assert (await call.read()).progress.stage == "activations"
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call.read()
    # stop() waits for the handler, and then for the engine to be empty.
    await live.server.stop()
    assert live.outcomes.ended.count("cancelled") > 10
    assert len(live.outcomes.ended) <= 64


async def test_the_same_request_gives_the_same_vector(live: Live) -> None:
    first, second = [(await events_of(live, extraction(seed=3)))[-1].result for _ in range(2)]
    norms = [torch.tensor([e.norm for e in result.layers]) for result in (first, second)]
    torch.testing.assert_close(*norms, rtol=1e-5, atol=0)
    assert first.artifact.provenance == second.artifact.provenance


async def test_the_projections_of_single_tokens_are_those_that_a_readout_gives(live: Live) -> None:
    """Every pair has the same text, so that those of a side that are held out are known: any."""
    request = extraction(pairs=0, layers=[1])
    request.pairs.extend([pair("the lamp is on!", "no lamp is on?")] * 4)
    result = (await events_of(live, request))[-1].result
    stub = GenerationServiceStub(live.channel)
    vector = program_pb2.Vector(artifact=result.artifact.id)
    readout = program_pb2.Readout(
        site=program_pb2.SITE_RESID_POST, layers=[1], projection=program_pb2.ProjectionReadout(vectors=[vector])
    )
    sides = (
        ("the lamp is on!", result.layers[0].positive_tokens),
        ("no lamp is on?", result.layers[0].negative_tokens),
    )
    for text, found in sides:
        asked = generation_pb2.GenerateRequest(
            prompt=generation_pb2.Prompt(text=text),
            program=program_pb2.Program(readouts=[readout]),
            stop=generation_pb2.StopConditions(max_tokens=0),
        )
        read = [v async for r in stub.Generate(asked) for v in r.prompt_readouts]
        values = torch.tensor([v.values[0] for v in read if v.position > 0], dtype=torch.float64)
        assert found.tokens == len(values)
        assert found.mean == pytest.approx(float(values.mean()), rel=1e-4)
        assert (found.p05, found.p50, found.p95) == pytest.approx(
            tuple(values.quantile(torch.tensor([0.05, 0.5, 0.95], dtype=torch.float64)).tolist()), rel=1e-4
        )
    card = MessageToDict(result.artifact.evidence)["layers"][0]
    assert card["positive_tokens"]["p95"] == pytest.approx(result.layers[0].positive_tokens.p95)

"""On the real embedded model: vectors from our own contrast pairs tell held-out sentences apart and move what it says.

The measure is never seen by the extraction: the mean log-probability of each token of positive continuations minus that
of negative ones, after neutral prompts (benchmarks/data/concepts/*.measure.json). Random vectors of equal norm at the
same layer are the control.
"""

import asyncio
import json
import re
from collections.abc import AsyncIterator
from pathlib import Path
from statistics import mean
from typing import Any

import grpc
import pytest
import pytest_asyncio
import torch
from live import LiveServer

from patchclamp.v1 import generation_pb2, program_pb2
from patchclamp.v1 import steering_pb2 as pb
from patchclamp.v1.generation_pb2_grpc import GenerationServiceStub
from patchclamp.v1.steering_pb2_grpc import SteeringServiceStub
from patchclamp_server.rpc.codecs.tensor import encode_tensor

CONCEPTS = Path(__file__).parents[2] / "benchmarks" / "data" / "concepts"
# Just past the middle of 30 layers: before it the last token hardly holds the concept.
LAYER = 16
RANDOM_SEEDS = range(4)
GENERATED_TOKENS = 32
# One channel for all tests of the file, in one event loop.
pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def channel(embedded_server: LiveServer) -> AsyncIterator[grpc.aio.Channel]:
    async with grpc.aio.insecure_channel(embedded_server.address) as channel:
        yield channel


def text(content: str) -> generation_pb2.Prompt:
    return generation_pb2.Prompt(text=content)


async def extracted(
    channel: grpc.aio.Channel, concept: str, pooling: pb.TokenPooling = pb.TOKEN_POOLING_LAST_TOKEN
) -> pb.ExtractionResult:
    lines = [json.loads(line) for line in (CONCEPTS / f"{concept}.jsonl").read_text(encoding="utf-8").splitlines()]
    request = pb.ExtractVectorsRequest(
        method=pb.EXTRACTION_METHOD_DIFFERENCE_OF_MEANS,
        pairs=[pb.ContrastPair(positive=text(line["positive"]), negative=text(line["negative"])) for line in lines],
        pooling=pooling,
        tags=[concept],
        replace_tags=True,
    )
    events = [event async for event in SteeringServiceStub(channel).ExtractVectors(request)]
    return events[-1].result


def adding(vector: program_pb2.Vector, strength: float = 1.0) -> program_pb2.Program:
    edit = program_pb2.Edit(site=program_pb2.SITE_RESID_POST, layers=[LAYER], strength=strength)
    edit.add.vector.CopyFrom(vector)
    return program_pb2.Program(edits=[edit])


async def preference(channel: grpc.aio.Channel, measure: dict[str, Any], program: program_pb2.Program) -> float:
    """Mean log-probability a token of the positive continuations minus that of the negative ones, in nats."""
    generation = GenerationServiceStub(channel)

    async def side(continuations: list[str]) -> float:
        requests = [
            generation_pb2.ScoreRequest(prompt=text(prompt), text=continuation, program=program)
            for prompt in measure["prompts"]
            for continuation in continuations
        ]
        scores = await asyncio.gather(*(generation.Score(request) for request in requests))
        return mean(score.total_logprob / len(score.tokens) for score in scores)

    positive, negative = await asyncio.gather(side(measure["positive"]), side(measure["negative"]))
    return positive - negative


async def word_balance(channel: grpc.aio.Channel, measure: dict[str, Any], program: program_pb2.Program) -> int:
    """Words of the positive list minus words of the negative list in greedy continuations of all prompts."""
    generation = GenerationServiceStub(channel)

    async def generated(prompt: str) -> str:
        request = generation_pb2.GenerateRequest(
            prompt=text(prompt),
            program=program,
            sampling=generation_pb2.Sampling(repetition_penalty=1.1),
            stop=generation_pb2.StopConditions(max_tokens=GENERATED_TOKENS),
        )
        return "".join([response.text async for response in generation.Generate(request)])

    texts = await asyncio.gather(*(generated(prompt) for prompt in measure["prompts"]))
    words = re.findall(r"[a-z']+", " ".join(texts).lower())
    return sum((word in measure["positive_words"]) - (word in measure["negative_words"]) for word in words)


def random_vector(seed: int, norm: float, width: int) -> program_pb2.Vector:
    values = torch.randn(width, generator=torch.Generator().manual_seed(seed))
    return program_pb2.Vector(values=encode_tensor(values * (norm / values.norm())))


@pytest.mark.parametrize("concept", ["joyful_sad", "formal_casual"])
async def test_a_vector_tells_held_out_pairs_apart_and_moves_the_model(channel: grpc.aio.Channel, concept: str) -> None:
    result = await extracted(channel, concept)
    best = max(result.layers, key=lambda e: e.heldout_accuracy)
    assert best.heldout_accuracy >= 0.9
    assert best.random_accuracy < 0.75

    measure = json.loads((CONCEPTS / f"{concept}.measure.json").read_text(encoding="utf-8"))
    vector = program_pb2.Vector(artifact=concept)
    norm, width = result.layers[LAYER].norm, result.artifact.width
    controls = [adding(random_vector(seed, norm, width)) for seed in RANDOM_SEEDS]
    programs = [program_pb2.Program(), adding(vector), adding(vector, -1.0), *controls]
    baseline, *steered = [await preference(channel, measure, program) for program in programs]
    towards, away, *random = [value - baseline for value in steered]
    balances = [await word_balance(channel, measure, adding(vector, strength)) for strength in (1.0, -1.0)]
    print({"concept": concept, "accuracy": best.heldout_accuracy, "towards": towards, "away": away, "random": random})
    print({"words at +1 and -1": balances})
    strongest = max(abs(shift) for shift in random)
    assert towards > 0.4
    assert towards > 3 * strongest
    assert away < -strongest
    assert balances[0] - balances[1] >= 6


async def test_a_mean_tells_held_out_pairs_apart_at_every_layer_although_some_words_are_sinks(
    channel: grpc.aio.Channel,
) -> None:
    """The norm of some words is that of 8 others at layers 2 to 8, and of 50 from layer 11 on."""
    result = await extracted(channel, "joyful_sad", pb.TOKEN_POOLING_MEAN)
    accuracies = [layer.heldout_accuracy for layer in result.layers]
    assert min(accuracies) >= 0.75
    assert sum(accuracies) / len(accuracies) >= 0.93
    assert not result.warnings
    left_out = [layer.tokens_left_out for layer in result.layers]
    assert min(left_out[2:8]) > 20
    assert 0 < min(left_out[11:]) <= max(left_out[11:]) < 10

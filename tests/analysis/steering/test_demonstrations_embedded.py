"""On the real embedded model: vectors from demonstrations, definitions and words hold what they are said to hold."""

from collections.abc import AsyncIterator

import grpc
import pytest
import pytest_asyncio
from live import LiveServer

from patchclamp.v1 import generation_pb2, program_pb2
from patchclamp.v1 import steering_pb2 as pb
from patchclamp.v1.generation_pb2_grpc import GenerationServiceStub
from patchclamp.v1.steering_pb2_grpc import SteeringServiceStub

# One channel for all tests of the file, in one event loop.
pytestmark = pytest.mark.asyncio(loop_scope="module")

# Of 30: before it the last token does not hold the task yet, after it what it holds is one answer.
TASK_LAYER = 20
DEFINITION_LAYER = 20

CAPITALS = (
    "France Paris, Germany Berlin, Italy Rome, Spain Madrid, Japan Tokyo, China Beijing, Russia Moscow, Egypt Cairo, "
    "Greece Athens, Austria Vienna, Poland Warsaw, Portugal Lisbon, Norway Oslo, Denmark Copenhagen, Ireland Dublin, "
    "Cuba Havana, Peru Lima, Iran Tehran, Iraq Baghdad, Kenya Nairobi"
)
CONCEPTS = """a large grey animal with a trunk: elephant
a vehicle with two wheels and pedals: bicycle
the hot star that gives us light by day: sun
a person who teaches pupils at school: teacher
frozen water: ice
a yellow fruit that monkeys like: banana
a tool to drive nails into wood: hammer
an animal that barks and guards the house: dog
a person who treats sick people: doctor
a machine that flies through the air: airplane
the season when snow falls: winter
an instrument with black and white keys: piano
a place where books are kept and lent: library
a building where people pray: church
a piece of furniture to sleep in: bed
a man who is the ruler of a kingdom: king
a drink made from roasted beans: coffee
an insect that makes honey: bee
a device that shows the time: clock
a large body of salt water: ocean
a place where money is kept: bank
a vehicle that runs on rails: train
the organ that pumps blood: heart
clothes worn on the feet: shoes"""
WORDS = (
    "king queen, man woman, boy girl, father mother, son daughter, brother sister, husband wife, uncle aunt, "
    "prince princess, he she, his her, actor actress"
)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def channel(embedded_server: LiveServer) -> AsyncIterator[grpc.aio.Channel]:
    async with grpc.aio.insecure_channel(embedded_server.address) as channel:
        yield channel


def pairs(listed: str) -> list[tuple[str, str]]:
    return [(first, second) for first, second in (pair.split() for pair in listed.split(","))]


async def extracted(channel: grpc.aio.Channel, method: str, **fields: object) -> pb.ExtractionResult:
    number = pb.ExtractionMethod.Value(f"EXTRACTION_METHOD_{method.upper()}")
    request = pb.ExtractVectorsRequest(method=number, **fields)  # type: ignore[arg-type]
    events = [event async for event in SteeringServiceStub(channel).ExtractVectors(request)]
    return events[-1].result


async def test_a_task_vector_answers_held_out_inputs_that_its_control_does_not(channel: grpc.aio.Channel) -> None:
    shown = [pb.Demonstration(input=country, output=capital) for country, capital in pairs(CAPITALS)]
    result = await extracted(channel, "task_vector", demonstrations=shown, layers=[TASK_LAYER], holdout_fraction=0.4)
    (layer,) = result.layers
    print({"vector": layer.heldout_accuracy, "control": layer.random_accuracy, **result.baselines})
    assert result.baselines["demonstrations"] > 0.5
    assert layer.heldout_accuracy > layer.random_accuracy
    assert layer.heldout_accuracy > result.baselines["unedited"]


async def test_definitions_are_nearest_to_their_own_words_far_above_chance(channel: grpc.aio.Channel) -> None:
    listed = [line.split(": ") for line in CONCEPTS.splitlines()]
    shown = [pb.Demonstration(input=definition, output=word) for definition, word in listed]
    own = {"definition": "a building where films are shown", "layers": [DEFINITION_LAYER], "holdout_fraction": 0.67}
    result = await extracted(channel, "definition", demonstrations=shown, **own)
    (layer,) = result.layers
    print({"nearest": layer.heldout_accuracy, "chance": layer.random_accuracy, **result.baselines})
    assert layer.random_accuracy == pytest.approx(1 / 16)
    assert layer.heldout_accuracy > 4 * layer.random_accuracy


async def test_words_give_a_direction_that_moves_the_answer_to_their_side(channel: grpc.aio.Channel) -> None:
    words = [pb.WordPair(positive=first, negative=second) for first, second in pairs(WORDS)]
    result = await extracted(channel, "causal_inner_product", word_pairs=words, tags=["gender"], replace_tags=True)
    (layer,) = result.layers
    assert layer.layer == 29
    print({"held out": layer.heldout_accuracy, "random": layer.random_accuracy, "norm": layer.norm})
    assert layer.heldout_accuracy > layer.random_accuracy
    edit = program_pb2.Edit(site=program_pb2.SITE_RESID_POST, layers=[29], strength=20 / layer.norm)
    edit.add.vector.artifact = "gender"

    async def preference(program: program_pb2.Program) -> float:
        """How much likelier " he" is than " she", in nats."""
        scores = []
        for text in (" he", " she"):
            prompt = generation_pb2.Prompt(text="The nurse said that")
            asked = generation_pb2.ScoreRequest(prompt=prompt, text=text, program=program)
            scores.append((await GenerationServiceStub(channel).Score(asked)).total_logprob)
        return scores[0] - scores[1]

    assert await preference(program_pb2.Program(edits=[edit])) > await preference(program_pb2.Program())

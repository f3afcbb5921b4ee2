"""Directions are found in texts with attention sinks, which are strewn over both sides alike: their share of a text
outweighs what the text is about, unless they are left out.
"""

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import sink_models
from sink_models import id_of

from patchclamp_server.analysis.steering.examples import TokenPair
from patchclamp_server.analysis.steering.job import Extraction, extract
from patchclamp_server.analysis.steering.registry import METHODS
from patchclamp_server.analysis.steering.result import Result
from patchclamp_server.artifacts.store import ArtifactStore
from patchclamp_server.engine.config import EngineConfig
from patchclamp_server.engine.engine import Engine
from patchclamp_server.interventions.pooling import Pooling
from patchclamp_server.model.load import LoadedModel
from patchclamp_server.model.sites import Site
from patchclamp_server.text.prompt import PromptEncoder

PAIRS = 48
# Of a maximum nothing is left out, and extraction does not offer it.
POOLINGS = [Pooling.LAST_TOKEN, Pooling.MEAN]


@pytest.fixture(scope="module")
def sink_model(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return sink_models.sink_model(tmp_path_factory.mktemp("sink"))


@pytest.fixture
def engine(sink_model: LoadedModel) -> Iterator[Engine]:
    # Prompts of several chunks.
    engine = Engine(sink_model, EngineConfig(max_tokens_per_step=32))
    engine.start()
    yield engine
    engine.shutdown()


def pairs() -> tuple[TokenPair, ...]:
    """Texts of 12 to 40 letters, up to four of them sinks, which half of the texts end with."""
    dice = random.Random(0)

    def side(letter: str) -> tuple[int, ...]:
        text = [dice.choice("abcdefghij" + 4 * letter) for _ in range(dice.randint(12, 36))] + [letter]
        for _ in range(dice.randint(0, 3)):
            text.insert(dice.randrange(1, len(text)), ".")
        text += dice.choice(["", "."])
        return tuple(id_of(each) for each in text)

    return tuple(TokenPair(side("p"), side("n")) for _ in range(PAIRS))


async def extracted(engine: Engine, path: Path, method: str, pooling: Pooling) -> Result:
    job = Extraction(method, pairs(), Site.RESID_POST, (0, 1), pooling)
    prompts = PromptEncoder(engine.model.tokenizer, engine.model.info)
    events = [event async for event in extract(engine, ArtifactStore(path), engine.model.info, prompts, job)]
    result = events[-1]
    assert isinstance(result, Result)
    return result


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("method", METHODS)
async def test_a_direction_is_found_beside_sinks(engine: Engine, tmp_path: Path, method: str, pooling: Pooling) -> None:
    result = await extracted(engine, tmp_path, method, pooling)
    assert min(layer.heldout_accuracy for layer in result.layers) >= 0.9


@pytest.mark.parametrize("pooling", POOLINGS)
async def test_what_was_left_out_is_counted_in_the_evidence(engine: Engine, tmp_path: Path, pooling: Pooling) -> None:
    result = await extracted(engine, tmp_path, "difference_of_means", pooling)
    texts = [text for pair in pairs() for text in (pair.positive, pair.negative)]
    if pooling is Pooling.MEAN:
        pooled = sum(len(text) - 1 for text in texts)
        left_out = sum(text.count(id_of(".")) for text in texts)
    else:
        pooled = len(texts)
        left_out = sum(text[-1] == id_of(".") for text in texts)
    card = result.artifact.evidence["layers"]
    for layer, kept in zip(result.layers, card, strict=True):
        assert layer.tokens_left_out == kept["tokens_left_out"] == left_out
        assert layer.pooled_tokens == kept["pooled_tokens"] == pooled - (left_out if pooling is Pooling.MEAN else 0)

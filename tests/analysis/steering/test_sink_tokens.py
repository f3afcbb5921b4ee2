"""A model in which "." is an attention sink: its residual norm is some twenty times that of the other tokens.

Qwen2.5 does so with the first "." or "," of a text, up to seventeen times the median norm; the embedded model with some
words, up to fifty times. Their share of a text then outweighs what the text is about. Here the concept is planted in
the letters p and n, and the sinks are strewn over both sides alike.
"""

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tiny_llama import byte_tokenizer, save_tiny_llama
from transformers import AutoModelForCausalLM

from patchclamp_server.analysis.steering.job import Extraction, Result, TokenPair, extract
from patchclamp_server.artifacts.store import ArtifactStore
from patchclamp_server.engine.config import EngineConfig
from patchclamp_server.engine.engine import Engine
from patchclamp_server.interventions.pooling import Pooling
from patchclamp_server.model.load import LoadedModel, load_model
from patchclamp_server.model.sites import Site

PAIRS = 48
SINK_COORDINATES = [5, 21]


@pytest.fixture(scope="module")
def sink_model(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    directory = tmp_path_factory.mktemp("sink")
    save_tiny_llama(directory)
    model = AutoModelForCausalLM.from_pretrained(directory)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        embedding = model.get_input_embeddings().weight
        embedding.copy_(torch.randn(embedding.shape, generator=generator))
        concept = torch.randn(embedding.shape[1], generator=generator)
        for letter, sign in (("p", 1), ("n", -1)):
            embedding[id_of(letter)] += sign * concept
        embedding[id_of(".")] = 0.0
        embedding[id_of("."), SINK_COORDINATES] = 20 * embedding.shape[1] ** 0.5 / 2**0.5
    model.save_pretrained(directory)
    return load_model(str(directory))


def id_of(letter: str) -> int:
    return int(byte_tokenizer().get_vocab()[letter])


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
    events = [event async for event in extract(engine, ArtifactStore(path), engine.model.info, job)]
    result = events[-1]
    assert isinstance(result, Result)
    return result


@pytest.mark.parametrize("pooling", Pooling)
@pytest.mark.parametrize("method", ["difference_of_means", "pca_of_differences", "logistic_probe"])
async def test_a_direction_is_found_beside_sinks(engine: Engine, tmp_path: Path, method: str, pooling: Pooling) -> None:
    result = await extracted(engine, tmp_path, method, pooling)
    assert min(layer.heldout_accuracy for layer in result.layers) >= 0.9


@pytest.mark.parametrize("pooling", Pooling)
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

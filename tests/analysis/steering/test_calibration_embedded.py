"""On the real embedded model: one concept from its pairs to a strength, and what its vector detects."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from live import LiveServer

from patchclamp import Client, effects

CONCEPTS = Path(__file__).parents[3] / "benchmarks" / "data" / "concepts"
LAYERS = [12, 16]


@pytest.fixture(scope="module")
def client(embedded_server: LiveServer) -> Iterator[Client]:
    with Client(embedded_server.address) as client:
        yield client


@pytest.fixture(scope="module")
def pairs() -> list[tuple[str, str]]:
    lines = map(json.loads, (CONCEPTS / "joyful_sad.jsonl").read_text(encoding="utf-8").splitlines())
    return [(line["positive"], line["negative"]) for line in lines]


def test_a_concept_goes_from_pairs_to_a_calibrated_vector(client: Client, pairs: list[tuple[str, str]]) -> None:
    """Its effect is measured by continuations that the extraction has never seen, and detection on held-out pairs."""
    client.extract_vectors(pairs[:24], pooling="mean", layers=LAYERS, tags=["joy"], replace_tags=True).result()
    measure = json.loads((CONCEPTS / "joyful_sad.measure.json").read_text(encoding="utf-8"))
    result = client.calibrate_vector(
        "joy",
        measure["prompts"][:4],
        effect=effects.target_texts(measure["positive"][:2]),
        layers=[12],
        strengths=[1.0, 2.0, 24.0],
        random_vectors=1,
        max_tokens=12,
        max_repetition=0.6,
        tags=["joy"],
        replace_tags=True,
    ).result()
    points = {(p.arm, p.strength): p for p in result.points}
    plain = points["unsteered", 0.0]
    print({key: (str(p.effect), p.perplexity.mean, p.repetition.mean, p.example) for key, p in points.items()})
    # Twenty-four times the vector leaves nothing of the state, and nothing of the text.
    assert points["vector", 24.0].perplexity.mean > 2 * plain.perplexity.mean
    [safe] = result.safe
    assert 1.0 <= safe.high < 24.0
    assert result.layer == 12
    assert 0.0 < result.strength <= safe.high
    knee = points["vector", result.strength].effect.mean
    assert knee > plain.effect.mean
    assert knee > points["random", result.strength].effect.mean

    texts = {"joyful": [a for a, _ in pairs[24:]], "sad": [b for _, b in pairs[24:]]}
    detection = client.detect_concept("joy", texts, "joyful", poolings=["mean"]).result()
    best = detection.detectors[detection.best]
    print(best)
    assert best.auroc is not None
    assert best.auroc.mean > 0.9
    assert best.auroc.low > best.random_auroc
    assert best.brier < best.brier_base_rate

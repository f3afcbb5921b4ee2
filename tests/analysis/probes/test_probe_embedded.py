"""A probe of a real concept on the embedded model: its probability is worth more than the base rate on texts it has not
seen, and the same texts with random labels are worth nothing."""

import random
from collections.abc import Iterator

import pytest
from live import LiveServer

from patchclamp import Client, datasets
from patchclamp.results import TrainedProbe

TEXTS = datasets.load("sentiment").texts
OPTIONS = {"layers": [15], "pooling": "mean", "holdout_fraction": 0.5}


@pytest.fixture(scope="module")
def client(embedded_server: LiveServer) -> Iterator[Client]:
    with Client(embedded_server.address) as client:
        yield client


def shuffled(seed: int) -> dict[str, list[str]]:
    """The texts, dealt to both labels at random, so that each has as many joyful ones."""
    generator = random.Random(seed)
    dealt: dict[str, list[str]] = {"a": [], "b": []}
    for texts in TEXTS.values():
        order = generator.sample(texts, len(texts))
        dealt["a"] += order[: len(order) // 2]
        dealt["b"] += order[len(order) // 2 :]
    return dealt


def test_the_calibrated_probability_beats_the_base_rate_on_texts_it_has_not_seen(client: Client) -> None:
    found: TrainedProbe = client.train_probe(TEXTS, target="unhappy", **OPTIONS).result()
    report = found.report
    assert report.brier < 0.6 * report.brier_base_rate
    assert report.accuracy >= report.base_rate + 0.25
    assert report.code_length_ratio < 0.9
    assert report.selectivity > 0.25
    assert report.auroc > 0.9


def test_random_labels_get_no_shorter_and_no_accuracy_above_the_base_rate(client: Client) -> None:
    reports = [client.train_probe(shuffled(seed), seed=seed, **OPTIONS).result().report for seed in range(3)]
    ratios, gains = [r.code_length_ratio for r in reports], [r.accuracy - r.base_rate for r in reports]
    assert sum(ratios) / 3 == pytest.approx(1.0, abs=0.1)
    assert sum(gains) / 3 < 0.15
    assert all(report.brier > 0.8 * report.brier_base_rate for report in reports)

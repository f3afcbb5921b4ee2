"""A circuit of the embedded model: the heads that bring the country of a question to its last token."""

import pytest

from patchclamp_server.analysis.heads.circuits.circuit import CircuitSearch, FoundCircuit, search
from patchclamp_server.analysis.heads.circuits.runs import CleanCorruptPair
from patchclamp_server.model.load import LoadedModel

CAPITALS = [
    ("France", " Paris", "Italy", " Rome"),
    ("Germany", " Berlin", "Japan", " Tokyo"),
    ("Spain", " Madrid", "Russia", " Moscow"),
    ("Egypt", " Cairo", "England", " London"),
]


def pairs(model: LoadedModel) -> tuple[CleanCorruptPair, ...]:
    def ids(text: str) -> tuple[int, ...]:
        return tuple(model.tokenizer(text)["input_ids"])

    return tuple(
        CleanCorruptPair(
            ids(f"The capital of {clean} is"), ids(f"The capital of {corrupt} is"), ids(capital)[0], ids(other)[0]
        )
        for clean, capital, corrupt, other in CAPITALS
    )


def found(model: LoadedModel, method: str) -> FoundCircuit:
    *_, last = search(model.decoder, CircuitSearch(method, pairs(model), circuit_size=20))
    assert isinstance(last, FoundCircuit)
    return last


@pytest.fixture(scope="module")
def ablation(embedded: LoadedModel) -> FoundCircuit:
    return found(embedded, "mean_ablation")


def test_the_twenty_strongest_of_270_heads_are_more_faithful_than_random_ones(ablation: FoundCircuit) -> None:
    measured = ablation.faithfulness
    assert ablation.clean_metric > 5 > -5 > ablation.corrupt_metric
    assert measured.circuit > 0.8
    assert measured.circuit > measured.random_mean + 3 * measured.random_deviation
    assert measured.circuit > max(measured.random)


def test_the_strongest_head_is_needed_and_writes_to_the_logits_itself(
    embedded: LoadedModel, ablation: FoundCircuit
) -> None:
    needed, writing = ablation.effects[0], found(embedded, "path_patching").effects[0]
    assert (needed.layer, needed.head) == (writing.layer, writing.head)
    assert needed.high < -0.1
    assert writing.high < -0.1

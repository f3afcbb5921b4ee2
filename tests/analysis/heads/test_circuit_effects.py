"""Effects of heads and faithfulness against naive passes of transformers, one head and one prompt at a time."""

from functools import cache

import pytest
import torch
from circuit_oracle import Naive, random_pair
from tiny_models import FAMILIES, tiny_model

from patchclamp_server.analysis.heads.circuits import runs as circuit_runs
from patchclamp_server.analysis.heads.circuits.circuit import CircuitSearch, FoundCircuit, search
from patchclamp_server.analysis.heads.circuits.faithfulness import circuit_metrics, circuits, faithfulness
from patchclamp_server.analysis.heads.circuits.mean_ablation import CorruptMeans
from patchclamp_server.analysis.heads.circuits.methods import CIRCUIT_METHODS
from patchclamp_server.analysis.heads.circuits.runs import CleanCorruptPair, run_pair
from patchclamp_server.errors import InvalidArgument
from patchclamp_server.model.decoder import Decoder
from patchclamp_server.model.weights import decoder_from_transformers

TOLERANCE = 1e-4
# The window of the families that have one is 12 tokens.
TOKENS = 15


@cache
def decoder(family: str) -> Decoder:
    return decoder_from_transformers(tiny_model(family), dtype=torch.float32, device="cpu")


def pairs_of(family: str, *lengths: int) -> tuple[CleanCorruptPair, ...]:
    return tuple(random_pair(tiny_model(family), length, seed) for seed, length in enumerate(lengths))


def naive(family: str, pairs: tuple[CleanCorruptPair, ...]) -> Naive:
    return Naive(tiny_model(family), pairs)


def found(family: str, job: CircuitSearch) -> FoundCircuit:
    *_, last = search(decoder(family), job)
    assert isinstance(last, FoundCircuit)
    return last


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", CIRCUIT_METHODS)
def test_the_effect_of_every_head_is_that_of_naive_passes(
    method: str, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Batches of five heads of four a layer: they start at layers 0, 1 and 2.
    monkeypatch.setattr(circuit_runs, "ROWS", 5 * TOKENS)
    pairs = pairs_of(family, TOKENS, TOKENS)
    truth = naive(family, pairs)
    for effect in found(family, CircuitSearch(method, pairs)).effects:
        assert effect.effect == pytest.approx(truth.effect(method, (effect.layer, effect.head)), abs=TOLERANCE)


def test_prompts_of_different_lengths_are_ablated_to_one_mean_over_all_their_tokens() -> None:
    pairs = pairs_of("llama", TOKENS, 9, 4)
    truth = naive("llama", pairs)
    result = found("llama", CircuitSearch("mean_ablation", pairs))
    assert not result.means_by_position
    for effect in result.effects:
        assert effect.effect == pytest.approx(truth.effect("mean_ablation", (effect.layer, effect.head)), abs=TOLERANCE)


@pytest.mark.parametrize("method", CIRCUIT_METHODS)
def test_effects_do_not_depend_on_how_many_variants_share_a_batch(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = pairs_of("gemma3", TOKENS, TOKENS)
    many = found("gemma3", CircuitSearch(method, pairs))
    monkeypatch.setattr(circuit_runs, "ROWS", 1)
    few = found("gemma3", CircuitSearch(method, pairs))
    by_head = {(e.layer, e.head): e.effect for e in many.effects}
    for effect in few.effects:
        assert effect.effect == pytest.approx(by_head[effect.layer, effect.head], abs=1e-5)


def test_effects_are_ordered_by_their_size() -> None:
    effects = found("llama", CircuitSearch("activation_patching", pairs_of("llama", TOKENS, TOKENS))).effects
    sizes = [abs(e.effect) for e in effects]
    assert sizes == sorted(sizes, reverse=True)
    assert len({(e.layer, e.head) for e in effects}) == len(effects) == 12


def test_the_interval_lies_within_the_effects_of_the_pairs() -> None:
    pairs = pairs_of("llama", TOKENS, TOKENS, TOKENS, TOKENS)
    truth = naive("llama", pairs)
    for effect in found("llama", CircuitSearch("path_patching", pairs, seed=3)).effects:
        by_pair = truth.effects("path_patching", (effect.layer, effect.head))
        assert min(by_pair) - TOLERANCE <= effect.low <= effect.effect <= effect.high <= max(by_pair) + TOLERANCE
        assert effect.low < effect.high


def test_one_pair_has_an_interval_of_no_width() -> None:
    for effect in found("llama", CircuitSearch("path_patching", pairs_of("llama", TOKENS))).effects:
        assert effect.low == effect.effect == effect.high


def test_metrics_are_means_over_the_pairs() -> None:
    pairs = pairs_of("gpt2", TOKENS, 9)
    truth = naive("gpt2", pairs)
    result = found("gpt2", CircuitSearch("path_patching", pairs))
    clean = sum(truth.clean_metric.values()) / 2
    corrupt = sum(truth.corrupt_metric.values()) / 2
    assert (result.clean_metric, result.corrupt_metric) == pytest.approx((clean, corrupt), abs=TOLERANCE)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_neox"])
@pytest.mark.parametrize("lengths", [(TOKENS, TOKENS), (TOKENS, 9)])
def test_faithfulness_is_that_of_naive_ablations(family: str, lengths: tuple[int, ...]) -> None:
    pairs = pairs_of(family, *lengths)
    truth = naive(family, pairs)
    result = found(family, CircuitSearch("path_patching", pairs, circuit_size=4))
    circuit = {(e.layer, e.head) for e in result.effects[:4]}

    def mean_metric(ablated: list[tuple[int, int]]) -> float:
        return sum(truth.ablated(pair, ablated) for pair in pairs) / len(pairs)

    none = mean_metric(truth.heads)
    circuit_only = mean_metric([head for head in truth.heads if head not in circuit])
    clean = mean_metric([])
    assert result.faithfulness.ablated_metric == pytest.approx(none, abs=TOLERANCE)
    assert result.faithfulness.circuit == pytest.approx((circuit_only - none) / (clean - none), abs=TOLERANCE)


def test_all_heads_are_faithful_by_1_and_none_by_0() -> None:
    pairs = pairs_of("llama", TOKENS, TOKENS)
    runs = [run_pair(decoder("llama"), pair) for pair in pairs]
    means = CorruptMeans(pairs)
    for both in runs:
        means.add(both.corrupt)
    spec = decoder("llama").spec
    everything = [(layer, head) for layer in range(spec.n_layers) for head in range(spec.n_heads)]
    clean = sum(both.clean_metric for both in runs) / 2
    ablated = sum(naive("llama", pairs).ablated(pair, everything) for pair in pairs) / 2
    for heads, expected in ((everything, 1.0), ([], 0.0)):
        kept = circuits(heads, 3, spec, seed=0)
        metrics = sum(circuit_metrics(decoder("llama"), pair, kept, means.values(torch.float32)) / 2 for pair in pairs)
        measured = faithfulness(torch.as_tensor(metrics), clean, ablated)
        assert (measured.circuit, *measured.random) == pytest.approx((expected,) * 4, abs=1e-5)
        assert measured.random_deviation == pytest.approx(0.0, abs=1e-5)


def test_random_circuits_have_the_size_of_the_circuit_and_follow_from_the_seed() -> None:
    spec = decoder("llama").spec
    kept = circuits([(0, 1), (2, 3)], 20, spec, seed=1)
    assert kept[0].nonzero().tolist() == [[0, 1], [2, 3]]
    assert kept[1:].sum(dim=(1, 2)).tolist() == [2] * 20
    assert len({tuple(row.flatten().tolist()) for row in kept[1:]}) > 10
    assert torch.equal(kept, circuits([(0, 1), (2, 3)], 20, spec, seed=1))
    assert not torch.equal(kept, circuits([(0, 1), (2, 3)], 20, spec, seed=2))


GOOD = CleanCorruptPair((5, 6, 7), (5, 9, 7), 20, 30)


@pytest.mark.parametrize(
    ("pairs", "field", "message"),
    [
        ((), "pairs", "at least one pair"),
        ((GOOD, CleanCorruptPair((), (), 20, 30)), "pairs[1].clean", "has 0 tokens; accepted: 1 to 640"),
        ((CleanCorruptPair((5,) * 641, (5,) * 641, 20, 30),), "pairs[0].clean", "has 641 tokens; accepted: 1 to 640"),
        (
            (GOOD, CleanCorruptPair((5, 6, 7), (5, 9), 20, 30)),
            "pairs[1].corrupt",
            "has 2 tokens and the clean prompt 3",
        ),
        ((CleanCorruptPair((5, 6), (5, 7), 20, 20),), "pairs[0].corrupt_answer", "same token as clean_answer"),
        ((CleanCorruptPair((5, 6), (5, 6), 20, 30),), "pairs[0]", "has to tell the prompts apart"),
    ],
)
def test_pairs_that_cannot_be_compared_are_refused_by_path(
    pairs: tuple[CleanCorruptPair, ...], field: str, message: str
) -> None:
    with pytest.raises(InvalidArgument, match=message) as refused:
        found("llama", CircuitSearch("path_patching", pairs))
    assert refused.value.field == field


def test_a_pair_with_its_sides_exchanged_is_refused() -> None:
    (pair,) = pairs_of("llama", TOKENS)
    turned = CleanCorruptPair(pair.corrupt, pair.clean, pair.clean_answer, pair.corrupt_answer)
    with pytest.raises(InvalidArgument) as refused:
        found("llama", CircuitSearch("path_patching", (pair, turned)))
    assert refused.value.field == "pairs[1]"


@pytest.mark.parametrize(
    ("sizes", "field"),
    [
        ({"circuit_size": 0}, "circuit_size"),
        ({"circuit_size": 13}, "circuit_size"),
        ({"random_sets": 0}, "random_sets"),
    ],
)
def test_sizes_out_of_range_are_refused(sizes: dict[str, int], field: str) -> None:
    with pytest.raises(InvalidArgument) as refused:
        found("llama", CircuitSearch("path_patching", pairs_of("llama", TOKENS), **sizes))
    assert refused.value.field == field

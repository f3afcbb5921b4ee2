"""The best of scores, random sets beside them, and what sets have in common."""

import numpy as np
import pytest
import torch
from scipy.stats import hypergeom

from patchclamp_server.analysis.neurons.compare import compare
from patchclamp_server.analysis.neurons.random_sets import random_sets
from patchclamp_server.analysis.neurons.stored import best_of
from patchclamp_server.artifacts.neuron_sets import Neuron, NeuronSet
from patchclamp_server.artifacts.store import ArtifactStore
from patchclamp_server.artifacts.types import ArtifactKind
from patchclamp_server.errors import FailedPrecondition, InvalidArgument
from patchclamp_server.model.info import ModelInfo

INFO = ModelInfo("m", "sha256:m", "llama", 4, 8, 16, 2, 2, 4, 32, 64, "float32", "cpu", {})


def test_the_best_are_the_largest_scores_of_all_layers_and_equal_ones_stand_by_layer_and_index() -> None:
    scores = torch.tensor([[0.0, 2.0, 1.0], [2.0, -1.0, 3.0]])
    found = best_of(scores, (1, 3), 4, values=scores * 10)
    assert found.neurons == (Neuron(3, 2), Neuron(1, 1), Neuron(3, 0), Neuron(1, 2))
    assert found.scores is not None
    assert found.scores.tolist() == [3.0, 2.0, 2.0, 1.0]
    assert found.values is not None
    assert found.values.tolist() == [30.0, 20.0, 20.0, 10.0]


def test_a_neuron_without_a_score_is_not_among_the_best() -> None:
    scores = torch.tensor([[-torch.inf, 2.0, -torch.inf]])
    assert best_of(scores, (0,), 3).neurons == (Neuron(0, 1),)


def test_random_sets_have_as_many_neurons_in_each_layer_and_none_of_the_set() -> None:
    found = NeuronSet((Neuron(2, 5), Neuron(0, 3), Neuron(2, 1), Neuron(2, 9)))
    sets = random_sets(found, 16, 20, seed=1)
    assert len(set(sets)) == 20
    for drawn in sets:
        assert [neuron.layer for neuron in drawn] == [2, 0, 2, 2]
        assert len(set(drawn)) == 4
        assert not set(drawn) & set(found.neurons)
    assert sets == random_sets(found, 16, 20, seed=1)
    assert sets != random_sets(found, 16, 20, seed=2)


def test_random_sets_reach_every_other_neuron() -> None:
    sets = random_sets(NeuronSet((Neuron(0, 3),)), 8, 200, seed=0)
    assert {neuron.neuron for drawn in sets for neuron in drawn} == set(range(8)) - {3}


def test_a_set_of_more_than_half_a_layer_has_no_random_ones_beside_it() -> None:
    with pytest.raises(InvalidArgument, match="layer 0 has 3 neurons"):
        random_sets(NeuronSet(tuple(Neuron(0, i) for i in range(5))), 8, 1, seed=0)


def put(store: ArtifactStore, neurons: list[tuple[int, int]], scores: bool = True) -> str:
    ranked = torch.arange(len(neurons), 0, -1).float() if scores else None
    found = NeuronSet(tuple(Neuron(*neuron) for neuron in neurons), ranked)
    return store.put(ArtifactKind.NEURON_SET, found.tensors(), model_fingerprint=INFO.fingerprint).id


def test_overlap_is_that_of_the_definitions() -> None:
    store = ArtifactStore("memory://compare")
    a = put(store, [(0, 1), (0, 2), (1, 3), (1, 4), (2, 0)])
    b = put(store, [(0, 2), (0, 1), (1, 4), (3, 0)])
    (overlap,) = compare([a, b], 0, store, INFO)
    assert overlap.common == 3
    assert overlap.by_layer == {0: 2, 1: 1}
    assert overlap.jaccard == 3 / 6
    assert overlap.overlap_coefficient == 3 / 4
    assert overlap.expected_common == pytest.approx(2 * 2 / 16 + 2 * 1 / 16)
    first, second = hypergeom(16, 2, 2), hypergeom(16, 2, 1)
    direct = sum(first.pmf(i) * second.pmf(j) for i in range(3) for j in range(2) if i + j >= 3)
    assert overlap.p_value == pytest.approx(direct)


def test_the_p_of_an_overlap_is_the_share_of_random_sets_that_reach_it() -> None:
    store = ArtifactStore("memory://compare-random")
    a = put(store, [(0, i) for i in range(6)] + [(1, i) for i in range(4)])
    b = put(store, [(0, i) for i in range(3, 8)] + [(1, i) for i in range(2, 8)])
    (overlap,) = compare([a, b], 0, store, INFO)
    generator = np.random.default_rng(0)
    reached = 0
    for _ in range(20_000):
        in_zero = np.isin(generator.choice(16, 5, replace=False), np.arange(6)).sum()
        in_one = np.isin(generator.choice(16, 6, replace=False), np.arange(4)).sum()
        reached += in_zero + in_one >= overlap.common
    assert overlap.p_value == pytest.approx(reached / 20_000, abs=0.02)


def test_only_the_best_are_compared_where_so_many_are_asked_for() -> None:
    store = ArtifactStore("memory://compare-best")
    a, b = put(store, [(0, 1), (0, 2)]), put(store, [(0, 2), (0, 1)])
    assert compare([a, b], 0, store, INFO)[0].common == 2
    assert compare([a, b], 1, store, INFO)[0].common == 0


def test_so_many_sets_that_their_pairs_take_minutes_are_refused() -> None:
    store = ArtifactStore("memory://compare-many")
    own = put(store, [(0, 1)])
    with pytest.raises(InvalidArgument, match="neuron_sets: expected 2 to 64 sets, got 65"):
        compare([own] * 65, 0, store, INFO)


def test_one_set_or_one_without_scores_is_refused() -> None:
    store = ArtifactStore("memory://compare-refused")
    a, b = put(store, [(0, 1)]), put(store, [(0, 1)], scores=False)
    with pytest.raises(InvalidArgument):
        compare([a], 0, store, INFO)
    with pytest.raises(FailedPrecondition) as refused:
        compare([a, b], 1, store, INFO)
    assert refused.value.field == "top_k"

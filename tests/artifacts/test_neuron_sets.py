"""Which neurons a selection names, in which order, and what the set says of each."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from patchclamp_server.artifacts.neuron_sets import Neuron, NeuronSelection, NeuronSet, select
from patchclamp_server.artifacts.store import ArtifactStore
from patchclamp_server.artifacts.types import ArtifactKind
from patchclamp_server.errors import FailedPrecondition, InvalidArgument, NotFound
from patchclamp_server.model.info import ModelInfo

INFO = ModelInfo("m", "sha256:m", "llama", 4, 8, 16, 2, 2, 4, 32, 64, "float32", "cpu", {})
FOUND = NeuronSet(
    (Neuron(2, 5), Neuron(0, 3), Neuron(2, 1)), torch.tensor([3.0, 2.0, 1.0]), torch.tensor([20.0, -20.0, 0.5])
)


@pytest.fixture
def store() -> ArtifactStore:
    return ArtifactStore("memory://neuron-sets")


def put(store: ArtifactStore, found: NeuronSet, fingerprint: str = INFO.fingerprint) -> str:
    return store.put(ArtifactKind.NEURON_SET, found.tensors(), model_fingerprint=fingerprint).id


def test_a_stored_set_comes_back_with_the_best_first(store: ArtifactStore) -> None:
    found = select(NeuronSelection(neuron_set=put(store, FOUND)), store, INFO, "neurons")
    assert found.neurons == FOUND.neurons
    assert found.scores is not None
    assert found.scores.tolist() == [3.0, 2.0, 1.0]
    assert found.values is not None
    assert found.values.tolist() == [20.0, -20.0, 0.5]


def test_the_best_of_a_set_are_those_with_the_largest_scores(store: ArtifactStore) -> None:
    found = select(NeuronSelection(neuron_set=put(store, FOUND), top_k=2), store, INFO, "neurons")
    assert found.neurons == (Neuron(2, 5), Neuron(0, 3))


def test_listed_neurons_keep_their_order_and_have_no_numbers(store: ArtifactStore) -> None:
    found = select(NeuronSelection((Neuron(3, 1), Neuron(1, 2))), store, INFO, "neurons")
    assert found.neurons == (Neuron(3, 1), Neuron(1, 2))
    assert found.scores is None
    assert found.values is None


@pytest.mark.parametrize(
    ("selection", "error", "field"),
    [
        (NeuronSelection(), InvalidArgument, "neurons"),
        (NeuronSelection((Neuron(0, 0),), "set"), InvalidArgument, "neurons"),
        (NeuronSelection((Neuron(0, 0),), top_k=1), InvalidArgument, "neurons.top_k"),
        (NeuronSelection((Neuron(0, 0), Neuron(4, 0))), InvalidArgument, "neurons.neurons.neurons[1].layer"),
        (NeuronSelection((Neuron(0, 16),)), InvalidArgument, "neurons.neurons.neurons[0].neuron"),
        (NeuronSelection((Neuron(0, 1), Neuron(0, 1))), InvalidArgument, "neurons.neurons.neurons[1]"),
        (NeuronSelection(neuron_set="nothing"), NotFound, "neurons.neuron_set"),
    ],
)
def test_a_selection_that_names_no_neurons_of_the_model_is_refused_by_its_field(
    store: ArtifactStore, selection: NeuronSelection, error: type[Any], field: str
) -> None:
    with pytest.raises(error) as refused:
        select(selection, store, INFO, "neurons")
    assert refused.value.field == field


def test_a_set_of_another_model_is_refused(store: ArtifactStore) -> None:
    ref = put(store, FOUND, "sha256:other")
    with pytest.raises(FailedPrecondition, match="sha256:other"):
        select(NeuronSelection(neuron_set=ref), store, INFO, "neurons")


def test_the_best_of_a_set_without_scores_cannot_be_asked_for(store: ArtifactStore) -> None:
    ref = put(store, replace(FOUND, scores=None))
    with pytest.raises(FailedPrecondition, match="no scores"):
        select(NeuronSelection(neuron_set=ref, top_k=1), store, INFO, "neurons")


def test_another_kind_of_artifact_is_no_neuron_set(store: ArtifactStore) -> None:
    ref = store.put(ArtifactKind.HEAD_SET, {"scores": torch.rand(2, 2)}, model_fingerprint=INFO.fingerprint).id
    with pytest.raises(InvalidArgument, match="head_set"):
        select(NeuronSelection(neuron_set=ref), store, INFO, "neurons")

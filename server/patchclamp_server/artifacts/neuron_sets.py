"""Sets of neurons: which neurons a stored set or a list names, and what the set says of each."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from patchclamp_server.artifacts.store import ArtifactStore
from patchclamp_server.artifacts.types import Artifact, ArtifactKind
from patchclamp_server.errors import FailedPrecondition, InvalidArgument, about
from patchclamp_server.model.info import ModelInfo


class Neuron(NamedTuple):
    layer: int
    neuron: int


@dataclass(frozen=True)
class NeuronSelection:
    """Either `neurons`, or the id or tag of a neuron set: its `top_k` best by score, or with 0 all of them."""

    neurons: tuple[Neuron, ...] = ()
    neuron_set: str = ""
    top_k: int = 0


@dataclass(frozen=True, eq=False)
class NeuronSet:
    """Neurons with what is known of each: `scores` and `values` float32 [n], or None.

    With scores the best neuron stands first; equal ones, and those of a set without scores, are ordered as they were
    given. `values` is what an edit sets a neuron to by default.
    """

    neurons: tuple[Neuron, ...]
    scores: Tensor | None = None
    values: Tensor | None = None

    def first(self, n: int) -> "NeuronSet":
        """Returns the n best."""
        scores = None if self.scores is None else self.scores[:n]
        return NeuronSet(self.neurons[:n], scores, None if self.values is None else self.values[:n])

    def by_layer(self) -> dict[int, Tensor]:
        """Returns the places [n] in `neurons` of the neurons of each layer, layers ascending."""
        places: defaultdict[int, list[int]] = defaultdict(list)
        for place, neuron in enumerate(self.neurons):
            places[neuron.layer].append(place)
        return {layer: torch.tensor(places[layer], dtype=torch.int64) for layer in sorted(places)}

    def tensors(self) -> dict[str, Tensor]:
        """Returns what is stored of it as a neuron_set artifact."""
        found: dict[str, Tensor] = {}
        indices = torch.tensor([neuron.neuron for neuron in self.neurons], dtype=torch.int64)
        for layer, places in self.by_layer().items():
            found[f"layer.{layer}.neurons"] = indices[places]
            for kind, numbers in (("scores", self.scores), ("values", self.values)):
                if numbers is not None:
                    found[f"layer.{layer}.{kind}"] = numbers[places].float()
        return found


def stored(artifact: Artifact) -> NeuronSet:
    """Returns the neurons of a neuron_set artifact of any model. FailedPrecondition: another kind of artifact.

    Scores, and values, are those of a set that has them at every layer.
    """
    layers = artifact.info.layers
    neurons = [Neuron(layer, index) for layer in layers for index in artifact.neurons(layer)[0].tolist()]
    scores = _everywhere([artifact.neuron_scores(layer) for layer in layers])
    values = _everywhere([artifact.neurons(layer)[1] for layer in layers])
    if scores is None:
        return NeuronSet(tuple(neurons), None, values)
    order = scores.argsort(descending=True, stable=True)
    ranked = tuple(neurons[place] for place in order.tolist())
    return NeuronSet(ranked, scores[order], None if values is None else values[order])


def load(ref: str, store: ArtifactStore, path: str) -> tuple[Artifact, NeuronSet]:
    """Returns a stored set of any model, by id or tag.

    Raises NotFound, or InvalidArgument for another kind of artifact; both name `path`.
    """
    with about(path):
        artifact = store.get(ref)
    if artifact.info.kind is not ArtifactKind.NEURON_SET:
        raise InvalidArgument(path, f"{ref} is a {artifact.info.kind.value}, not a neuron_set")
    return artifact, stored(artifact)


def select(selection: NeuronSelection, store: ArtifactStore, info: ModelInfo, path: str) -> NeuronSet:
    """Returns the neurons selected, at least one.

    Raises InvalidArgument (field path), NotFound (neuron set) or FailedPrecondition (a set of another model, or one
    without scores where the best are asked for).
    """
    if bool(selection.neurons) == bool(selection.neuron_set):
        raise InvalidArgument(path, "give neurons or a neuron_set, one of both")
    if selection.neurons:
        if selection.top_k:
            raise InvalidArgument(f"{path}.top_k", "is for a neuron_set; listed neurons are all taken")
        return NeuronSet(_listed(selection.neurons, info, f"{path}.neurons.neurons"))
    artifact, found = load(selection.neuron_set, store, f"{path}.neuron_set")
    made_for = artifact.info.model_fingerprint
    if made_for != info.fingerprint:
        message = f"{selection.neuron_set} was made for model {made_for}, served is {info.fingerprint}"
        raise FailedPrecondition(f"{path}.neuron_set", message)
    _listed(found.neurons, info, f"{path}.neuron_set")
    if not selection.top_k:
        return found
    if found.scores is None:
        raise FailedPrecondition(f"{path}.top_k", f"{selection.neuron_set} has no scores; leave top_k out")
    return found.first(selection.top_k)


def _everywhere(parts: Sequence[Tensor | None]) -> Tensor | None:
    given = [part.float() for part in parts if part is not None]
    return torch.cat(given) if len(given) == len(parts) else None


def _listed(neurons: tuple[Neuron, ...], info: ModelInfo, path: str) -> tuple[Neuron, ...]:
    seen: set[Neuron] = set()
    for i, neuron in enumerate(neurons):
        if not 0 <= neuron.layer < info.n_layers:
            raise InvalidArgument(f"{path}[{i}].layer", f"unknown layer {neuron.layer}: the model has {info.n_layers}")
        if not 0 <= neuron.neuron < info.d_ff:
            raise InvalidArgument(f"{path}[{i}].neuron", f"unknown neuron {neuron.neuron}: a layer has {info.d_ff}")
        if neuron in seen:
            raise InvalidArgument(f"{path}[{i}]", f"neuron {neuron.neuron} of layer {neuron.layer} is named twice")
        seen.add(neuron)
    return neurons

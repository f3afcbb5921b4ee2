"""The neurons and heads of a circuit, and random sets beside them: as many in each layer, none of the circuit."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from patchclamp_server.analysis.heads.sets.edits import HeadEditMode, head_edits
from patchclamp_server.analysis.neurons.edits import EditValues, NeuronEditMode, edit_values, neuron_edits
from patchclamp_server.analysis.neurons.random_sets import random_sets
from patchclamp_server.analysis.neurons.stored import best_of
from patchclamp_server.analysis.steering.concept_circuit.writes import Writers, Writes
from patchclamp_server.artifacts.head_sets import Head, ranked
from patchclamp_server.artifacts.neuron_sets import Neuron, NeuronSet
from patchclamp_server.errors import InvalidArgument
from patchclamp_server.interventions.bind import bind
from patchclamp_server.interventions.bound import BoundProgram
from patchclamp_server.interventions.program import Program, Scope
from patchclamp_server.model.info import ModelInfo


@dataclass(frozen=True, eq=False)
class Circuit:
    """Neurons and heads, the best first, both at least one."""

    neurons: NeuronSet
    heads: tuple[Head, ...]


def best_circuit(writes: Writes, n_neurons: int, n_heads: int) -> Circuit:
    """Returns those that write most along the direction, at most as many as are asked for, and none that writes nothing
    along it or against it. Of heads, at most half of those that write to the site: others are left for a random set.

    Raises InvalidArgument where no neuron, or no head, writes along the direction."""
    layers = range(len(writes.neurons))
    positive = writes.neurons.masked_fill(writes.neurons <= 0, -float("inf"))
    neurons = best_of(positive, layers, n_neurons)
    most = max(1, int(writes.heads.isfinite().sum()) // 2)
    heads = tuple(head for head in ranked(writes.heads)[: min(n_heads, most)] if writes.heads[head] > 0)
    for found, name in ((neurons.neurons, "neuron"), (heads, "head")):
        if not found:
            raise InvalidArgument(
                "scenarios",
                f"no {name} before the best layer writes along the direction: the texts differ by their own tokens "
                "alone; pool other tokens, or name later layers",
            )
    return Circuit(neurons, heads)


def random_neurons(found: NeuronSet, info: ModelInfo, n: int, seed: int) -> tuple[tuple[Neuron, ...], ...]:
    """Raises InvalidArgument on "neurons" where a layer has too few others."""
    return random_sets(found, info.d_ff, n, seed, "neurons")


def random_heads(
    heads: Sequence[Head], writers: Writers, info: ModelInfo, n: int, seed: int
) -> tuple[tuple[Head, ...], ...]:
    """Returns n sets of as many other heads, as many in each layer as far as it has others.

    A layer has few heads. Where a circuit has more than half of them, the rest is drawn from all other heads that write
    to the site: heads after it would change nothing, and be no control. Raises InvalidArgument on "heads" where these
    are too few.
    """
    named, wanted = set(heads), Counter(head.layer for head in heads)
    others = [[h for h in range(info.n_heads) if Head(layer, h) not in named] for layer in range(info.n_layers)]
    room = sum(len(others[layer]) for layer in writers.head_layers)
    if room < len(heads):
        raise InvalidArgument("heads", f"{len(heads)} heads leave {room} others: too few for a random set of that size")
    generator = np.random.default_rng(seed)
    found = []
    for _ in range(n):
        drawn = [
            Head(layer, h)
            for layer, k in sorted(wanted.items())
            for h in generator.choice(others[layer], min(k, len(others[layer])), replace=False).tolist()
        ]
        if len(drawn) < len(heads):
            left = [Head(layer, h) for layer in writers.head_layers for h in others[layer] if (layer, h) not in drawn]
            more = generator.choice(len(left), len(heads) - len(drawn), replace=False)
            drawn += [left[i] for i in more.tolist()]
        found.append(tuple(sorted(drawn)))
    return tuple(found)


def unmatched_heads(heads: Sequence[Head], info: ModelInfo) -> int:
    """Returns how many heads of a random set come from other layers than those of the circuit."""
    return sum(max(0, 2 * k - info.n_heads) for k in Counter(head.layer for head in heads).values())


def zeroing(neurons: Sequence[Neuron], heads: Sequence[Head], info: ModelInfo) -> BoundProgram | None:
    """Returns the program that sets neurons, and outputs of heads, to 0 at every token; None where there are none."""
    edits = head_edits(heads, HeadEditMode.ZERO)
    if neurons:
        edits += neuron_edits(neurons, _zeros(neurons), Scope())
    return bind(Program(edits), info) if edits else None


def _zeros(neurons: Sequence[Neuron]) -> EditValues:
    return edit_values(NeuronSet(tuple(neurons)), NeuronEditMode.ZERO, None, None)

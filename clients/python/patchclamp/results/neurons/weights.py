"""What the weights of neurons say: tokens that they stand for, and neurons of words."""

from dataclasses import dataclass

from patchclamp.neurons import Neuron
from patchclamp.results.neurons.stored import StoredNeurons
from patchclamp.results.record import Record


@dataclass(frozen=True)
class DecodedToken(Record):
    """Holds a token of a row.

    product: of its unembedding and the weights. effect: the product with the down column; its sign says whether a
    positive activation makes the token likelier.
    """

    id: int
    text: str
    product: float
    effect: float


@dataclass(frozen=True)
class DecodedRow(Record):
    """Holds the extreme tokens of one row of weights: "gate", "up" or "down".

    top, bottom: largest and smallest products, the extreme first; …_z: how far the first is from the mean, in
    deviations over the vocabulary.
    """

    weights: str
    top: tuple[DecodedToken, ...]
    bottom: tuple[DecodedToken, ...]
    top_z: float
    bottom_z: float


@dataclass(frozen=True)
class DecodedNeuron(Record):
    neuron: Neuron
    rows: tuple[DecodedRow, ...]


@dataclass(frozen=True)
class DecodedNeurons(Record):
    """Holds neurons that were decoded together: one event of the stream."""

    neurons: tuple[DecodedNeuron, ...]


@dataclass(frozen=True)
class FoundNeurons(Record):
    """Holds the neurons that write most in favour of words, or along a vector.

    tokens: those that stand for the words.
    """

    found: StoredNeurons
    tokens: tuple[DecodedToken, ...]

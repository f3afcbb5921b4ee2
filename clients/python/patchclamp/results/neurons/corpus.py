"""What neurons do over much text: the census, descriptions, and matches in another checkpoint."""

from dataclasses import dataclass

from patchclamp.neurons import Neuron
from patchclamp.results.neurons.stored import StoredNeurons
from patchclamp.results.record import Record


@dataclass(frozen=True)
class LayerCensus(Record):
    """Counts the neurons of a layer by class. mean_rate: share of tokens that a neuron fires at, on average."""

    layer: int
    neurons: int
    dead: int
    rare: int
    always: int
    token_detectors: int
    ngram_detectors: int
    positional: int
    mean_rate: float


@dataclass(frozen=True)
class CensusClass(Record):
    """Holds the stored set of a class: "dead", "rare", "always", "token", "ngram" or "positional"."""

    neuron_class: str
    stored: StoredNeurons


@dataclass(frozen=True)
class TokenDetector(Record):
    """Holds a neuron that fires at a token, or at the end of an n-gram.

    recall: fired / occurrences. elsewhere: share of its firings that are at something else.
    """

    neuron: Neuron
    token_ids: tuple[int, ...]
    text: str
    occurrences: int
    fired: int
    recall: float
    elsewhere: float


@dataclass(frozen=True)
class PositionalNeuron(Record):
    """Holds a neuron that fires by position. bits: of mutual information. rates: by bin."""

    neuron: Neuron
    bits: float
    rates: tuple[float, ...]


@dataclass(frozen=True)
class NeuronCensus(Record):
    """Holds what a census counted over `tokens`, of which resumed_tokens were seen before an interruption.

    classes: those that have any neuron. detectors, positional: the best, at most 1,000 of each.
    """

    tokens: int
    texts: int
    resumed_tokens: int
    tokens_per_second: float
    layers: tuple[LayerCensus, ...]
    classes: tuple[CensusClass, ...]
    detectors: tuple[TokenDetector, ...]
    positional: tuple[PositionalNeuron, ...]


@dataclass(frozen=True)
class ContextToken(Record):
    id: int
    text: str
    value: float


@dataclass(frozen=True)
class NeuronContext(Record):
    """Holds tokens around one at which a neuron is large.

    text_index: which text of the source. position: of the token with this value, in the text.
    """

    text_index: int
    position: int
    value: float
    tokens: tuple[ContextToken, ...]


@dataclass(frozen=True)
class DescriptionScore(Record):
    """Scores a candidate description.

    pmi: what the contexts add to its log-probability, in nats a token. causal: what clamping the neuron adds, None when
    it was not asked for; causal_z: among random neurons of the layer.
    """

    description: str
    pmi: float
    causal: float | None = None
    causal_z: float | None = None


@dataclass(frozen=True)
class NeuronDescription(Record):
    """Holds where a neuron is largest, and scores of descriptions. rate: share of tokens at which it is above 0."""

    neuron: Neuron
    contexts: tuple[NeuronContext, ...]
    scores: tuple[DescriptionScore, ...]
    tokens_seen: int
    rate: float
    mean: float
    max: float


@dataclass(frozen=True)
class NeuronMatch(Record):
    """Holds a neuron and the one of the other checkpoint that goes with it most. mutual: each is the other's best."""

    neuron: Neuron
    other: Neuron
    correlation: float
    mutual: bool


@dataclass(frozen=True)
class MatchedNeurons(Record):
    """Holds what was matched over `tokens`.

    ported: the mutual matches, as a set of the other model. matches: best first, at most 10,000 of `neurons`.
    shuffled_mean_correlation: mean_correlation with the tokens of the other model shuffled.
    """

    ported: StoredNeurons
    matches: tuple[NeuronMatch, ...]
    neurons: int
    mutual: int
    tokens: int
    mean_correlation: float
    shuffled_mean_correlation: float

"""Results of NeuronService."""

from patchclamp.results.neurons.corpus import (
    CensusClass,
    ContextToken,
    DescriptionScore,
    LayerCensus,
    MatchedNeurons,
    NeuronCensus,
    NeuronContext,
    NeuronDescription,
    NeuronMatch,
    PositionalNeuron,
    TokenDetector,
)
from patchclamp.results.neurons.effect import (
    NeuronEditCollector,
    NeuronEditEffect,
    NeuronEditEvent,
    NeuronEditPoint,
    NeuronMeasurement,
)
from patchclamp.results.neurons.localized import LocalizedNeurons, LocalizedSet, SparseProbe
from patchclamp.results.neurons.parts import DecodeCollector, DescribeCollector
from patchclamp.results.neurons.stored import LayerCount, NeuronSetComparison, ScoredNeuron, StoredNeurons
from patchclamp.results.neurons.weights import DecodedNeuron, DecodedNeurons, DecodedRow, DecodedToken, FoundNeurons

__all__ = [
    "CensusClass",
    "ContextToken",
    "DecodeCollector",
    "DecodedNeuron",
    "DecodedNeurons",
    "DecodedRow",
    "DecodedToken",
    "DescribeCollector",
    "DescriptionScore",
    "FoundNeurons",
    "LayerCensus",
    "LayerCount",
    "LocalizedNeurons",
    "LocalizedSet",
    "MatchedNeurons",
    "NeuronCensus",
    "NeuronContext",
    "NeuronDescription",
    "NeuronEditCollector",
    "NeuronEditEffect",
    "NeuronEditEvent",
    "NeuronEditPoint",
    "NeuronMatch",
    "NeuronMeasurement",
    "NeuronSetComparison",
    "PositionalNeuron",
    "ScoredNeuron",
    "SparseProbe",
    "StoredNeurons",
    "TokenDetector",
]

"""Requests of NeuronService."""

from patchclamp.requests.neurons.corpus import (
    CensusNeuronsOptions,
    DescribeNeuronsOptions,
    MatchNeuronsOptions,
    census_neurons,
    describe_neurons,
    match_neurons,
)
from patchclamp.requests.neurons.effect import EvaluateNeuronEditOptions, evaluate_neuron_edit
from patchclamp.requests.neurons.found import (
    DecodeNeuronsOptions,
    FindNeuronsOptions,
    LocalizeNeuronsOptions,
    compare_neuron_sets,
    decode_neurons,
    find_neurons,
    localize_neurons,
)

__all__ = [
    "CensusNeuronsOptions",
    "DecodeNeuronsOptions",
    "DescribeNeuronsOptions",
    "EvaluateNeuronEditOptions",
    "FindNeuronsOptions",
    "LocalizeNeuronsOptions",
    "MatchNeuronsOptions",
    "census_neurons",
    "compare_neuron_sets",
    "decode_neurons",
    "describe_neurons",
    "evaluate_neuron_edit",
    "find_neurons",
    "localize_neurons",
    "match_neurons",
]

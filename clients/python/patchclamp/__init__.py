"""Client of Patchclamp: generate text while you steer activations and clamp neurons, for every request separately.

from patchclamp import Client
from patchclamp.programs import add, generated

with Client() as client:
    stream = client.generate("I feel", program=[add("joyful", layers=range(10, 15), scope=generated())])
    for piece in stream.text:
        print(piece, end="", flush=True)
    print(stream.result().receipt)
"""

from patchclamp.aio import AsyncClient
from patchclamp.client import Client
from patchclamp.errors import FieldViolation, PatchclampError
from patchclamp.programs import EditOptions, NeuronEditOptions, Program, ReadoutOptions, VectorEditOptions
from patchclamp.requests import (
    AttributeOptions,
    CalibrateOptions,
    CalibrateVectorOptions,
    CensusNeuronsOptions,
    CircuitOptions,
    ConceptCircuitOptions,
    DecodeNeuronsOptions,
    DescribeNeuronsOptions,
    DetectConceptOptions,
    DetectOptions,
    EvaluateNeuronEditOptions,
    EvaluateOptions,
    ExtractOptions,
    FindNeuronsOptions,
    FollowOptions,
    GenerateOptions,
    HeadEditOptions,
    HeadScoreOptions,
    LocalizeNeuronsOptions,
    MatchNeuronsOptions,
    PatchActivationsOptions,
    ProbeOptions,
    PromptOptions,
    ReadActivationsOptions,
    ReferenceOptions,
    ScoreOptions,
    SearchFeaturesOptions,
    StartWatchOptions,
    SubspaceOptions,
    UploadOptions,
    WatchOptions,
)
from patchclamp.retry import Retry
from patchclamp.sparsity import LayerOptions, PolicyOptions

__all__ = [
    "AsyncClient",
    "AttributeOptions",
    "CalibrateOptions",
    "CalibrateVectorOptions",
    "CensusNeuronsOptions",
    "CircuitOptions",
    "Client",
    "ConceptCircuitOptions",
    "DecodeNeuronsOptions",
    "DescribeNeuronsOptions",
    "DetectConceptOptions",
    "DetectOptions",
    "EditOptions",
    "EvaluateNeuronEditOptions",
    "EvaluateOptions",
    "ExtractOptions",
    "FieldViolation",
    "FindNeuronsOptions",
    "FollowOptions",
    "GenerateOptions",
    "HeadEditOptions",
    "HeadScoreOptions",
    "LayerOptions",
    "LocalizeNeuronsOptions",
    "MatchNeuronsOptions",
    "NeuronEditOptions",
    "PatchActivationsOptions",
    "PatchclampError",
    "PolicyOptions",
    "ProbeOptions",
    "Program",
    "PromptOptions",
    "ReadActivationsOptions",
    "ReadoutOptions",
    "ReferenceOptions",
    "Retry",
    "ScoreOptions",
    "SearchFeaturesOptions",
    "StartWatchOptions",
    "SubspaceOptions",
    "UploadOptions",
    "VectorEditOptions",
    "WatchOptions",
]

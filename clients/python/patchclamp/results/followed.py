"""What a job streams to who follows it: the events of its method, which the first message tells."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from patchclamp.results.activations import (
    ActivationMean,
    ActivationMoments,
    ActivationRows,
    ReadActivations,
    ReadActivationsCollector,
)
from patchclamp.results.artifacts import Artifact, ExtractionResult
from patchclamp.results.calibration import (
    CalibrationCollector,
    CalibrationResult,
    ConceptDetection,
    ConceptDetectionCollector,
    DetectedText,
    DosePoint,
)
from patchclamp.results.concept_circuit import FoundConceptCircuit
from patchclamp.results.features import FoundFeatures
from patchclamp.results.heads import Circuit, DetectionCollector, HeadEditEffect, NeedleRun, RetrievalHeads, ScoredHeads
from patchclamp.results.jobs import JobCollector, Progress
from patchclamp.results.monitoring import ReferenceCollector
from patchclamp.results.neurons import (
    DecodeCollector,
    DecodedNeuron,
    DecodedNeurons,
    DescribeCollector,
    FoundNeurons,
    LocalizedNeurons,
    MatchedNeurons,
    NeuronCensus,
    NeuronDescription,
    NeuronEditCollector,
    NeuronEditEffect,
    NeuronEditPoint,
)
from patchclamp.results.patching import PatchCell, PatchCollector, PatchGrid
from patchclamp.results.probes import TrainedProbe
from patchclamp.results.sparsity import CalibratedProfile, EvaluationCollector, SparsityEvaluation
from patchclamp.results.subspaces import FoundSubspace
from patchclamp.v1 import job_pb2

JobResult = (
    ExtractionResult
    | CalibratedProfile
    | tuple[SparsityEvaluation, ...]
    | RetrievalHeads
    | ScoredHeads
    | HeadEditEffect
    | Circuit
    | Artifact
    | tuple[DecodedNeuron, ...]
    | FoundNeurons
    | LocalizedNeurons
    | NeuronEditEffect
    | NeuronCensus
    | tuple[NeuronDescription, ...]
    | MatchedNeurons
    | ReadActivations
    | PatchGrid
    | FoundSubspace
    | FoundFeatures
    | CalibrationResult
    | ConceptDetection
    | TrainedProbe
    | FoundConceptCircuit
)
JobEvent = (
    Progress
    | NeedleRun
    | SparsityEvaluation
    | DecodedNeurons
    | NeuronEditPoint
    | NeuronDescription
    | ActivationRows
    | ActivationMoments
    | ActivationMean
    | PatchCell
    | DosePoint
    | DetectedText
    | JobResult
)

# By the field of FollowJobResponse that holds what the method streams.
COLLECTORS: Mapping[str, Callable[[], Any]] = {
    "extract_vectors": lambda: JobCollector(ExtractionResult.from_proto),
    "calibrate_profile": lambda: JobCollector(CalibratedProfile.from_proto),
    "evaluate_profile": EvaluationCollector,
    "detect_retrieval_heads": DetectionCollector,
    "score_heads": lambda: JobCollector(ScoredHeads.from_proto),
    "evaluate_head_edit": lambda: JobCollector(HeadEditEffect.from_proto),
    "find_circuit": lambda: JobCollector(Circuit.from_proto),
    "record_reference": ReferenceCollector,
    "decode_neurons": DecodeCollector,
    "find_neurons": lambda: JobCollector(FoundNeurons.from_proto),
    "localize_neurons": lambda: JobCollector(LocalizedNeurons.from_proto),
    "evaluate_neuron_edit": NeuronEditCollector,
    "census_neurons": lambda: JobCollector(NeuronCensus.from_proto),
    "describe_neurons": DescribeCollector,
    "match_neurons": lambda: JobCollector(MatchedNeurons.from_proto),
    "read_activations": ReadActivationsCollector,
    "patch_activations": PatchCollector,
    "find_subspace": lambda: JobCollector(FoundSubspace.from_proto),
    "search_features": lambda: JobCollector(FoundFeatures.from_proto),
    "calibrate_vector": CalibrationCollector,
    "detect_concept": ConceptDetectionCollector,
    "train_probe": lambda: JobCollector(TrainedProbe.from_proto),
    "find_concept_circuit": lambda: JobCollector(FoundConceptCircuit.from_proto),
}


@dataclass
class FollowCollector:
    """Turns the messages of a followed job into the events and the result of its method."""

    _of_method: Any = None

    def add(self, message: job_pb2.FollowJobResponse) -> JobEvent:
        kind = message.WhichOneof("response")
        if kind is None:
            raise ValueError("a job is of a method that this client does not know")
        if self._of_method is None:
            self._of_method = COLLECTORS[kind]()
        event: JobEvent = self._of_method.add(getattr(message, kind))
        return event

    def result(self) -> JobResult | None:
        """Returns the result; None while it has not arrived."""
        result: JobResult | None = None if self._of_method is None else self._of_method.result()
        return result

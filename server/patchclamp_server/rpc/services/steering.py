"""SteeringService: vectors are extracted, calibrated and tried as detectors, and circuits of concepts and subspaces
found, each as a stream of progress and a result."""

from collections.abc import AsyncIterator
from functools import partial
from typing import Any

import grpc

from patchclamp.v1 import steering_pb2 as pb
from patchclamp.v1.steering_pb2_grpc import SteeringServiceServicer
from patchclamp_server.analysis.steering.calibration.job import calibrate
from patchclamp_server.analysis.steering.concept_circuit.job import find_concept_circuit
from patchclamp_server.analysis.steering.detection.job import detect
from patchclamp_server.analysis.steering.run import run
from patchclamp_server.analysis.subspaces.job import find_subspace
from patchclamp_server.rpc.call.analysis_jobs import AnalysisJobs
from patchclamp_server.rpc.codecs.calibration import decode_calibration, encode_calibration
from patchclamp_server.rpc.codecs.concept_circuit import decode_concept_circuit, encode_concept_circuit
from patchclamp_server.rpc.codecs.detection import decode_detection, encode_detection
from patchclamp_server.rpc.codecs.neurons.texts import text_fields
from patchclamp_server.rpc.codecs.steering import decode_extraction, encode_extraction
from patchclamp_server.rpc.codecs.subspaces import decode_subspace_search, encode_subspace

# The engine says "prompt" of a window that it cannot run.
WINDOWS = dict.fromkeys(("prompt", "window_tokens"), "texts.window_tokens")


class SteeringService(SteeringServiceServicer):
    def __init__(self, jobs: AnalysisJobs) -> None:
        self._jobs = jobs

    def ExtractVectors(
        self, request: pb.ExtractVectorsRequest, context: "grpc.aio.ServicerContext[Any, Any]"
    ) -> AsyncIterator[pb.ExtractVectorsResponse]:
        """Cancelling the call cancels the job with every request it has in the engine."""
        jobs = self._jobs
        return jobs.stream(
            request,
            partial(decode_extraction, request, jobs.prompts, jobs.store, jobs.model),
            partial(run, jobs.engine, jobs.store, jobs.model, jobs.prompts, jobs.door),
            encode_extraction,
            fields={"capture.scope": "scope", **(WINDOWS if request.HasField("texts") else {})},
        )

    def CalibrateVector(
        self, request: pb.CalibrateVectorRequest, context: "grpc.aio.ServicerContext[Any, Any]"
    ) -> AsyncIterator[pb.CalibrateVectorResponse]:
        """Cancelling the call cancels the job with every request it has in the engine."""
        jobs = self._jobs
        return jobs.stream(
            request,
            partial(decode_calibration, request, jobs.prompts, jobs.store, jobs.model),
            partial(calibrate, jobs.engine, jobs.store, jobs.model),
            encode_calibration,
            fields={"prompt": "prompts"},
        )

    def DetectConcept(
        self, request: pb.DetectConceptRequest, context: "grpc.aio.ServicerContext[Any, Any]"
    ) -> AsyncIterator[pb.DetectConceptResponse]:
        """Cancelling the call cancels the job with every request it has in the engine."""
        jobs = self._jobs
        return jobs.stream(
            request,
            partial(decode_detection, request, jobs.prompts, jobs.store, jobs.model),
            partial(detect, jobs.engine, jobs.prompts),
            encode_detection,
            fields={"prompt": "texts.window_tokens", **text_fields(request.texts, "texts")},
        )

    def FindConceptCircuit(
        self, request: pb.FindConceptCircuitRequest, context: "grpc.aio.ServicerContext[Any, Any]"
    ) -> AsyncIterator[pb.FindConceptCircuitResponse]:
        """Cancelling the call cancels the job with every request it has in the engine."""
        jobs = self._jobs
        return jobs.stream(
            request,
            partial(decode_concept_circuit, request, jobs.prompts, jobs.model),
            partial(find_concept_circuit, jobs.engine, jobs.store, jobs.model),
            encode_concept_circuit,
            # The engine says "prompt" of a text that it cannot run.
            fields={"prompt": "scenarios"},
        )

    def FindSubspace(
        self, request: pb.FindSubspaceRequest, context: "grpc.aio.ServicerContext[Any, Any]"
    ) -> AsyncIterator[pb.FindSubspaceResponse]:
        """Cancelling the call ends the job after the slice that runs."""
        jobs = self._jobs
        return jobs.stream(
            request,
            partial(decode_subspace_search, request, jobs.prompts, jobs.model),
            partial(find_subspace, jobs.engine, jobs.store, jobs.model),
            encode_subspace,
            exclusive=True,
        )

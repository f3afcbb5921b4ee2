"""SteeringService extracts steering vectors and finds subspaces, as streams of progress and a result."""

from collections.abc import AsyncIterator
from functools import partial
from typing import Any

import grpc

from patchclamp.v1 import steering_pb2 as pb
from patchclamp.v1.steering_pb2_grpc import SteeringServiceServicer
from patchclamp_server.analysis.steering.job import extract
from patchclamp_server.analysis.subspaces.job import find_subspace
from patchclamp_server.rpc.call.analysis_jobs import AnalysisJobs
from patchclamp_server.rpc.codecs.steering import decode_extraction, encode_extraction
from patchclamp_server.rpc.codecs.subspaces import decode_subspace_search, encode_subspace


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
            partial(decode_extraction, request, jobs.prompts, jobs.model),
            partial(extract, jobs.engine, jobs.store, jobs.model),
            encode_extraction,
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

"""ActivationService: activations of texts, read row by row or reduced, and put into other runs."""

from collections.abc import AsyncIterator
from functools import partial
from typing import Any

from patchclamp.v1 import activation_pb2 as pb
from patchclamp.v1.activation_pb2_grpc import ActivationServiceServicer
from patchclamp_server.analysis.activation_reading.job import read_activations
from patchclamp_server.analysis.patching.job import patch_activations
from patchclamp_server.rpc.call.analysis_jobs import AnalysisJobs
from patchclamp_server.rpc.codecs.activation import decode_reading, encode_reading, reading_fields
from patchclamp_server.rpc.codecs.patching import decode_patching, encode_patching

Context = Any


class ActivationService(ActivationServiceServicer):
    """Raises the errors of errors.py; an interceptor turns them into statuses. Cancelling a call ends its job, with
    every request it has in the engine."""

    def __init__(self, jobs: AnalysisJobs) -> None:
        self._jobs = jobs

    def ReadActivations(
        self, request: pb.ReadActivationsRequest, context: Context
    ) -> AsyncIterator[pb.ReadActivationsResponse]:
        jobs = self._jobs
        return jobs.stream(
            request,
            partial(decode_reading, request, jobs.prompts, jobs.store, jobs.model),
            partial(read_activations, jobs.engine, jobs.store, jobs.model, jobs.prompts),
            encode_reading,
            fields=reading_fields(request),
        )

    def PatchActivations(
        self, request: pb.PatchActivationsRequest, context: Context
    ) -> AsyncIterator[pb.PatchActivationsResponse]:
        jobs = self._jobs
        return jobs.stream(
            request,
            partial(decode_patching, request, jobs.prompts, jobs.model),
            partial(patch_activations, jobs.engine),
            encode_patching,
            # The engine says so of a prompt that it cannot run.
            fields={"prompt": "pairs"},
        )

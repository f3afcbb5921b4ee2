"""SparsityService calibrates and evaluates sparse policies as streams, and returns the sets they fix for prompts."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from functools import partial
from typing import Any

from patchclamp.v1 import sparsity_pb2 as pb
from patchclamp.v1.sparsity_pb2_grpc import SparsityServiceServicer
from patchclamp_server.analysis.progress import Progress
from patchclamp_server.analysis.sparsity.core_neurons import core_neurons
from patchclamp_server.analysis.sparsity.job import Evaluation, Text, calibrate_profile, evaluate
from patchclamp_server.rpc.call.analysis_jobs import AnalysisJobs
from patchclamp_server.rpc.codecs.sparsity_job import (
    decode_calibration,
    decode_core_request,
    decode_evaluation,
    encode_cores,
    encode_evaluation,
    encode_profile,
)
from patchclamp_server.sparsity.binder import Binder, Bound

Context = Any


class SparsityService(SparsityServiceServicer):
    """Raises the errors of errors.py; an interceptor turns them into statuses. Cancelling a call ends its job."""

    def __init__(self, jobs: AnalysisJobs, binder: Binder) -> None:
        self._jobs = jobs
        self._binder = binder

    def CalibrateProfile(
        self, request: pb.CalibrateProfileRequest, context: Context
    ) -> AsyncIterator[pb.CalibrateProfileResponse]:
        jobs = self._jobs
        return jobs.stream(
            request,
            partial(decode_calibration, request, jobs.prompts, jobs.model, jobs.engine.sparse_model),
            partial(calibrate_profile, jobs.engine, jobs.store, jobs.model),
            encode_profile,
            exclusive=True,
        )

    def EvaluateProfile(
        self, request: pb.EvaluateProfileRequest, context: Context
    ) -> AsyncIterator[pb.EvaluateProfileResponse]:
        jobs = self._jobs

        def run(job: tuple[list[Bound], Text]) -> AsyncGenerator[Progress | Evaluation, None]:
            return evaluate(jobs.engine, *job, speed=request.measure_speed)

        decode = partial(decode_evaluation, request, jobs.prompts, jobs.model, self._binder)
        return jobs.stream(request, decode, run, encode_evaluation, exclusive=True)

    async def PredictCoreNeurons(
        self, request: pb.PredictCoreNeuronsRequest, context: Context
    ) -> pb.PredictCoreNeuronsResponse:
        jobs = self._jobs
        bound, prompts, layers = await jobs.begin(
            request, partial(decode_core_request, request, jobs.prompts, jobs.model, self._binder)
        )

        cores = await jobs.door.result(lambda: core_neurons(jobs.engine, bound.selector, prompts))
        return await asyncio.to_thread(encode_cores, cores, layers)

"""SparsityService: calibration and evaluation of sparse policies as streams, and the sets that they fix for prompts."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

from patchclamp.v1 import sparsity_pb2 as pb
from patchclamp.v1.sparsity_pb2_grpc import SparsityServiceServicer
from patchclamp_server.analysis.exclusive import ExclusiveJobs, Job
from patchclamp_server.analysis.sparsity.core_neurons import core_neurons
from patchclamp_server.analysis.sparsity.job import calibrate_profile, evaluate
from patchclamp_server.artifacts.store import ArtifactStore
from patchclamp_server.engine.engine import Engine
from patchclamp_server.model.info import ModelInfo
from patchclamp_server.rpc.call.calls import check_model
from patchclamp_server.rpc.codecs.sparsity_job import (
    decode_calibration,
    decode_core_request,
    decode_evaluation,
    encode_cores,
    encode_evaluation,
    encode_profile,
    encode_progress,
)
from patchclamp_server.sparsity.binder import Binder
from patchclamp_server.text.prompt import PromptEncoder

Context = Any


class SparsityService(SparsityServiceServicer):
    """Raises the errors of errors.py; an interceptor turns them into statuses. Cancelling a call ends its job."""

    def __init__(
        self,
        engine: Engine,
        prompts: PromptEncoder,
        store: ArtifactStore,
        model_info: ModelInfo,
        binder: Binder,
        jobs: ExclusiveJobs,
    ) -> None:
        self._engine = engine
        self._prompts = prompts
        self._store = store
        self._model = model_info
        self._binder = binder
        self._jobs = jobs

    async def CalibrateProfile(
        self, request: pb.CalibrateProfileRequest, context: Context
    ) -> AsyncIterator[pb.CalibrateProfileResponse]:
        check_model(request.model, self._model)
        model = self._engine.sparse_model
        asked = await self._prompts.analysis.run(decode_calibration, request, self._prompts, self._model, model)
        await asyncio.to_thread(self._store.check_tags, asked.tags)

        def work(job: Job[pb.CalibrateProfileResponse]) -> None:
            def progress(stage: str, done: int, total: int) -> None:
                job.emit(pb.CalibrateProfileResponse(progress=encode_progress(stage, done, total)))

            result = calibrate_profile(model, self._store, self._model, asked, progress)
            job.emit(pb.CalibrateProfileResponse(result=encode_profile(result)))

        async with aclosing(self._jobs.stream(work)) as responses:
            async for response in responses:
                yield response

    async def EvaluateProfile(
        self, request: pb.EvaluateProfileRequest, context: Context
    ) -> AsyncIterator[pb.EvaluateProfileResponse]:
        check_model(request.model, self._model)
        asked, text = await self._prompts.analysis.run(
            decode_evaluation, request, self._prompts, self._model, self._binder
        )

        def work(job: Job[pb.EvaluateProfileResponse]) -> None:
            def progress(stage: str, done: int, total: int) -> None:
                job.emit(pb.EvaluateProfileResponse(progress=encode_progress(stage, done, total)))

            for evaluation in evaluate(self._engine, asked, text, progress, speed=request.measure_speed):
                job.emit(pb.EvaluateProfileResponse(evaluation=encode_evaluation(evaluation)))

        async with aclosing(self._jobs.stream(work)) as responses:
            async for response in responses:
                yield response

    async def PredictCoreNeurons(
        self, request: pb.PredictCoreNeuronsRequest, context: Context
    ) -> pb.PredictCoreNeuronsResponse:
        check_model(request.model, self._model)
        bound, prompts, layers = await self._prompts.analysis.run(
            decode_core_request, request, self._prompts, self._model, self._binder
        )

        def work(job: Job[pb.PredictCoreNeuronsResponse]) -> pb.PredictCoreNeuronsResponse:
            cores = []
            for prompt in prompts:
                job.check()
                cores.append(core_neurons(self._engine.sparse_model, bound.selector, prompt))
            return encode_cores(cores, layers)

        return await self._jobs.result(work)

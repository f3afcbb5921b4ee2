"""HeadService: what attention heads do, found by needles, scores, circuits and attribution, and tested by edits.

Jobs whose work is requests of the engine run beside each other; those that compute in a thread wait for their turn.
"""

import asyncio
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import aclosing, contextmanager
from typing import Any

from patchclamp.v1 import head_pb2 as pb
from patchclamp.v1.head_pb2_grpc import HeadServiceServicer
from patchclamp_server.analysis.exclusive import ExclusiveJobs, Job
from patchclamp_server.analysis.heads.circuits.attribution import attribute
from patchclamp_server.analysis.heads.circuits.job import find_circuit
from patchclamp_server.analysis.heads.retrieval.detect import detect
from patchclamp_server.analysis.heads.scores.job import score_heads
from patchclamp_server.analysis.heads.scores.registry import ENGINE_METHODS
from patchclamp_server.analysis.heads.sets.evaluation import evaluate_edit
from patchclamp_server.analysis.heads.sets.overlap import compare
from patchclamp_server.artifacts.store import ArtifactStore
from patchclamp_server.engine.engine import Engine
from patchclamp_server.errors import RequestError
from patchclamp_server.model.info import ModelInfo
from patchclamp_server.rpc.call.calls import check_model
from patchclamp_server.rpc.codecs.circuit import decode_attribution, decode_circuit, encode_attribution, encode_circuit
from patchclamp_server.rpc.codecs.head import decode_scoring, encode_overlaps, encode_scoring
from patchclamp_server.rpc.codecs.needle import (
    decode_detection,
    decode_edit_evaluation,
    encode_detection,
    encode_edit_evaluation,
)
from patchclamp_server.text.prompt import PromptEncoder

Context = Any


class HeadService(HeadServiceServicer):
    """Raises the errors of errors.py; an interceptor turns them into statuses. Cancelling a call ends its job, with
    every request it has in the engine."""

    def __init__(
        self, engine: Engine, prompts: PromptEncoder, store: ArtifactStore, model_info: ModelInfo, jobs: ExclusiveJobs
    ) -> None:
        self._engine = engine
        self._prompts = prompts
        self._store = store
        self._model = model_info
        self._jobs = jobs

    async def DetectRetrievalHeads(
        self, request: pb.DetectRetrievalHeadsRequest, context: Context
    ) -> AsyncIterator[pb.DetectRetrievalHeadsResponse]:
        check_model(request.model, self._model)
        job = await self._prompts.analysis.run(decode_detection, request, self._model)
        await asyncio.to_thread(self._store.check_tags, job.tags)
        with _fields({"prompt": "test.lengths"}):
            async with aclosing(detect(self._engine, self._store, self._model, self._prompts, job)) as events:
                async for event in events:
                    yield encode_detection(event)

    async def ScoreHeads(self, request: pb.ScoreHeadsRequest, context: Context) -> AsyncIterator[pb.ScoreHeadsResponse]:
        check_model(request.model, self._model)
        job = await self._prompts.analysis.run(decode_scoring, request, self._prompts, self._model)
        await asyncio.to_thread(self._store.check_tags, job.tags)
        with _fields({"prompt": "facts"}):
            scored = score_heads(self._engine, self._store, self._model, self._prompts, job)
            async with aclosing(scored if job.method in ENGINE_METHODS else self._jobs.follow(scored)) as events:
                async for event in events:
                    yield encode_scoring(event)

    async def EvaluateHeadEdit(
        self, request: pb.EvaluateHeadEditRequest, context: Context
    ) -> AsyncIterator[pb.EvaluateHeadEditResponse]:
        check_model(request.model, self._model)
        job = await self._prompts.analysis.run(decode_edit_evaluation, request, self._model)
        with _fields({"prompt": "test.lengths", "program.edits": "scale"}):
            async with aclosing(evaluate_edit(self._engine, self._store, self._model, self._prompts, job)) as events:
                async for event in events:
                    yield encode_edit_evaluation(event)

    async def FindCircuit(
        self, request: pb.FindCircuitRequest, context: Context
    ) -> AsyncIterator[pb.FindCircuitResponse]:
        check_model(request.model, self._model)
        job = await self._prompts.analysis.run(decode_circuit, request, self._prompts, self._model)
        await asyncio.to_thread(self._store.check_tags, job.tags)
        found = find_circuit(self._engine.model.decoder, self._store, self._model, job)
        async with aclosing(self._jobs.follow(found)) as events:
            async for event in events:
                yield encode_circuit(event)

    async def CompareHeadSets(self, request: pb.CompareHeadSetsRequest, context: Context) -> pb.CompareHeadSetsResponse:
        return encode_overlaps(await asyncio.to_thread(compare, request.head_sets, request.top_k, self._store))

    async def AttributeLogits(self, request: pb.AttributeLogitsRequest, context: Context) -> pb.AttributeLogitsResponse:
        check_model(request.model, self._model)
        asked = await self._prompts.analysis.run(decode_attribution, request, self._prompts, self._model)

        def work(job: Job[pb.AttributeLogitsResponse]) -> pb.AttributeLogitsResponse:
            decoder = self._engine.model.decoder
            return encode_attribution(attribute(decoder, asked.tokens, asked.target, asked.contrast, asked.top_heads))

        return await self._jobs.result(work)


@contextmanager
def _fields(of_job: Mapping[str, str]) -> Iterator[None]:
    """The engine names the fields of its requests; those of a job are made of other fields."""
    try:
        yield
    except RequestError as error:
        error.field = of_job.get(error.field, error.field)
        raise

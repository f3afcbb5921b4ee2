"""HeadService finds what attention heads do, by needles, scores, circuits and attribution, and tests it by edits.

Jobs whose work is requests of the engine run beside each other; those at its exclusive door wait for their turn.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from functools import partial
from typing import Any

from patchclamp.v1 import head_pb2 as pb
from patchclamp.v1.head_pb2_grpc import HeadServiceServicer
from patchclamp_server.analysis.heads.circuits.attribution import attribute
from patchclamp_server.analysis.heads.circuits.job import find_circuit
from patchclamp_server.analysis.heads.retrieval.detect import detect
from patchclamp_server.analysis.heads.scores.job import Result, score_heads
from patchclamp_server.analysis.heads.scores.registry import ENGINE_METHODS
from patchclamp_server.analysis.heads.scores.scoring import Scoring
from patchclamp_server.analysis.heads.sets.evaluation import evaluate_edit
from patchclamp_server.analysis.heads.sets.overlap import compare
from patchclamp_server.analysis.progress import Progress
from patchclamp_server.analysis.requests import result_of
from patchclamp_server.rpc.call.analysis_jobs import AnalysisJobs
from patchclamp_server.rpc.codecs.circuit import decode_attribution, decode_circuit, encode_attribution, encode_circuit
from patchclamp_server.rpc.codecs.head import decode_scoring, encode_overlaps, encode_scoring
from patchclamp_server.rpc.codecs.needle import (
    decode_detection,
    decode_edit_evaluation,
    encode_detection,
    encode_edit_evaluation,
)

Context = Any


class HeadService(HeadServiceServicer):
    """Raises the errors of errors.py; an interceptor turns them into statuses. Cancelling a call ends its job, with
    every request it has in the engine."""

    def __init__(self, jobs: AnalysisJobs) -> None:
        self._jobs = jobs

    def DetectRetrievalHeads(
        self, request: pb.DetectRetrievalHeadsRequest, context: Context
    ) -> AsyncIterator[pb.DetectRetrievalHeadsResponse]:
        jobs = self._jobs
        return jobs.stream(
            request,
            partial(decode_detection, request, jobs.model),
            partial(detect, jobs.engine, jobs.store, jobs.model, jobs.prompts),
            encode_detection,
            fields={"prompt": "test.lengths"},
        )

    def ScoreHeads(self, request: pb.ScoreHeadsRequest, context: Context) -> AsyncIterator[pb.ScoreHeadsResponse]:
        jobs = self._jobs

        def run(job: Scoring) -> AsyncGenerator[Progress | Result, None]:
            scored = score_heads(jobs.engine, jobs.store, jobs.model, jobs.prompts, job)
            return scored if job.method in ENGINE_METHODS else jobs.door.follow(scored)

        decode = partial(decode_scoring, request, jobs.prompts, jobs.model)
        return jobs.stream(request, decode, run, encode_scoring, fields={"prompt": "facts"})

    def EvaluateHeadEdit(
        self, request: pb.EvaluateHeadEditRequest, context: Context
    ) -> AsyncIterator[pb.EvaluateHeadEditResponse]:
        jobs = self._jobs
        return jobs.stream(
            request,
            partial(decode_edit_evaluation, request, jobs.model),
            partial(evaluate_edit, jobs.engine, jobs.store, jobs.model, jobs.prompts),
            encode_edit_evaluation,
            fields={"prompt": "test.lengths", "program.edits": "scale"},
        )

    def FindCircuit(self, request: pb.FindCircuitRequest, context: Context) -> AsyncIterator[pb.FindCircuitResponse]:
        jobs = self._jobs
        return jobs.stream(
            request,
            partial(decode_circuit, request, jobs.prompts, jobs.model),
            partial(find_circuit, jobs.engine, jobs.store, jobs.model),
            encode_circuit,
            exclusive=True,
        )

    async def CompareHeadSets(self, request: pb.CompareHeadSetsRequest, context: Context) -> pb.CompareHeadSetsResponse:
        compared = await asyncio.to_thread(compare, request.head_sets, request.top_k, self._jobs.store)
        return encode_overlaps(compared)

    async def AttributeLogits(self, request: pb.AttributeLogitsRequest, context: Context) -> pb.AttributeLogitsResponse:
        jobs = self._jobs
        asked = await jobs.begin(request, partial(decode_attribution, request, jobs.prompts, jobs.model))
        work = attribute(jobs.engine.model.decoder, asked.tokens, asked.target, asked.contrast, asked.top_heads)
        return encode_attribution(await jobs.door.result(lambda: result_of(jobs.engine, work)))

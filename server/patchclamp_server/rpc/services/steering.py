"""SteeringService extracts steering vectors, as a stream of progress and a result."""

from collections.abc import AsyncIterator
from functools import partial
from typing import Any

import grpc

from patchclamp.v1 import steering_pb2 as pb
from patchclamp.v1.steering_pb2_grpc import SteeringServiceServicer
from patchclamp_server.analysis.steering.run import run
from patchclamp_server.rpc.call.analysis_jobs import AnalysisJobs
from patchclamp_server.rpc.codecs.steering import decode_extraction, encode_extraction

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

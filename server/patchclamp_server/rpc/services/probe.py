"""ProbeService trains probes, as a stream of progress and a result."""

from collections.abc import AsyncIterator
from functools import partial
from typing import Any

from patchclamp.v1 import probe_pb2 as pb
from patchclamp.v1.probe_pb2_grpc import ProbeServiceServicer
from patchclamp_server.analysis.probes.job import train_probe
from patchclamp_server.rpc.call.analysis_jobs import AnalysisJobs
from patchclamp_server.rpc.codecs.neurons.texts import text_fields
from patchclamp_server.rpc.codecs.probe import decode_training, encode_training


class ProbeService(ProbeServiceServicer):
    def __init__(self, jobs: AnalysisJobs) -> None:
        self._jobs = jobs

    def TrainProbe(self, request: pb.TrainProbeRequest, context: Any) -> AsyncIterator[pb.TrainProbeResponse]:
        """Cancelling the call cancels the job with every request it has in the engine."""
        jobs = self._jobs
        return jobs.stream(
            request,
            partial(decode_training, request, jobs.prompts, jobs.store, jobs.model),
            partial(train_probe, jobs.engine, jobs.store, jobs.model, jobs.prompts),
            encode_training,
            fields=text_fields(request.texts, "texts"),
        )

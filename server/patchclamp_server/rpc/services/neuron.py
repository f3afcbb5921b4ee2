"""NeuronService: neurons found by their weights, by labelled text, by facts and by a census, and tested by edits.

Jobs whose work is requests of the engine run beside each other; those at its exclusive door wait for their turn.
"""

import asyncio
from typing import Any

from patchclamp.v1 import neuron_pb2 as pb
from patchclamp.v1.neuron_pb2_grpc import NeuronServiceServicer
from patchclamp_server.analysis.exclusive import ExclusiveJobs
from patchclamp_server.analysis.neurons.compare import compare
from patchclamp_server.artifacts.store import ArtifactStore
from patchclamp_server.engine.engine import Engine
from patchclamp_server.interventions.field_checks import count
from patchclamp_server.model.info import ModelInfo
from patchclamp_server.rpc.codecs.neurons.compare import encode_overlaps
from patchclamp_server.text.prompt import PromptEncoder

Context = Any


class NeuronService(NeuronServiceServicer):
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

    async def CompareNeuronSets(
        self, request: pb.CompareNeuronSetsRequest, context: Context
    ) -> pb.CompareNeuronSetsResponse:
        top_k = count(request.top_k, "top_k")
        overlaps = await asyncio.to_thread(compare, request.neuron_sets, top_k, self._store, self._model)
        return encode_overlaps(overlaps)

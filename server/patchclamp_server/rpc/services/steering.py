"""SteeringService: extraction of steering vectors as a stream of progress and a result."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import grpc

from patchclamp.v1 import steering_pb2 as pb
from patchclamp.v1.steering_pb2_grpc import SteeringServiceServicer
from patchclamp_server.analysis.steering.job import extract
from patchclamp_server.artifacts.store import ArtifactStore
from patchclamp_server.engine.engine import Engine
from patchclamp_server.model.info import ModelInfo
from patchclamp_server.rpc.call.calls import check_model
from patchclamp_server.rpc.codecs.steering import decode_extraction, encode_event
from patchclamp_server.text.prompt import PromptEncoder


class SteeringService(SteeringServiceServicer):
    def __init__(self, engine: Engine, prompts: PromptEncoder, store: ArtifactStore, model_info: ModelInfo) -> None:
        self._engine = engine
        self._prompts = prompts
        self._store = store
        self._model = model_info

    async def ExtractVectors(
        self, request: pb.ExtractVectorsRequest, context: "grpc.aio.ServicerContext[Any, Any]"
    ) -> AsyncIterator[pb.ExtractVectorsResponse]:
        """Cancelling the call cancels the job with every request it has in the engine."""
        check_model(request.model, self._model)
        job = await self._prompts.analysis.run(decode_extraction, request, self._prompts, self._model)
        await asyncio.to_thread(self._store.check_tags, job.tags)
        async with aclosing(extract(self._engine, self._store, self._model, job)) as events:
            async for event in events:
                yield encode_event(event)

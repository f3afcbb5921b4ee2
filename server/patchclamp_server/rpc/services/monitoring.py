"""MonitoringService: watches are made, run, read, followed and given a reference; see monitoring/ for what they are."""

import asyncio
import logging
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from contextvars import Context
from typing import Any

import numpy as np

from patchclamp.v1 import monitoring_pb2 as pb
from patchclamp.v1.monitoring_pb2_grpc import MonitoringServiceServicer
from patchclamp_server.artifacts.store import ArtifactStore
from patchclamp_server.engine.engine import Engine
from patchclamp_server.errors import NotFound, ResourceExhausted, Unavailable
from patchclamp_server.model.info import ModelInfo
from patchclamp_server.monitoring.bind import bind_watch
from patchclamp_server.monitoring.reference import Reference
from patchclamp_server.monitoring.shared import SharedWatches
from patchclamp_server.monitoring.stored import store_reference, store_watch
from patchclamp_server.rpc.call.calls import check_model
from patchclamp_server.rpc.codecs.artifact import decode_label, encode_artifact
from patchclamp_server.rpc.codecs.message_size import within_a_message
from patchclamp_server.rpc.codecs.monitoring import (
    decode_following,
    decode_item_names,
    decode_recording,
    decode_start,
    encode_activations,
    encode_listed,
    encode_running,
)
from patchclamp_server.rpc.codecs.watch_items import decode_items
from patchclamp_server.rpc.codecs.watch_statistics import encode_statistics
from patchclamp_server.rpc.streams.stream import EventBridge
from patchclamp_server.rpc.streams.watch import ActivationStream, DroppedEvents, RecordingStream, first
from patchclamp_server.text.prompt import PromptEncoder

logger = logging.getLogger(__name__)
RpcContext = Any
# This bounds the calls that follow a watch, or record a reference. Each costs the engine a little at every step.
MAX_STREAMS = 64


class MonitoringService(MonitoringServiceServicer):
    """Raises the errors of errors.py; an interceptor turns them into statuses. A call that is cancelled leaves nothing
    in the engine."""

    def __init__(self, engine: Engine, prompts: PromptEncoder, store: ArtifactStore, model_info: ModelInfo) -> None:
        self.dropped = DroppedEvents()
        self.shared = SharedWatches(engine.monitor, store, model_info, self.dropped.forget)
        self._registry = engine.monitor
        self._prompts = prompts
        self._store = store
        self._model = model_info
        self._bridge: EventBridge | None = None
        self._streams: set[ActivationStream | RecordingStream] = set()
        # These are the texts of tokens that were followed, by id.
        self._texts: dict[int, str] = {}

    def close(self) -> None:
        """Ends the calls that stream: they have no end of their own that a drain could wait for."""
        for stream in self._streams:
            stream.end(Unavailable("", "the server is shutting down"))

    async def CreateWatch(self, request: pb.CreateWatchRequest, context: RpcContext) -> pb.CreateWatchResponse:
        check_model(request.model, self._model)
        description, tags = decode_label(request)

        def create() -> pb.CreateWatchResponse:
            items = decode_items(request.items)
            watch = bind_watch(items, self._model, self._store, max_items=self._registry.max_items)
            info = store_watch(watch, self._store, self._model, description, tags)
            return pb.CreateWatchResponse(artifact=encode_artifact(info), items=watch.names)

        return await asyncio.to_thread(create)

    async def StartWatch(self, request: pb.StartWatchRequest, context: RpcContext) -> pb.StartWatchResponse:
        asked = decode_start(request)
        running = await asyncio.to_thread(self.shared.start, asked)
        return pb.StartWatchResponse(watch=encode_running(running))

    async def StopWatch(self, request: pb.StopWatchRequest, context: RpcContext) -> pb.StopWatchResponse:
        stopped = await asyncio.to_thread(self.shared.stop, request.name)
        if stopped.here is not None:
            self.dropped.forget(stopped.here)
        return pb.StopWatchResponse(watch=encode_listed(stopped))

    async def ListWatches(self, request: pb.ListWatchesRequest, context: RpcContext) -> pb.ListWatchesResponse:
        await self.look()
        return pb.ListWatchesResponse(
            watches=map(encode_listed, await asyncio.to_thread(self.shared.listing)),
            max_watches=self._registry.max_watches,
            max_items=self._registry.max_items,
            replica=self.shared.replica,
        )

    async def look(self) -> None:
        """Runs what the store says, with no caller's rights: not even those of a call that waits for it."""
        try:
            await asyncio.to_thread(Context().run, self.shared.look)
        except OSError as error:
            logger.warning("the store cannot be read: the watches stay as they are (%s)", error)

    async def follow_store(self, seconds: float) -> None:
        """Looks again and again, until it is cancelled."""
        while True:
            await asyncio.sleep(seconds)
            await self.look()

    async def GetWatchStatistics(
        self, request: pb.GetWatchStatisticsRequest, context: RpcContext
    ) -> pb.GetWatchStatisticsResponse:
        def read() -> pb.GetWatchStatisticsResponse:
            running = self._registry.get(request.name)
            items = decode_item_names(request.items, running.watch)
            return encode_statistics(running, self._registry.statistics(request.name), items)

        response = await asyncio.to_thread(read)
        within_a_message(response, "items", "name fewer items")
        return response

    async def RecordReference(
        self, request: pb.RecordReferenceRequest, context: RpcContext
    ) -> AsyncIterator[pb.RecordReferenceResponse]:
        asked = decode_recording(request)
        await asyncio.to_thread(self._store.check_tags, asked.tags)
        running = self._registry.get(asked.name)
        tokens = asked.tokens or running.options.window_tokens
        stream = RecordingStream(self._bridge_of_loop())
        reference: Reference | None = None
        with self._open(stream):
            cancel = self._registry.record_reference(asked.name, tokens, stream.on_progress, stream.on_done)
            try:
                stream.on_progress(0, tokens)
                async for event in stream.events():
                    if not isinstance(event, tuple):
                        reference = event
                        break
                    progress = pb.RecordReferenceProgress(tokens=event[0], total=event[1])
                    yield pb.RecordReferenceResponse(progress=progress)
            finally:
                cancel()
        if reference is None:
            self._check_engine()
            raise NotFound("name", f"the watch {asked.name!r} was stopped before it had seen {tokens} tokens")
        info = await asyncio.to_thread(
            store_reference, reference, running, tokens, self._store, self._model, asked.description, asked.tags
        )
        if asked.use:
            await asyncio.to_thread(self.shared.use_reference, asked.name, reference, info.id)
        yield pb.RecordReferenceResponse(result=encode_artifact(info))

    async def WatchActivations(
        self, request: pb.WatchActivationsRequest, context: RpcContext
    ) -> AsyncIterator[pb.WatchActivationsResponse]:
        running = self._registry.get(request.name)
        asked = decode_following(request, running.watch)
        stream = ActivationStream(self._bridge_of_loop(), lambda n: self.dropped.add(running, n))
        left = asked.max_events
        with self._open(stream):
            unsubscribe = self._registry.subscribe(asked.name, asked.items, asked.threshold, stream.put)
            try:
                # Nothing is missed from here on: who waits for it can begin to send requests.
                await context.send_initial_metadata(())
                async for batch, dropped in stream.batches():
                    shown = first(batch, left) if asked.max_events else batch
                    texts = self._texts_of(shown.token_ids)
                    yield encode_activations(shown, running.watch.names, texts, dropped)
                    left -= len(shown.items)
                    if asked.max_events and left <= 0:
                        return
            finally:
                unsubscribe()
        self._check_engine()

    @contextmanager
    def _open(self, stream: ActivationStream | RecordingStream) -> Iterator[None]:
        if len(self._streams) >= MAX_STREAMS:
            raise ResourceExhausted("", f"{MAX_STREAMS} calls follow or record watches already")
        self._streams.add(stream)
        try:
            yield
        finally:
            self._streams.discard(stream)

    def _check_engine(self) -> None:
        """Raises Unavailable where a watch has ended because the engine has."""
        if self._registry.ended:
            raise Unavailable("", "the engine has stopped")

    def _texts_of(self, token_ids: "np.ndarray[Any, Any]") -> dict[int, str]:
        for token in np.unique(token_ids).tolist():
            if token not in self._texts:
                self._texts[token] = self._prompts.text_of((token,))
        return self._texts

    def _bridge_of_loop(self) -> EventBridge:
        """Returns one bridge for all calls: the service runs in one loop."""
        if self._bridge is None:
            self._bridge = EventBridge(asyncio.get_running_loop())
        return self._bridge

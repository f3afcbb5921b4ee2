"""A call becomes a job of analysis here: the services that have such jobs begin and follow them alike."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, TypeVar

from patchclamp_server.analysis.exclusive import ExclusiveJobs
from patchclamp_server.artifacts.store import ArtifactStore
from patchclamp_server.artifacts.types import NO_TAGS, Tags
from patchclamp_server.engine.engine import Engine
from patchclamp_server.errors import renaming_fields
from patchclamp_server.model.info import ModelInfo
from patchclamp_server.rpc.call.calls import check_model
from patchclamp_server.text.prompt import PromptEncoder

J = TypeVar("J")
E = TypeVar("E")
R = TypeVar("R")


@dataclass(frozen=True, eq=False)
class AnalysisJobs:
    """Holds what jobs need of the server. `door` is the queue of those that run at the engine's exclusive door."""

    engine: Engine
    prompts: PromptEncoder
    store: ArtifactStore
    model: ModelInfo
    door: ExclusiveJobs

    async def begin(self, request: Any, decode: Callable[[], J]) -> J:
        """Returns the job that `decode` makes of `request`, on the threads of analysis.

        Raises NotFound for another model than the one served, what `decode` raises, and AlreadyExists for `tags` of
        the job that name something else: nothing is computed for what cannot be stored.
        """
        check_model(request.model, self.model)
        job = await self.prompts.analysis.run(decode)
        tags: Tags = getattr(job, "tags", NO_TAGS)
        if tags.names:
            await asyncio.to_thread(self.store.check_tags, tags)
        return job

    async def stream(
        self,
        request: Any,
        decode: Callable[[], J],
        run: Callable[[J], AsyncGenerator[E, None]],
        encode: Callable[[E], R],
        *,
        exclusive: bool = False,
        fields: Mapping[str, str] | None = None,
    ) -> AsyncIterator[R]:
        """Yields the responses of a job: what `encode` makes of each event of `run`, progress among them.

        Ending the iteration early closes the events, which ends the job. An `exclusive` job waits for its turn at the
        door. `fields` names, for errors, the request's fields by the fields of the engine's requests that are made of
        them.
        """
        job = await self.begin(request, decode)
        with renaming_fields(fields or {}):
            async with aclosing(self.door.follow(run(job)) if exclusive else run(job)) as events:
                async for event in events:
                    yield encode(event)

"""This handles the client's side of a Session: what the client sends while tokens stream back."""

import asyncio
import logging
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager

from patchclamp.v1 import generation_pb2 as pb
from patchclamp_server.engine.engine import Engine
from patchclamp_server.engine.request import Event, Failed
from patchclamp_server.errors import EngineFailure, InvalidArgument, RequestError
from patchclamp_server.interventions.field_checks import chosen, count, finite
from patchclamp_server.rpc.streams.stream import EventStream

logger = logging.getLogger(__name__)


class SessionControl:
    """Carries the messages after `start` to the engine, in order. A wrong one ends the session with its error."""

    def __init__(self, engine: Engine, request_id: int, stream: EventStream[Event], *, lockstep: bool) -> None:
        self._engine = engine
        self._id = request_id
        self._stream = stream
        self._lockstep = lockstep
        self._granted = 0
        self._delivered = 0
        self._half_closed = False

    @contextmanager
    def following(self, messages: AsyncIterator[pb.SessionRequest]) -> Iterator[None]:
        """Reads `messages` in a task of its own until the block ends."""
        task = asyncio.create_task(self._follow(messages))
        task.add_done_callback(self._report)
        try:
            yield
        finally:
            task.cancel()

    def delivered(self, tokens: int) -> None:
        """Tells that so many tokens have been sent to the client."""
        self._delivered += tokens
        self._finish_if_spent()

    async def _follow(self, messages: AsyncIterator[pb.SessionRequest]) -> None:
        async for message in messages:
            match chosen(message, "event", ""):
                case "start":
                    raise InvalidArgument("start", "the session has started already")
                case "set_strength":
                    self._set_strength(message.set_strength)
                case "advance":
                    self._advance(message.advance)
                case "stop":
                    self._engine.finish(self._id)
        self._half_closed = True
        self._finish_if_spent()

    def _set_strength(self, message: pb.SetStrength) -> None:
        if not message.edit:
            raise InvalidArgument("set_strength.edit", "expected the name of an edit of the program")
        strength = finite(message.strength, "set_strength.strength")
        self._engine.set_strength(self._id, message.edit, strength)

    def _advance(self, message: pb.Advance) -> None:
        if not self._lockstep:
            raise InvalidArgument("advance", "only for a session that was started with lockstep")
        tokens = count(message.tokens, "advance.tokens", low=1)
        self._granted += tokens
        self._engine.advance(self._id, tokens)

    def _finish_if_spent(self) -> None:
        """Ends a lockstep session whose client has closed its side, and so grants no more, once its tokens are sent."""
        if self._lockstep and self._half_closed and self._delivered >= self._granted:
            self._engine.finish(self._id)

    def _report(self, task: "asyncio.Task[None]") -> None:
        error = None if task.cancelled() else task.exception()
        if error is None:
            return
        if not isinstance(error, RequestError):
            logger.error("a session's messages could not be followed", exc_info=error)
            error = EngineFailure("", "a session's messages could not be followed")
        self._stream.put(Failed(error))

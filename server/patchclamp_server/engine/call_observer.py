"""Who follows a call while it is answered: nobody, or the span of its trace. No OpenTelemetry here."""

from contextvars import ContextVar
from typing import Protocol

from patchclamp_server.engine.engine import Engine
from patchclamp_server.engine.request import Request


class CallObserver(Protocol):
    """Told what a call does, in the event loop."""

    def submit(self, engine: Engine, request: Request) -> int:
        """Engine.submit, with an eye on the last event of the request."""

    def job_begins(self) -> None:
        """The call's analysis job has its turn."""


# Set for the time of a call; tasks of the call inherit it.
OBSERVER: ContextVar[CallObserver | None] = ContextVar("observer", default=None)

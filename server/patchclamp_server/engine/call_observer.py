"""An observer follows a call while it is answered, such as the span of its trace; OpenTelemetry is not needed here."""

from contextvars import ContextVar
from typing import Protocol

from patchclamp_server.engine.engine import Engine
from patchclamp_server.engine.request import Request


class CallObserver(Protocol):
    """Is told what a call does, in the event loop."""

    def submit(self, engine: Engine, request: Request) -> int:
        """Calls Engine.submit, and watches for the last event of the request."""

    def job_begins(self) -> None:
        """Is called when the analysis job of the call has its turn."""


# The observer is set for the time of a call; tasks of the call inherit it.
OBSERVER: ContextVar[CallObserver | None] = ContextVar("observer", default=None)

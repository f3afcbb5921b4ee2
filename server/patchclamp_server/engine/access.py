"""The engine asks these before it runs anything: whether the caller may do it."""

from typing import Protocol

from patchclamp_server.engine.request import Request


class EngineAccess(Protocol):
    """Decides what callers may do. Methods run on the caller's thread, unless they say otherwise."""

    def admit(self, request: Request) -> Request:
        """Returns the request as it may run. Raises PermissionDenied or QuotaExceeded."""
        ...

    def admitted(self, request: Request) -> None:
        """Takes what `admit` returned, once it is in the queue."""
        ...

    def compute(self, tokens: int) -> None:
        """Takes the number of tokens that work at the exclusive door is about to compute, in the context of its caller
        on the engine's thread. Raises QuotaExceeded."""
        ...

    def set_strength(self, edit: str, strength: float) -> None:
        """Checks a change of the strength of an edit. Raises PermissionDenied."""
        ...


class OpenEngine:
    """Lets everybody do anything."""

    def admit(self, request: Request) -> Request:
        return request

    def admitted(self, request: Request) -> None: ...

    def compute(self, tokens: int) -> None: ...

    def set_strength(self, edit: str, strength: float) -> None: ...

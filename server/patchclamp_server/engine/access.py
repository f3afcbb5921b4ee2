"""What the engine asks before it runs anything: whether whoever calls may."""

from typing import Protocol

from patchclamp_server.engine.request import Request


class EngineAccess(Protocol):
    """Called on the thread of the caller, unless a method says otherwise."""

    def admit(self, request: Request) -> Request:
        """The request as it may run. Raises PermissionDenied or QuotaExceeded."""
        ...

    def admitted(self, request: Request) -> None:
        """Told what `admit` returned, once it is in the queue."""
        ...

    def compute(self, tokens: int) -> None:
        """Told of the tokens that a work at the exclusive door is about to compute, in the context of its caller on
        the engine's thread. Raises QuotaExceeded."""
        ...

    def set_strength(self, edit: str, strength: float) -> None:
        """Raises PermissionDenied."""
        ...


class OpenEngine:
    """Everybody may do anything."""

    def admit(self, request: Request) -> Request:
        return request

    def admitted(self, request: Request) -> None: ...

    def compute(self, tokens: int) -> None: ...

    def set_strength(self, edit: str, strength: float) -> None: ...

"""The shapes of gRPC's calls and of the methods of its stubs, with threads and in an event loop."""

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any, Protocol, TypeAlias, TypeVar

RequestT = TypeVar("RequestT")
RequestT_contra = TypeVar("RequestT_contra", contravariant=True)
ResponseT = TypeVar("ResponseT")
ResponseT_co = TypeVar("ResponseT_co", covariant=True)
MessageT_co = TypeVar("MessageT_co", covariant=True)


class Method(Protocol[RequestT_contra, ResponseT_co]):
    """Says how a method of a stub is called, unary or streaming."""

    def __call__(
        self, request: RequestT_contra, /, timeout: float | None, metadata: tuple[tuple[str, str], ...]
    ) -> ResponseT_co: ...


UnaryMethod: TypeAlias = Method[RequestT, ResponseT]
AsyncUnaryMethod: TypeAlias = Method[RequestT, Awaitable[ResponseT]]


class Call(Protocol[MessageT_co]):
    """Says what a running call that streams offers."""

    def __iter__(self) -> Iterator[MessageT_co]: ...

    def cancel(self) -> object: ...


class EndingCall(Call[MessageT_co], Protocol[MessageT_co]):
    """Tells besides when it ends. `add_callback` returns False where it has ended before."""

    def add_callback(self, callback: Callable[[], None]) -> bool: ...


class AsyncCall(Protocol[MessageT_co]):
    """Says what a running call that streams offers in an event loop."""

    def __aiter__(self) -> AsyncIterator[MessageT_co]: ...

    def cancel(self) -> object: ...


class AsyncEndingCall(AsyncCall[MessageT_co], Protocol[MessageT_co]):
    """Tells besides when it ends."""

    def add_done_callback(self, callback: Callable[[Any], None]) -> None: ...

"""What a stream needs to know of its messages."""

from typing import Protocol, TypeVar

from patchclamp.errors import PatchclampError

MessageT = TypeVar("MessageT")
MessageT_contra = TypeVar("MessageT_contra", contravariant=True)
EventT = TypeVar("EventT")
EventT_co = TypeVar("EventT_co", covariant=True)
ResultT = TypeVar("ResultT")
ResultT_co = TypeVar("ResultT_co", covariant=True)


class Collector(Protocol[MessageT_contra, EventT_co, ResultT_co]):
    """Turns messages into events; after the last one it has the result."""

    def add(self, message: MessageT_contra) -> EventT_co: ...

    def result(self) -> ResultT_co | None: ...


def complete(result: ResultT | None) -> ResultT:
    """Returns the result. Raises PatchclampError DATA_LOSS where the stream ended before its last message."""
    if result is None:
        raise PatchclampError("DATA_LOSS", "the stream ended before its last message")
    return result

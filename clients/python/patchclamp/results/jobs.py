"""What every long job streams: progress, then one result."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, Literal, Protocol, TypeVar

from patchclamp.results.record import Record

ResultT = TypeVar("ResultT")
MessageResultT = TypeVar("MessageResultT")
MessageResultT_co = TypeVar("MessageResultT_co", covariant=True)


class ProgressMessage(Protocol):
    stage: str
    done: int
    total: int


class JobMessage(Protocol[MessageResultT_co]):
    """A response with the oneof `event`: progress or the result."""

    @property
    def progress(self) -> ProgressMessage: ...

    @property
    def result(self) -> MessageResultT_co: ...

    def WhichOneof(self, oneof_group: Literal["event"]) -> str | None: ...


@dataclass(frozen=True)
class Progress(Record):
    """`done` of `total` steps of a stage; the stages are in the contract of the job."""

    stage: str
    done: int
    total: int

    @classmethod
    def from_proto(cls, message: ProgressMessage) -> "Progress":
        return cls(message.stage, message.done, message.total)


class JobCollector(Generic[MessageResultT, ResultT]):
    """Turns the messages of a job into events, and keeps the result."""

    def __init__(self, parse: Callable[[MessageResultT], ResultT]) -> None:
        self._parse = parse
        self._result: ResultT | None = None

    def add(self, message: JobMessage[MessageResultT]) -> Progress | ResultT:
        match message.WhichOneof("event"):
            case "progress":
                return Progress.from_proto(message.progress)
            case "result":
                result = self._parse(message.result)
                self._result = result
                return result
            case other:
                raise ValueError(f"a job sent an event this client does not know: {other}")

    def result(self) -> ResultT | None:
        """None while the result has not arrived."""
        return self._result

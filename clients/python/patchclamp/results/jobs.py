"""Long jobs: what they stream, progress and then one result, and what is known of those that run by themselves."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, Literal, Protocol, TypeVar

from google.protobuf.message import Message

from patchclamp.results.record import Record
from patchclamp.v1 import job_pb2

ResultT = TypeVar("ResultT")
MessageResultT = TypeVar("MessageResultT")
MessageResultT_co = TypeVar("MessageResultT_co", covariant=True)


class JobMessage(Protocol[MessageResultT_co]):
    """Offers the oneof `event` of a response: progress or the result."""

    @property
    def progress(self) -> Message: ...

    @property
    def result(self) -> MessageResultT_co: ...

    def WhichOneof(self, oneof_group: Literal["event"]) -> str | None: ...


@dataclass(frozen=True)
class Progress(Record):
    """Says that `done` of `total` steps of a stage are done; the contract of the job names the stages.

    resumed: how many of `done` come from the checkpoint of an interrupted run, where the job keeps any.
    """

    stage: str
    done: int
    total: int
    resumed: int = 0

    @classmethod
    def from_proto(cls, message: Any, **given: Any) -> "Progress":
        known = {} if "resumed" in message.DESCRIPTOR.fields_by_name else {"resumed": 0}
        return super().from_proto(message, **known, **given)


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
        """Returns the result; None while it has not arrived."""
        return self._result


@dataclass(frozen=True)
class Job(Record):
    """Describes a call that goes on without its client.

    method: such as "SparsityService/CalibrateProfile". state: running, succeeded, failed or cancelled.
    created, ended: RFC 3339 times; ended is "" while it runs. stage, done, total: as in Progress.
    error_code, error: of a failed one, the name of its gRPC status and the message.
    """

    id: str
    method: str
    state: str
    created: str
    ended: str
    stage: str
    done: int
    total: int
    error_code: str
    error: str

    @classmethod
    def from_proto(cls, message: job_pb2.Job, **given: Any) -> "Job":
        ended = message.ended.ToJsonString() if message.HasField("ended") else ""
        return super().from_proto(message, ended=ended, error=message.error_message, **given)

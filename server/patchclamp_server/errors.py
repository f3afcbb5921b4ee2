"""Errors a client can see. The engine raises them; rpc/call/errors.py turns them into gRPC statuses.

Each names the field path it is about (``program.edits[1].layers``), in the words of the protobuf contract.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass


@dataclass(eq=False)
class RequestError(Exception):
    """A refusal with the path of the field that caused it ("" when no single field did)."""

    field: str
    message: str

    def __str__(self) -> str:
        return f"{self.field}: {self.message}" if self.field else self.message


class InvalidArgument(RequestError):
    """The request is wrong whatever the state of the server. → INVALID_ARGUMENT with BadRequest."""


class FailedPrecondition(RequestError):
    """The request does not fit what is served, such as an artifact of another model. → PreconditionFailure."""


class NotFound(RequestError):
    """The model, artifact or tag does not exist. → NOT_FOUND."""


class AlreadyExists(RequestError):
    """Something else has the name. → ALREADY_EXISTS."""


@dataclass(eq=False)
class ResourceExhausted(RequestError):
    """The server is full for now. → RESOURCE_EXHAUSTED with RetryInfo."""

    retry_after_seconds: float = 1.0


class QuotaExceeded(ResourceExhausted):
    """The tenant has used what its policy allows it. → RESOURCE_EXHAUSTED with RetryInfo."""

    def after(self, seconds: float) -> "QuotaExceeded":
        """Sets the time to come back after, and returns the error."""
        self.retry_after_seconds = seconds
        return self


@dataclass(eq=False)
class Unauthenticated(RequestError):
    """It is not known who calls. → UNAUTHENTICATED; `reason` is a stable word for programs."""

    reason: str = "TOKEN_MISSING"


@dataclass(eq=False)
class PermissionDenied(RequestError):
    """The policy does not allow it. → PERMISSION_DENIED; `reason` is a stable word for programs."""

    reason: str = "NOT_ALLOWED"


class Aborted(RequestError):
    """An `abort_when` condition fired. → ABORTED."""


class Cancelled(RequestError):
    """The client went away. → CANCELLED."""


class DeadlineExceeded(RequestError):
    """The deadline passed before the request was finished. → DEADLINE_EXCEEDED."""


class Unavailable(RequestError):
    """The server is draining. → UNAVAILABLE; another replica may answer."""


class EngineFailure(RequestError):
    """A step of the engine failed. → INTERNAL."""


@contextmanager
def fields_as(rename: Callable[[str], str]) -> Iterator[None]:
    """Errors raised inside name the field that `rename` makes of theirs: what raised them did not see the request."""
    try:
        yield
    except RequestError as error:
        error.field = rename(error.field)
        raise


def about(field: str) -> AbstractContextManager[None]:
    """Errors raised inside are about `field`, whatever they name."""
    return fields_as(lambda _: field)


def within(field: str) -> AbstractContextManager[None]:
    """Errors raised inside are about the message at `field`, of which they name fields."""
    return fields_as(lambda name: below(field, name))


def renaming_fields(names: Mapping[str, str]) -> AbstractContextManager[None]:
    """Errors raised inside name the fields of the request from which those were made that are keys of `names`."""
    return fields_as(lambda name: names.get(name, name))


def below(path: str, name: str) -> str:
    """Returns the path of the field `name` of the message at `path`; "" is the request itself."""
    return f"{path}.{name}" if path and name else path or name

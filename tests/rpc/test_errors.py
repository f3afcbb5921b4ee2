"""Errors as statuses, with the details a client acts on."""

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from patchclamp_server import errors
from patchclamp_server.engine.faults import fault_of
from patchclamp_server.rpc.call.errors import INTERNAL_MESSAGE, to_status


class Call:
    """What rpc_status reads of a finished call."""

    def __init__(self, status: grpc.Status) -> None:
        self._status = status

    def code(self) -> grpc.StatusCode:
        return self._status.code

    def details(self) -> str:
        return str(self._status.details)

    def trailing_metadata(self):
        return self._status.trailing_metadata


def detail(status: grpc.Status, kind):
    """The one detail of a kind."""
    message = kind()
    assert [d.Unpack(message) for d in rpc_status.from_call(Call(status)).details].count(True) == 1
    return message


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.InvalidArgument, grpc.StatusCode.INVALID_ARGUMENT),
        (errors.FailedPrecondition, grpc.StatusCode.FAILED_PRECONDITION),
        (errors.NotFound, grpc.StatusCode.NOT_FOUND),
        (errors.AlreadyExists, grpc.StatusCode.ALREADY_EXISTS),
        (errors.ResourceExhausted, grpc.StatusCode.RESOURCE_EXHAUSTED),
        (errors.QuotaExceeded, grpc.StatusCode.RESOURCE_EXHAUSTED),
        (errors.Unauthenticated, grpc.StatusCode.UNAUTHENTICATED),
        (errors.PermissionDenied, grpc.StatusCode.PERMISSION_DENIED),
        (errors.Aborted, grpc.StatusCode.ABORTED),
        (errors.Cancelled, grpc.StatusCode.CANCELLED),
        (errors.DeadlineExceeded, grpc.StatusCode.DEADLINE_EXCEEDED),
        (errors.Unavailable, grpc.StatusCode.UNAVAILABLE),
        (errors.EngineFailure, grpc.StatusCode.INTERNAL),
    ],
)
def test_every_error_has_its_code_and_a_reason(error: type[errors.RequestError], code: grpc.StatusCode):
    status = to_status(error("a.b", "why"))
    assert status.code is code
    info = detail(status, error_details_pb2.ErrorInfo)
    assert (info.domain, info.metadata["field"]) == ("patchclamp", "a.b")
    assert info.reason.isupper()


def test_a_full_server_says_when_to_come_back():
    error = errors.ResourceExhausted("", "queue is full")
    error.retry_after_seconds = 2.5
    assert detail(to_status(error), error_details_pb2.RetryInfo).retry_delay.ToMilliseconds() == 2500


def test_a_tenant_that_used_its_share_is_told_so_and_when_to_come_back():
    status = to_status(errors.QuotaExceeded("", "60 tokens a minute").after(45.25))
    assert detail(status, error_details_pb2.ErrorInfo).reason == "QUOTA_EXCEEDED"
    assert detail(status, error_details_pb2.RetryInfo).retry_delay.ToMilliseconds() == 45250


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (errors.Unauthenticated("", "why"), "TOKEN_MISSING"),
        (errors.Unauthenticated("", "why", "TOKEN_EXPIRED"), "TOKEN_EXPIRED"),
        (errors.PermissionDenied("", "why"), "NOT_ALLOWED"),
        (errors.PermissionDenied("", "why", "KILLED"), "KILLED"),
    ],
)
def test_a_refusal_of_the_caller_has_the_reason_it_was_given(error: errors.RequestError, reason: str):
    assert detail(to_status(error), error_details_pb2.ErrorInfo).reason == reason


def test_a_failed_precondition_names_its_subject():
    status = to_status(errors.FailedPrecondition("program.edits[0].add.vector.artifact", "another model"))
    [violation] = detail(status, error_details_pb2.PreconditionFailure).violations
    assert (violation.subject, violation.description) == ("program.edits[0].add.vector.artifact", "another model")


def test_a_failure_of_the_server_tells_nothing_of_its_inside():
    for status in (to_status(errors.EngineFailure("", "secret in frame 7")), to_status(fault_of(KeyError("secret")))):
        assert status.details == INTERNAL_MESSAGE
        assert b"secret" not in status.trailing_metadata[0][1]


def test_a_long_message_fits_the_metadata_of_any_peer():
    status = to_status(errors.InvalidArgument("a", "é" * 100_000))
    assert len(status.trailing_metadata[0][1]) < 4096

"""Errors of the client: google.rpc details of a real status, decoded without the package that declares them."""

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import grpc
import pytest
from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from patchclamp import Client, FieldViolation, PatchclampError
from patchclamp.v1.model_pb2_grpc import ModelServiceServicer

Serve = Callable[..., str]


class Refusing(ModelServiceServicer):
    """Answers every call with one status."""

    def __init__(self, code: grpc.StatusCode, message: str, details: tuple[Message, ...]) -> None:
        status = status_pb2.Status(code=code.value[0], message=message)
        for detail in details:
            packed = any_pb2.Any()
            packed.Pack(detail)
            status.details.append(packed)
        self.status = rpc_status.to_status(status)

    def ListModels(self, request: Any, context: grpc.ServicerContext) -> Any:
        context.abort_with_status(self.status)

    def Tokenize(self, request: Any, context: grpc.ServicerContext) -> Any:
        context.set_trailing_metadata((("grpc-status-details-bin", b"\xff\xff"),))
        context.abort(grpc.StatusCode.INTERNAL, "broken")


def error_of(serve: Serve, code: grpc.StatusCode, message: str, *details: Message) -> PatchclampError:
    with Client(serve(models=Refusing(code, message, details))) as client, pytest.raises(PatchclampError) as refused:
        client.models()
    return refused.value


def bad_request(field: str, description: str) -> Message:
    violation = error_details_pb2.BadRequest.FieldViolation(field=field, description=description)
    return error_details_pb2.BadRequest(field_violations=[violation])


def test_bad_requests_name_their_fields(serve: Serve) -> None:
    detail = bad_request("program.edits[1].layers", "no layer 99")
    error = error_of(serve, grpc.StatusCode.INVALID_ARGUMENT, "refused", detail)
    assert error.code == "INVALID_ARGUMENT"
    assert error.violations == (FieldViolation("program.edits[1].layers", "no layer 99"),)
    assert str(error) == "INVALID_ARGUMENT: refused\n  program.edits[1].layers: no layer 99"


def test_a_field_that_the_message_names_is_not_printed_twice(serve: Serve) -> None:
    error = error_of(serve, grpc.StatusCode.INVALID_ARGUMENT, "prompt: empty", bad_request("prompt", "empty"))
    assert str(error) == "INVALID_ARGUMENT: prompt: empty"


def test_an_unmet_precondition_names_its_subject(serve: Serve) -> None:
    violation = error_details_pb2.PreconditionFailure.Violation(
        type="MODEL", subject="program.edits[0].add.vector", description="made for another model"
    )
    detail = error_details_pb2.PreconditionFailure(violations=[violation])
    error = error_of(serve, grpc.StatusCode.FAILED_PRECONDITION, "refused", detail)
    assert error.violations == (FieldViolation("program.edits[0].add.vector", "made for another model"),)


def test_retry_info_is_in_seconds(serve: Serve) -> None:
    detail = error_details_pb2.RetryInfo(retry_delay=duration_pb2.Duration(seconds=1, nanos=500_000_000))
    error = error_of(serve, grpc.StatusCode.RESOURCE_EXHAUSTED, "full", detail)
    assert error.retry_after == 1.5
    assert "try again in 1.5 s" in str(error)


def test_error_info_gives_the_reason_and_the_field_of_a_missing_artifact(serve: Serve) -> None:
    detail = error_details_pb2.ErrorInfo(reason="NOT_FOUND", metadata={"field": "ref"})
    error = error_of(serve, grpc.StatusCode.NOT_FOUND, "no artifact", detail)
    assert (error.reason, error.violations) == ("NOT_FOUND", (FieldViolation("ref", "no artifact"),))


def test_details_of_an_unknown_type_are_passed_over(serve: Serve) -> None:
    error = error_of(serve, grpc.StatusCode.INTERNAL, "broken", duration_pb2.Duration(seconds=1))
    assert (error.code, error.message, error.violations) == ("INTERNAL", "broken", ())


def test_details_that_do_not_parse_leave_code_and_message(serve: Serve) -> None:
    address = serve(models=Refusing(grpc.StatusCode.INTERNAL, "", ()))
    with Client(address) as client, pytest.raises(PatchclampError, match="INTERNAL: broken"):
        client.tokenize("hi")


@pytest.mark.parametrize("first", ["patchclamp", "google.rpc.error_details_pb2", "grpc_health.v1.health_pb2"])
def test_the_private_descriptors_do_not_clash_with_the_installed_ones(first: str) -> None:
    imports = f"import {first}; import patchclamp, google.rpc.error_details_pb2, grpc_health.v1.health_pb2"
    assert subprocess.run([sys.executable, "-c", imports], check=False).returncode == 0


def test_the_client_imports_only_grpcio_and_protobuf() -> None:
    code = (
        "import sys\n"
        "class Refuse:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        allowed = {'patchclamp', 'grpc', 'google', 'typing_extensions', *sys.stdlib_module_names}\n"
        "        if name.partition('.')[0] not in allowed or name.startswith('google.rpc'):\n"
        "            raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Refuse())\n"
        "import patchclamp.cli, patchclamp.programs\n"
    )
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr

"""The published schema describes what is served: requests drawn from it, and from what it forbids."""

import json
from typing import Any

import pytest
import schemathesis
from google.protobuf import json_format
from hypothesis import HealthCheck, given, settings
from live_front import LiveFront
from patience import PATIENCE_SECONDS
from patient_http import get
from schemathesis import Case, GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
)
from test_connect import streamed

from patchclamp_http.connect.methods import rpcs
from patchclamp_http.schema.openapi import openapi

CHECKS = [not_a_server_error, content_type_conformance, response_schema_conformance, status_code_conformance]
EXAMPLES = settings(
    max_examples=20,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
)


@pytest.fixture(scope="module")
def published(front: LiveFront) -> Any:
    return schemathesis.openapi.from_url(f"{front.url}/openapi.json")


@schemathesis.hook
def map_body(context: Any, body: Any) -> Any:
    """Bounds the work: what is drawn may ask for thousands of tokens of thousands of prompts."""
    if isinstance(body, dict):
        for name, most in (("n", 2), ("best_of", 2), ("max_tokens", 4), ("max_completion_tokens", 4)):
            if isinstance(body.get(name), int) and body[name] > most:
                body[name] = most
    return body


STREAMS = {rpc.path: rpc for rpc in rpcs() if rpc.takes_stream or rpc.gives_stream}
PATHS = [(path, method.upper()) for path, methods in openapi()["paths"].items() for method in methods]
OPERATIONS = [(path, method) for path, method in PATHS if path not in STREAMS]


def short(value: object) -> str:
    return str(value).rpartition(".")[2]


@pytest.mark.parametrize(("path", "method"), OPERATIONS, ids=short)
def test_what_is_asked_for_as_published_is_answered_so(published: Any, path: str, method: str) -> None:
    fuzzed(published[path][method], GenerationMode.POSITIVE, CHECKS)


@pytest.mark.parametrize("path", [path for path, method in OPERATIONS if method == "POST"], ids=short)
def test_what_is_not_as_published_is_refused(published: Any, path: str) -> None:
    # Messages of the contract are read with more names, and with numbers as text.
    strict = () if path.startswith("/patchclamp") else (negative_data_rejection,)
    fuzzed(published[path]["POST"], GenerationMode.NEGATIVE, [*CHECKS, *strict])


@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
@pytest.mark.parametrize("path", STREAMS, ids=short)
def test_a_stream_answers_whatever_it_is_sent(
    published: Any, front: LiveFront, path: str, mode: GenerationMode
) -> None:
    """Messages in envelopes are nothing that schemathesis can send."""

    @settings(EXAMPLES, max_examples=4)
    @given(case=published[path]["POST"].as_strategy(generation_mode=mode))
    def holds(case: Case) -> None:
        messages, end = streamed(front, path, as_json(case.body))
        for message in messages:
            json_format.ParseDict(message, STREAMS[path].response())
        assert end.get("error", {}).get("code") not in ("internal", "unknown")

    holds()


def as_json(body: Any) -> Any:
    """What was drawn, as far as it is JSON."""
    return json.loads(json.dumps(body, default=str))


def fuzzed(operation: Any, mode: GenerationMode, checks: list[Any]) -> None:
    # RPCs are many, and alike.
    @settings(EXAMPLES, max_examples=4 if operation.path.startswith("/patchclamp") else 20)
    @given(case=operation.as_strategy(generation_mode=mode))
    def holds(case: Case) -> None:
        case.call_and_validate(checks=checks, timeout=PATIENCE_SECONDS)

    holds()


def test_the_schema_is_served_and_whole(front: LiveFront) -> None:
    found = get(f"{front.url}/openapi.json").json()
    assert found["openapi"].startswith("3.1")
    assert "/v1/chat/completions" in found["paths"]
    assert "/patchclamp.v1.GenerationService/Generate" in found["paths"]


def test_messages_with_a_json_of_their_own_are_published_so() -> None:
    schemas = openapi()["components"]["schemas"]
    assert not [name for name in schemas if name.startswith("google.protobuf.")]
    artifact = schemas["patchclamp.v1.Artifact"]["properties"]
    assert artifact["provenance"] == {"type": "object"}
    assert artifact["created"]["format"] == "date-time"

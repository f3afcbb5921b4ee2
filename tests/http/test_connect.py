"""JSON for every RPC: as curl sends it, and by a client of the Connect protocol."""

import json
import struct
from collections.abc import Iterator
from typing import Any

import pytest
from live import LiveServer
from live_front import LiveFront
from patient_http import post

from patchclamp import Client
from patchclamp.v1 import generation_pb2 as pb
from patchclamp_http.connect.methods import rpcs

GENERATION = "/patchclamp.v1.GenerationService"
GENERATE: dict[str, Any] = {"prompt": {"text": "hello"}, "stop": {"maxTokens": 8, "ignoreEos": True}}


def enveloped(*messages: dict[str, Any]) -> bytes:
    encoded = [json.dumps(message).encode() for message in messages]
    return b"".join(struct.pack(">BI", 0, len(data)) + data for data in encoded)


def envelopes(body: bytes) -> Iterator[tuple[int, Any]]:
    """Flags and JSON of each."""
    while body:
        flags, size = struct.unpack(">BI", body[:5])
        yield flags, json.loads(body[5 : 5 + size])
        body = body[5 + size :]


def streamed(front: LiveFront, path: str, *messages: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    """What a call streams, and how it ended."""
    answer = post(front.url + path, content=enveloped(*messages), headers={"content-type": "application/connect+json"})
    assert answer.status_code == 200
    *found, (flags, end) = envelopes(answer.content)
    assert flags == 2
    return [message for _, message in found], end


def test_a_call_of_one_message_is_plain_json(front: LiveFront, live_server: LiveServer) -> None:
    answer = post(f"{front.url}/patchclamp.v1.ModelService/Tokenize", json={"prompt": {"text": "hello"}})
    with Client(live_server.address) as grpc:
        assert answer.json()["ids"] == list(grpc.tokenize("hello").ids)


def test_a_stream_has_what_grpc_streams(front: LiveFront, live_server: LiveServer) -> None:
    messages, end = streamed(front, f"{GENERATION}/Generate", GENERATE)
    with Client(live_server.address) as grpc:
        wanted = grpc.generate("hello", max_tokens=8, ignore_eos=True).result()
    assert end == {}
    assert "".join(message.get("text", "") for message in messages) == wanted.text
    assert messages[-1]["finished"]["reason"] == "FINISH_REASON_LENGTH"


def test_a_stream_of_requests_is_passed_on(front: LiveFront) -> None:
    start = {"start": {"request": GENERATE}}
    messages, end = streamed(front, f"{GENERATION}/Session", start)
    assert end == {}
    assert sum(len(message.get("tokens", ())) for message in messages) == 8


def test_protobuf_is_spoken_too(front: LiveFront) -> None:
    body = pb.ScoreRequest(prompt=pb.Prompt(text="hello"), text=" you").SerializeToString()
    answer = post(f"{front.url}{GENERATION}/Score", content=body, headers={"content-type": "application/proto"})
    assert len(pb.ScoreResponse.FromString(answer.content).tokens) == 4


def test_a_refusal_has_its_code_and_details(front: LiveFront) -> None:
    wrong = {**GENERATE, "sampling": {"temperature": -1}}
    answer = post(f"{front.url}/patchclamp.v1.ModelService/Tokenize", json={"model": "other"})
    assert answer.status_code == 404
    assert answer.json()["code"] == "not_found"
    assert [detail["type"] for detail in answer.json()["details"]] == ["google.rpc.ErrorInfo"]
    messages, end = streamed(front, f"{GENERATION}/Generate", wrong)
    assert not messages
    assert end["error"]["code"] == "invalid_argument"
    assert end["error"]["message"].startswith("sampling.temperature:")


def test_an_unknown_field_is_refused(front: LiveFront) -> None:
    answer = post(f"{front.url}/patchclamp.v1.ModelService/Tokenize", json={"promt": {"text": "hello"}})
    assert (answer.status_code, answer.json()["code"]) == (400, "invalid_argument")
    assert "promt" in answer.json()["message"]


def test_a_deadline_ends_a_call(front: LiveFront) -> None:
    long = {"prompt": {"text": "hello"}, "stop": {"maxTokens": 250, "ignoreEos": True}}
    answer = post(
        f"{front.url}{GENERATION}/Generate",
        content=enveloped(long),
        headers={"content-type": "application/connect+json", "connect-timeout-ms": "5"},
    )
    *_, (_, end) = envelopes(answer.content)
    assert end["error"]["code"] == "deadline_exceeded"


@pytest.mark.parametrize("content_type", ["application/grpc", "application/grpc-web+proto", "text/plain"])
def test_other_content_types_are_refused(front: LiveFront, content_type: str) -> None:
    answer = post(f"{front.url}{GENERATION}/Score", content=b"", headers={"content-type": content_type})
    assert answer.status_code == 415


def test_every_rpc_has_a_route(front: LiveFront) -> None:
    """What is asked for is nothing, so that no call does anything: it is only found."""
    for rpc in rpcs():
        answer = post(front.url + rpc.path, content=b"", headers={"content-type": "application/none"})
        assert answer.status_code == 415, rpc.path


def test_every_service_of_the_contract_is_served() -> None:
    from patchclamp_server.rpc.contract import SERVICES

    assert {rpc.service for rpc in rpcs()} == set(SERVICES)

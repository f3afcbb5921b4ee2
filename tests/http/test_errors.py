"""Errors in the form that OpenAI's clients read, with the path of the field at fault."""

import base64
import json
import struct
import urllib.error
import urllib.request
from typing import Any

import openai
import pytest
from live_front import LiveFront


def refused(call: Any) -> dict[str, Any]:
    """The body of an error."""
    with pytest.raises(openai.APIStatusError) as caught:
        call()
    body = caught.value.body
    assert isinstance(body, dict)
    return {"status": caught.value.status_code, **body}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": -1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"n": 0}, "n"),
        ({"logprobs": 99}, "logprobs"),
        ({"stop": [""]}, "stop[0]"),
        ({"stop": ""}, "stop"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"best_of": 2}, "best_of"),
        ({"suffix": "end"}, "suffix"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"extra_body": {"temprature": 1}}, "temprature"),
        ({"extra_body": {"patchclamp": {"model": "other"}}}, "patchclamp.model"),
        ({"extra_body": {"patchclamp": {"sampling": {"temperature": 1}}}, "temperature": 1}, "sampling.temperature"),
        ({"extra_body": {"patchclamp": {"program": {"edits": [{"strenght": 1}]}}}}, "patchclamp.program.edits[0]"),
        (
            {"extra_body": {"patchclamp": {"program": {"edits": [{"site": "SITE_RESID_POST"}]}}}},
            "patchclamp.program.edits[0]",
        ),
        ({"extra_body": {"patchclamp": {"priority": 9}}}, "patchclamp.priority"),
        ({"extra_body": {"stop_token_ids": [2**31]}}, "stop_token_ids[0]"),
    ],
)
def test_a_field_that_is_not_accepted_is_named(
    client: openai.OpenAI, model: str, fields: dict[str, Any], param: str
) -> None:
    error = refused(lambda: client.completions.create(model=model, prompt="hello", **fields))
    assert error["status"] == 400
    assert error["type"] == "invalid_request_error"
    assert param in error["param"]
    assert error["message"].startswith(error["param"])


def test_fields_of_messages_are_named(client: openai.OpenAI, model: str) -> None:
    messages: Any = [{"role": "user", "content": "Hi"}, {"role": "robot", "content": "Ho"}]
    error = refused(lambda: client.chat.completions.create(model=model, messages=messages))
    assert (error["status"], error["param"]) == (400, "messages[1].role")


def test_a_model_that_is_not_served_is_not_found(client: openai.OpenAI) -> None:
    error = refused(lambda: client.completions.create(model="gpt-9", prompt="hello"))
    assert (error["status"], error["param"], error["code"]) == (404, "model", "NOT_FOUND")


def test_an_error_comes_before_a_stream_begins(client: openai.OpenAI, model: str) -> None:
    error = refused(lambda: client.completions.create(model=model, prompt="", stream=True))
    assert (error["status"], error["param"]) == (400, "prompt")


def test_an_abort_condition_ends_a_stream_with_an_error(client: openai.OpenAI, model: str) -> None:
    ones = base64.b64encode(struct.pack("<32f", *[1.0] * 32)).decode()
    vector = {"values": {"dtype": "DATA_TYPE_FLOAT32", "shape": [32], "data": ones}}
    condition = {
        "site": "SITE_RESID_POST",
        "layer": 1,
        "vector": vector,
        "comparison": "COMPARISON_ABOVE",
        "threshold": -1e9,
        "scope": {"include": [{"phase": "PHASE_GENERATED"}]},
    }
    program = {"abortWhen": [{"name": "always", "condition": condition}]}
    stream = client.completions.create(
        model=model, prompt="hello", stream=True, extra_body={"patchclamp": {"program": program}, "ignore_eos": True}
    )
    with pytest.raises(openai.APIError) as caught:
        list(stream)
    assert caught.value.code == "ABORT_CONDITION_FIRED"


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/v1/completions", b"{", 400),
        ("/v1/completions", b"[]", 400),
        ("/v1/completions", b"\xff", 400),
        ("/v1/nothing", b"{}", 404),
        ("/v1/models", b"{}", 405),
    ],
)
def test_what_is_no_request_is_refused_in_the_same_form(front: LiveFront, path: str, body: bytes, status: int) -> None:
    request = urllib.request.Request(front.url + path, body, {"content-type": "application/json"})
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(request)
    assert caught.value.code == status
    assert set(json.load(caught.value)["error"]) == {"message", "type", "param", "code"}


def test_another_content_type_is_refused(front: LiveFront) -> None:
    """A page of another origin may send some of them without being allowed to."""
    request = urllib.request.Request(f"{front.url}/v1/completions", b"{}", {"content-type": "text/plain"})
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(request)
    assert caught.value.code == 415

"""The field `patchclamp`: programs, sparsity and readouts in a request of OpenAI's API, receipts in its answer."""

import base64
import struct
from typing import Any

import openai
from live import LiveServer

from patchclamp import Client

GREEDY = {"temperature": 0.0, "max_tokens": 12}


def tensor(values: list[float]) -> dict[str, Any]:
    """The JSON of a tensor."""
    data = base64.b64encode(struct.pack(f"<{len(values)}f", *values)).decode()
    return {"dtype": "DATA_TYPE_FLOAT32", "shape": [len(values)], "data": data}


def add(strength: float) -> dict[str, Any]:
    vector = {"values": tensor([1.0] * 32)}
    return {"name": "push", "site": "SITE_RESID_POST", "layers": [0], "strength": strength, "add": {"vector": vector}}


def asked(**fields: Any) -> dict[str, Any]:
    return {"extra_body": {"ignore_eos": True, "patchclamp": fields}, **GREEDY}


def test_a_program_steers_and_the_receipt_says_so(client: openai.OpenAI, model: str) -> None:
    plain = client.completions.create(model=model, prompt="hello", **asked()).choices[0]
    steered = client.completions.create(model=model, prompt="hello", **asked(program={"edits": [add(4.0)]})).choices[0]
    assert steered.text != plain.text
    receipt = steered.patchclamp["finished"]["receipt"]
    assert receipt["touched"]
    assert receipt["edits"][0]["name"] == "push"
    assert int(receipt["edits"][0]["rows"]) == 5 + 11


def test_names_of_fields_may_be_those_of_the_contract(client: openai.OpenAI, model: str) -> None:
    edit = {**add(1.0), "preserve_norm": True}
    choice = client.completions.create(model=model, prompt="hello", **asked(program={"edits": [edit]})).choices[0]
    assert choice.patchclamp["finished"]["receipt"]["programFingerprint"]


def test_readouts_come_with_the_tokens_of_a_stream(client: openai.OpenAI, model: str) -> None:
    vector = {"values": tensor([1.0] * 32)}
    readout = {"name": "along", "site": "SITE_RESID_POST", "layers": [1], "projection": {"vectors": [vector]}}
    chunks = list(
        client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": "Hi"}],
            stream=True,
            temperature=0,
            max_completion_tokens=12,
            extra_body={"ignore_eos": True, "patchclamp": {"program": {"readouts": [readout]}}},
        )
    )
    said = [chunk.choices[0].patchclamp for chunk in chunks if hasattr(chunk.choices[0], "patchclamp")]
    tokens = [token for one in said for token in one.get("tokens", ())]
    assert len(tokens) == 12
    assert all(token["readouts"][0]["name"] == "along" for token in tokens[:-1])
    assert said[-1]["finished"]["receipt"]


def test_what_is_not_asked_for_is_not_sent(client: openai.OpenAI, model: str) -> None:
    choice = client.completions.create(model=model, prompt="hello", **GREEDY).choices[0]
    assert not hasattr(choice, "patchclamp")


def test_fields_that_openai_has_not_are_those_of_generate(client: openai.OpenAI, model: str, live_server: LiveServer):
    options = asked(sampling={"repetitionPenalty": 1.5}, stop={"ignoreEos": True})
    options["extra_body"].pop("ignore_eos")
    found = client.completions.create(model=model, prompt="hello", **options).choices[0]
    with Client(live_server.address) as grpc:
        wanted = grpc.generate("hello", max_tokens=12, repetition_penalty=1.5, ignore_eos=True).result()
    assert found.text == wanted.text


def test_sparse_inference_reports_what_was_left_out(client: openai.OpenAI, model: str) -> None:
    sparsity = {"policy": {"griffin": {}, "keepRatio": 0.5}}
    choice = client.completions.create(model=model, prompt="hello", **asked(sparsity=sparsity)).choices[0]
    assert choice.patchclamp["finished"]["sparsity"]["sparseTokens"] > 0

"""GET /openapi.json: all that the front serves, as OpenAPI 3.1."""

from importlib.metadata import version
from typing import Any

import orjson

from patchclamp.v1 import activation_pb2, generation_pb2, model_pb2
from patchclamp_http.connect.methods import Rpc, rpcs
from patchclamp_http.http import Call
from patchclamp_http.openai import embeddings, fields, tokens
from patchclamp_http.openai.kinds import Kind
from patchclamp_http.schema import answers
from patchclamp_http.schema.messages import reference, schemas

JsonSchema = dict[str, Any]
_EXTENSIONS = (
    generation_pb2.GenerateRequest,
    generation_pb2.GenerateResponse,
    activation_pb2.ReadActivationsRequest,
    model_pb2.Model,
)
_EVENTS = "text/event-stream"
# Its data are a chunk, an error or [DONE].
_EVENT = {"type": "object", "properties": {"data": {"type": "string"}}, "required": ["data"]}


class Schema:
    """Answers with the schema, which is made once."""

    def __init__(self) -> None:
        self._body = orjson.dumps(openapi())

    async def __call__(self, call: Call) -> None:
        await call.answer_bytes(self._body)


def openapi() -> JsonSchema:
    messages: list[Any] = [message.DESCRIPTOR for message in _EXTENSIONS]
    for rpc in rpcs():
        messages += [rpc.request.DESCRIPTOR, rpc.response.DESCRIPTOR]
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Patchclamp",
            "version": version("patchclamp"),
            "description": "White-box serving of language models: OpenAI's API with the field `patchclamp`, and JSON "
            "for every RPC by the Connect protocol.",
        },
        "paths": {**_openai(), **{rpc.path: {"post": _rpc(rpc)} for rpc in rpcs()}},
        "components": {
            "schemas": {**schemas(messages), "Error": answers.ERROR, "ConnectError": answers.CONNECT_ERROR},
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
        },
        # A server may take calls without a token.
        "security": [{"token": []}, {}],
    }


def _openai() -> JsonSchema:
    name = {"name": "name", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
    return {
        "/v1/completions": {"post": _post("Completions", fields.COMPLETION, answers.COMPLETION, streams=True)},
        "/v1/chat/completions": {"post": _post("Chat", fields.CHAT, answers.CHAT, streams=True)},
        "/v1/embeddings": {"post": _post("Embeddings", embeddings.EMBEDDINGS, answers.EMBEDDINGS)},
        "/v1/models": {"get": _operation("Models", answers.MODELS)},
        "/v1/models/{name}": {"get": {**_operation("Model", answers.MODEL), "parameters": [name]}},
        "/tokenize": {"post": _post("Tokenize", tokens.TOKENIZE, answers.TOKENS)},
        "/detokenize": {"post": _post("Detokenize", tokens.DETOKENIZE, answers.DETOKENIZED)},
        "/health": {
            "get": {
                **_operation("Health", answers.HEALTH),
                "responses": {status: _content(answers.HEALTH) for status in ("200", "503")},
            }
        },
    }


def _post(name: str, asked: Kind, answer: JsonSchema, *, streams: bool = False) -> JsonSchema:
    operation = _operation(name, answer)
    operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": asked.schema}}}
    if streams:
        operation["responses"]["200"]["content"][_EVENTS] = {"schema": _EVENT}
    return operation


def _operation(name: str, answer: JsonSchema) -> JsonSchema:
    return {
        "operationId": name,
        "tags": ["OpenAI"],
        "responses": {"200": _content(answer), "default": _content({"$ref": "#/components/schemas/Error"})},
    }


def _rpc(rpc: Rpc) -> JsonSchema:
    streams = rpc.takes_stream or rpc.gives_stream
    kind = "application/connect+json" if streams else "application/json"
    asked, told = reference(rpc.descriptor.input_type), reference(rpc.descriptor.output_type)
    operation = {
        "operationId": f"{rpc.service.rpartition('.')[2]}_{rpc.name}",
        "tags": [rpc.service],
        "requestBody": {"required": True, "content": {kind: {"schema": asked}}},
        "responses": {
            "200": _content(told, kind),
            "default": _content({"$ref": "#/components/schemas/ConnectError"}),
        },
    }
    if streams:
        operation["description"] = "Each message stands in an envelope of the Connect protocol, the schema is of one."
    return operation


def _content(schema: JsonSchema, kind: str = "application/json") -> JsonSchema:
    return {"description": "answer", "content": {kind: {"schema": schema}}}

"""GET /v1/models and /v1/models/{name}."""

from typing import Any

from google.protobuf import json_format

from patchclamp.v1 import model_pb2
from patchclamp_http.errors import ApiError
from patchclamp_http.http import Call
from patchclamp_http.upstream import Upstream


class Models:
    def __init__(self, upstream: Upstream) -> None:
        self._upstream = upstream

    async def __call__(self, call: Call) -> None:
        models = await self._upstream.models(self._upstream.options(call.headers))
        await call.answer({"object": "list", "data": [_model(model) for model in models]})

    async def one(self, call: Call) -> None:
        name = call.scope["path_params"]["name"]
        for model in await self._upstream.models(self._upstream.options(call.headers)):
            if model.name == name:
                return await call.answer(_model(model))
        message = f"model: {name!r} is not served here"
        raise ApiError(404, message, "not_found_error", param="model", code="NOT_FOUND")


def _model(model: model_pb2.Model) -> dict[str, Any]:
    return {
        "id": model.name,
        "object": "model",
        # When the weights were made is not known.
        "created": 0,
        "owned_by": "patchclamp",
        # As other servers of this API have it.
        "max_model_len": model.context_length,
        "patchclamp": json_format.MessageToDict(model),
    }

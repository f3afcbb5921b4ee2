"""POST /v1/embeddings: the activations of texts at one site and layer, pooled over their tokens.

The residual stream behind the last block, averaged over all tokens, unless the field `patchclamp` (the JSON of a
ReadActivationsRequest) says otherwise: site, layer, reduction, scope, and a program that the model is run under. The
numbers are as the model has them, and of no unit length.
"""

import base64
from typing import Any

from patchclamp.errors import PatchclampError
from patchclamp.v1 import activation_pb2 as pb
from patchclamp.v1 import generation_pb2, program_pb2, tensor_pb2
from patchclamp_http.errors import from_grpc, invalid
from patchclamp_http.http import Call
from patchclamp_http.openai.fields import PROMPT
from patchclamp_http.openai.kinds import anything, obj, string
from patchclamp_http.openai.requests import parse
from patchclamp_http.upstream import Options, Upstream, messages

EMBEDDINGS = obj(
    {
        "model": string(),
        "input": PROMPT,
        "encoding_format": string("float", "base64"),
        "user": anything(),
        "patchclamp": anything({"$ref": "#/components/schemas/patchclamp.v1.ReadActivationsRequest"}),
    },
    required=("input",),
)
EXTENSION_FIELDS = ("program", "sites", "layers", "scope", "reduction")
# One row for each text.
REDUCTIONS = (
    pb.ACTIVATION_REDUCTION_FIRST,
    pb.ACTIVATION_REDUCTION_LAST,
    pb.ACTIVATION_REDUCTION_MEAN,
    pb.ACTIVATION_REDUCTION_SUM,
    pb.ACTIVATION_REDUCTION_MAX,
)


class Embeddings:
    def __init__(self, upstream: Upstream, max_body_bytes: int) -> None:
        self._upstream = upstream
        self._max_body_bytes = max_body_bytes

    async def __call__(self, call: Call) -> None:
        given = EMBEDDINGS.check(await call.json(self._max_body_bytes), "")
        options = self._upstream.options(call.headers)
        async with call.while_connected():
            try:
                request = await self._request(given, options)
                rows, tokens = await self._rows(request, options)
            except PatchclampError as error:
                raise from_grpc(error, {"model": "model", "prompts": "input"}) from None
            encode = _as_base64 if given.get("encoding_format") == "base64" else _as_numbers
            data = [{"object": "embedding", "index": index, "embedding": encode(row)} for index, row in enumerate(rows)]
            await call.answer(
                {
                    "object": "list",
                    "data": data,
                    "model": request.model or await self._upstream.model_name(options),
                    "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
                }
            )

    async def _request(self, given: dict[str, Any], options: Options) -> pb.ReadActivationsRequest:
        request = pb.ReadActivationsRequest()
        if "patchclamp" in given:
            parse(given["patchclamp"], request, "patchclamp")
        for field, _ in request.ListFields():
            if field.name not in EXTENSION_FIELDS:
                raise invalid(f"patchclamp.{field.name}", f"expected one of {', '.join(EXTENSION_FIELDS)}")
        if len(request.sites) > 1:
            raise invalid("patchclamp.sites", f"expected one site, got {len(request.sites)}")
        if len(request.layers) > 1:
            raise invalid("patchclamp.layers", f"expected one layer, got {len(request.layers)}")
        request.model = given.get("model", "")
        if not request.sites:
            request.sites.append(program_pb2.SITE_RESID_POST)
        if not request.layers:
            request.layers.append((await self._upstream.models(options))[0].n_layers - 1)
        request.reduction = request.reduction or pb.ACTIVATION_REDUCTION_MEAN
        if request.reduction not in REDUCTIONS:
            accepted = ", ".join(pb.ActivationReduction.Name(r) for r in REDUCTIONS)
            raise invalid("patchclamp.reduction", f"expected one row for each text: {accepted}")
        inputs = given["input"]
        if isinstance(inputs, str) or isinstance(inputs[0], int):
            inputs = [inputs]
        for one in inputs:
            if isinstance(one, str):
                request.prompts.append(generation_pb2.Prompt(text=one))
            else:
                request.prompts.append(generation_pb2.Prompt(tokens=generation_pb2.TokenIds(ids=one)))
        return request

    async def _rows(self, request: pb.ReadActivationsRequest, options: Options) -> tuple[list[bytes], int]:
        """Returns a row of float32 for each input, and how many tokens were run."""
        found: dict[int, bytes] = {}
        tokens = 0
        call = self._upstream.stubs.activations.ReadActivations(request, **options.arguments())
        async for response in messages(call):
            rows = response.rows
            if rows.texts:
                assert rows.values.dtype == tensor_pb2.DATA_TYPE_FLOAT32
                width = 4 * rows.values.shape[1]
                for i, text in enumerate(rows.texts):
                    found[text] = rows.values.data[i * width : (i + 1) * width]
            if response.HasField("result"):
                tokens = response.result.tokens
        missing = [i for i in range(len(request.prompts)) if i not in found]
        if missing:
            raise invalid(f"input[{missing[0]}]", "has no token in scope, so that there is nothing to read")
        return [found[i] for i in range(len(request.prompts))], tokens


def _as_base64(row: bytes) -> str:
    return base64.b64encode(row).decode()


def _as_numbers(row: bytes) -> list[float]:
    return list(memoryview(row).cast("f"))

"""POST /tokenize and /detokenize, as other servers of OpenAI's API have them."""

from patchclamp.errors import PatchclampError
from patchclamp.v1 import generation_pb2, model_pb2
from patchclamp_http.errors import from_grpc, invalid
from patchclamp_http.http import Call
from patchclamp_http.openai.fields import MESSAGE, TOKEN_ID
from patchclamp_http.openai.kinds import array, boolean, obj, string
from patchclamp_http.openai.requests import role_of, text_of
from patchclamp_http.upstream import Upstream, answer

TOKENIZE = obj({"model": string(), "prompt": string(), "messages": array(MESSAGE, 1)})
DETOKENIZE = obj({"model": string(), "tokens": array(TOKEN_ID), "skip_special_tokens": boolean()}, required=("tokens",))
NAMES = {"model": "model", "prompt.chat.messages": "messages", "prompt.chat": "messages", "prompt": "prompt"}


class Tokenize:
    def __init__(self, upstream: Upstream, max_body_bytes: int) -> None:
        self._upstream = upstream
        self._max_body_bytes = max_body_bytes

    async def __call__(self, call: Call) -> None:
        given = TOKENIZE.check(await call.json(self._max_body_bytes), "")
        if ("prompt" in given) == ("messages" in given):
            raise invalid("prompt", "expected either prompt or messages")
        prompt = generation_pb2.Prompt(text=given["prompt"]) if "prompt" in given else generation_pb2.Prompt()
        for message in given.get("messages", ()):
            prompt.chat.messages.add(role=role_of(message["role"]), content=text_of(message["content"]))
        request = model_pb2.TokenizeRequest(model=given.get("model", ""), prompt=prompt)
        options = self._upstream.options(call.headers)
        try:
            found = await answer(self._upstream.stubs.models.Tokenize(request, **options.arguments()))
        except PatchclampError as error:
            raise from_grpc(error, NAMES) from None
        await call.answer({"count": len(found.ids), "tokens": list(found.ids), "token_strs": list(found.pieces)})


class Detokenize:
    def __init__(self, upstream: Upstream, max_body_bytes: int) -> None:
        self._upstream = upstream
        self._max_body_bytes = max_body_bytes

    async def __call__(self, call: Call) -> None:
        given = DETOKENIZE.check(await call.json(self._max_body_bytes), "")
        request = model_pb2.DetokenizeRequest(
            model=given.get("model", ""),
            ids=given["tokens"],
            skip_special_tokens=given.get("skip_special_tokens", False),
        )
        options = self._upstream.options(call.headers)
        try:
            found = await answer(self._upstream.stubs.models.Detokenize(request, **options.arguments()))
        except PatchclampError as error:
            raise from_grpc(error, {"model": "model", "ids": "tokens"}) from None
        await call.answer({"prompt": found.text, "token_strs": list(found.pieces)})

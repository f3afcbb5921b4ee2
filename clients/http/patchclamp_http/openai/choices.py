"""Choices of OpenAI's API, made of the responses of Generate: whole, or in the pieces of a stream."""

from collections.abc import Callable
from typing import Any

from google.protobuf import json_format

from patchclamp.v1 import generation_pb2 as pb
from patchclamp_http.openai.logprobs import CompletionLogprobs, chat_logprobs
from patchclamp_http.openai.requests import Asked

REASONS = {
    pb.FINISH_REASON_EOS: "stop",
    pb.FINISH_REASON_STOP_STRING: "stop",
    pb.FINISH_REASON_STOP_TOKEN: "stop",
    pb.FINISH_REASON_CLIENT: "stop",
    pb.FINISH_REASON_LENGTH: "length",
}
Json = dict[str, Any]


def extension_of(response: pb.GenerateResponse) -> Json:
    """Returns the JSON of a response without the text, which the choice has."""
    rest = pb.GenerateResponse()
    rest.CopyFrom(response)
    rest.ClearField("text")
    found: Json = json_format.MessageToDict(rest)
    return found


class Pieces:
    """Makes the pieces of one choice: what a stream sends for each response. `echo` comes before their text."""

    def __init__(self, asked: Asked, index: int, echo: str = "") -> None:
        self._asked = asked
        self._echo = echo
        self._index = index
        self._make: Callable[[pb.GenerateResponse], Json] = self._delta if asked.is_chat else self._text
        self._logprobs = CompletionLogprobs()

    def piece(self, response: pb.GenerateResponse) -> Json | None:
        """Returns the choice of the next chunk, or None where the caller has asked for nothing of the response."""
        asked = self._asked
        ends = response.HasField("finished")
        wants_tokens = asked.logprobs is not None and len(response.tokens) + len(response.prompt_tokens) > 0
        if not (response.text or self._echo or ends or wants_tokens or asked.extended):
            return None
        choice = self._make(response)
        choice["logprobs"] = self._logprobs_of(response) if wants_tokens else None
        choice["finish_reason"] = REASONS[response.finished.reason] if ends else None
        if asked.extended:
            choice["patchclamp"] = extension_of(response)
        return choice

    def _text(self, response: pb.GenerateResponse) -> Json:
        text, self._echo = self._echo + response.text, ""
        return {"index": self._index, "text": text}

    def _delta(self, response: pb.GenerateResponse) -> Json:
        return {"index": self._index, "delta": {"content": response.text} if response.text else {}}

    def _logprobs_of(self, response: pb.GenerateResponse) -> Json:
        if self._asked.is_chat:
            return chat_logprobs(response.tokens)
        return self._logprobs.of([*response.prompt_tokens, *response.tokens])

    def first(self) -> Json:
        """Returns what a chat begins with."""
        delta = {"role": "assistant", "content": ""}
        return {"index": self._index, "delta": delta, "logprobs": None, "finish_reason": None}


class Whole:
    """Collects the responses of one choice. `echo` comes before their text."""

    def __init__(self, asked: Asked, index: int, echo: str = "") -> None:
        self._asked = asked
        self._index = index
        self._response = pb.GenerateResponse()
        self._texts = [echo]

    def add(self, response: pb.GenerateResponse) -> None:
        self._texts.append(response.text)
        self._response.MergeFrom(response)

    def choice(self) -> Json:
        asked, response = self._asked, self._response
        text = "".join(self._texts)
        found: Json = {"index": self._index}
        if asked.is_chat:
            found["message"] = {"role": "assistant", "content": text, "refusal": None}
        else:
            found["text"] = text
        found["logprobs"] = None
        if asked.logprobs is not None:
            tokens = [*response.prompt_tokens, *response.tokens]
            found["logprobs"] = chat_logprobs(tokens) if asked.is_chat else CompletionLogprobs().of(tokens)
        found["finish_reason"] = REASONS[response.finished.reason]
        if asked.extended:
            found["patchclamp"] = extension_of(response)
        return found


class Usage:
    """Counts tokens over all choices; the prompt once for its samples."""

    def __init__(self) -> None:
        self._prompt = self._cached = self._generated = 0

    def add(self, usage: pb.Usage, *, is_first: bool) -> None:
        if is_first:
            self._prompt += usage.prompt_tokens
            self._cached += usage.cached_prompt_tokens
        self._generated += usage.generated_tokens

    def json(self) -> Json:
        return {
            "prompt_tokens": self._prompt,
            "completion_tokens": self._generated,
            "total_tokens": self._prompt + self._generated,
            "prompt_tokens_details": {"cached_tokens": self._cached},
        }

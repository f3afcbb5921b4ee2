"""Requests of OpenAI's API as GenerateRequests: one for each prompt, of which there are `n` samples."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from google.protobuf import json_format
from google.protobuf.message import Message

from patchclamp.v1 import generation_pb2 as pb
from patchclamp_http.errors import invalid
from patchclamp_http.openai import fields
from patchclamp_http.openai.fields import SAMPLING
from patchclamp_http.openai.kinds import below

# Where the caller does not say, as OpenAI has it.
DEFAULT_COMPLETION_TOKENS = 16
DEFAULT_TEMPERATURE = 1.0
_PLACE = re.compile(r' at "\w+\.(?P<path>[^"]+)"')


@dataclass
class Asked:
    """What was asked for. `names` are the fields of the caller by their paths in a GenerateRequest."""

    requests: list[pb.GenerateRequest]
    samples: int
    stream: bool
    include_usage: bool
    # Whether receipts, tokens and readouts are wanted in the field `patchclamp`.
    extended: bool
    logprobs: int | None
    names: dict[str, str]
    is_chat: bool
    echo: bool = False


def completion(body: Mapping[str, Any]) -> Asked:
    """Raises ApiError, which names the field, for what is not accepted."""
    given = fields.COMPLETION.check(body, "")
    overlay = _Overlay(given)
    overlay.common()
    if "max_tokens" in given or not overlay.has("stop.max_tokens"):
        overlay.set("stop.max_tokens", given.get("max_tokens", DEFAULT_COMPLETION_TOKENS), "max_tokens")
    if "logprobs" in given:
        overlay.set("logprobs", given["logprobs"], "logprobs")
        if given.get("echo"):
            overlay.set("prompt_logprobs", given["logprobs"], "logprobs")
    if given.get("best_of", given.get("n", 1)) != given.get("n", 1):
        raise invalid("best_of", f"expected n, which is {given.get('n', 1)}: every sample is returned")
    prompts = _prompts(given["prompt"])
    many = isinstance(given["prompt"], list) and not isinstance(given["prompt"][0], int)
    requests = []
    for prompt in prompts:
        request = pb.GenerateRequest()
        request.CopyFrom(overlay.request)
        if isinstance(prompt, str):
            request.prompt.text = prompt
        else:
            request.prompt.tokens.ids.extend(prompt)
        requests.append(request)
    where = "prompt[*]" if many and len(prompts) > 1 else "prompt"
    overlay.names |= {"prompt": where, "prompt.text": where, "prompt.tokens.ids": where}
    return overlay.asked(requests, logprobs=given.get("logprobs"), is_chat=False, echo=given.get("echo", False))


def chat(body: Mapping[str, Any]) -> Asked:
    """Raises ApiError, which names the field, for what is not accepted."""
    given = fields.CHAT.check(body, "")
    overlay = _Overlay(given)
    overlay.common()
    limit = "max_completion_tokens" if "max_completion_tokens" in given else "max_tokens"
    if limit in given:
        overlay.set("stop.max_tokens", given[limit], limit)
    wanted = given.get("logprobs", False)
    if not wanted and given.get("top_logprobs"):
        raise invalid("top_logprobs", "expected logprobs to be true with it")
    if wanted:
        overlay.set("logprobs", given.get("top_logprobs", 0), "top_logprobs")
    request = overlay.request
    for message in given["messages"]:
        request.prompt.chat.messages.add(role=role_of(message["role"]), content=text_of(message["content"]))
    continues = given.get("continue_final_message", False)
    if not given.get("add_generation_prompt", not continues) and not continues:
        raise invalid("add_generation_prompt", "expected true, or continue_final_message")
    request.prompt.chat.continue_final_message = continues
    overlay.names |= {
        "prompt": "messages",
        "prompt.chat": "messages",
        "prompt.chat.messages": "messages",
        "prompt.chat.continue_final_message": "continue_final_message",
    }
    if not overlay.has("stop.max_tokens") and limit not in given:
        request.stop.to_context_end = True
    return overlay.asked([request], logprobs=given.get("top_logprobs", 0) if wanted else None, is_chat=True)


def _prompts(prompt: Any) -> list[Any]:
    """Returns texts, or lists of token ids."""
    if isinstance(prompt, str) or isinstance(prompt[0], int):
        return [prompt]
    return list(prompt)


def role_of(role: str) -> str:
    """OpenAI calls system turns those of the developer, for some of its models."""
    return "system" if role == "developer" else role


def text_of(content: str | list[dict[str, str]]) -> str:
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


class _Overlay:
    """Puts fields of OpenAI's over a GenerateRequest that the extension field gives."""

    def __init__(self, given: Mapping[str, Any]) -> None:
        self._given = given
        self._extension = given.get("patchclamp")
        self.request = pb.GenerateRequest()
        self.names: dict[str, str] = {"model": "model"}
        if self._extension is not None:
            parse(self._extension, self.request, "patchclamp")
            for name in ("model", "prompt", "samples"):
                if self.has(name):
                    raise invalid(f"patchclamp.{name}", "expected outside of patchclamp, where OpenAI's API has it")

    def common(self) -> None:
        given = self._given
        self.request.model = given.get("model", "")
        for name, (path, _) in SAMPLING.items():
            if name in given:
                self.set(path, given[name], name)
        if "temperature" not in given and not self.has("sampling.temperature"):
            self.set("sampling.temperature", DEFAULT_TEMPERATURE, "temperature")
        if "stop" in given:
            strings = [given["stop"]] if isinstance(given["stop"], str) else given["stop"]
            self.set("stop.strings", strings, "stop")
            if isinstance(given["stop"], str):
                self.names["stop.strings[0]"] = "stop"

    def has(self, path: str) -> bool:
        """Whether the extension says something of a field, be it its default."""
        value: Any = self._extension
        for name in path.split("."):
            if not isinstance(value, dict):
                return False
            value = value.get(name, value.get(_camel(name)))
        return value is not None

    def set(self, path: str, value: Any, name: str) -> None:
        if self.has(path):
            raise invalid(below("patchclamp", path), f"is given as {name} too: expected once")
        *parents, last = path.split(".")
        message: Message = self.request
        for parent in parents:
            message = getattr(message, parent)
        if isinstance(value, list):
            getattr(message, last).extend(value)
        elif isinstance(value, dict):
            getattr(message, last).update(value)
        else:
            setattr(message, last, value)
        self.names[path] = name

    def asked(
        self,
        requests: list[pb.GenerateRequest],
        *,
        logprobs: int | None,
        is_chat: bool,
        echo: bool = False,
    ) -> Asked:
        given = self._given
        stream = given.get("stream", False)
        if "stream_options" in given and not stream:
            raise invalid("stream_options", "expected stream to be true with it")
        return Asked(
            requests=requests,
            samples=given.get("n", 1),
            stream=stream,
            include_usage=given.get("stream_options", {}).get("include_usage", False),
            extended=self._extension is not None,
            logprobs=logprobs,
            names=self.names,
            is_chat=is_chat,
            echo=echo,
        )


def parse(value: Any, message: Message, path: str) -> None:
    """Reads the JSON of a message. Raises ApiError with the path of what is wrong in it."""
    if not isinstance(value, dict):
        raise invalid(path, f"expected the JSON of {message.DESCRIPTOR.full_name}, an object")
    try:
        json_format.ParseDict(value, message)
    except json_format.ParseError as error:
        found = _PLACE.search(str(error))
        where = below(path, found["path"]) if found else path
        raise invalid(where, str(error)) from None


def _camel(name: str) -> str:
    head, *rest = name.split("_")
    return head + "".join(word.capitalize() for word in rest)

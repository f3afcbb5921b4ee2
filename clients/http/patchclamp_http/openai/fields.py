"""The fields of the requests of OpenAI's API, and what each is in a GenerateRequest.

Fields that have no effect on the answer are accepted and ignored. What would have one, and is not served, is refused:
a request never is answered as if it had asked for less.
"""

from collections.abc import Mapping

from patchclamp_http.openai.kinds import (
    Kind,
    anything,
    array,
    boolean,
    constant,
    either,
    integer,
    mapping,
    number,
    obj,
    string,
)

MAX_CHOICES = 128
LARGEST = 2**31 - 1
TOKEN_ID = integer(0, 2**32 - 1)
EXTENSION = anything({"$ref": "#/components/schemas/patchclamp.v1.GenerateRequest"})

# Of both, by their path in a GenerateRequest. Those from top_k on are no fields of OpenAI's own API, but others that
# speak it have them under these names.
SAMPLING: Mapping[str, tuple[str, Kind]] = {
    "temperature": ("sampling.temperature", number(0.0)),
    "top_p": ("sampling.top_p", number(0.0, 1.0, above=True)),
    "seed": ("sampling.seed", integer(0, 2**63 - 1)),
    "presence_penalty": ("sampling.presence_penalty", number(-2.0, 2.0)),
    "frequency_penalty": ("sampling.frequency_penalty", number(-2.0, 2.0)),
    "top_k": ("sampling.top_k", integer(0, LARGEST)),
    "min_p": ("sampling.min_p", number(0.0, 1.0)),
    "repetition_penalty": ("sampling.repetition_penalty", number(0.0, above=True)),
    "ignore_eos": ("stop.ignore_eos", boolean()),
    "stop_token_ids": ("stop.token_ids", array(TOKEN_ID)),
    "min_tokens": ("stop.min_tokens", integer(0, LARGEST)),
    "logit_bias": ("sampling.logit_bias", mapping("^[0-9]+$", number(-100.0, 100.0))),
    "include_stop_str_in_output": ("stop.include_stop_string", boolean()),
}
STOP = either(string(), array(string(), 0, 16), told="a string or an array of at most 16")
# They say nothing about the text.
IGNORED = (
    "user",
    "metadata",
    "store",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
    "parallel_tool_calls",
)
COMMON: Mapping[str, Kind] = {
    "model": string(),
    "stream": boolean(),
    "stream_options": obj({"include_usage": boolean(), "include_obfuscation": boolean()}),
    "n": integer(1, MAX_CHOICES),
    "stop": STOP,
    "max_tokens": integer(0, LARGEST),
    **{name: kind for name, (_, kind) in SAMPLING.items()},
    "patchclamp": EXTENSION,
    **{name: anything() for name in IGNORED},
}
PROMPT = either(
    string(),
    array(string(), 1, 2048),
    array(TOKEN_ID, 1),
    array(array(TOKEN_ID, 1), 1, 2048),
    told="a text, token ids, or an array of either",
)
COMPLETION = obj(
    {
        **COMMON,
        "prompt": PROMPT,
        "echo": boolean(),
        "logprobs": integer(0, 20),
        "best_of": integer(1, MAX_CHOICES),
        "suffix": constant("", "no text after the prompt is served"),
    },
    required=("prompt",),
)
TEXT_PART = obj({"type": string("text"), "text": string()}, required=("type", "text"))
MESSAGE = obj(
    {
        "role": string("system", "developer", "user", "assistant", "tool"),
        "content": either(string(), array(TEXT_PART), told="a string or an array of text parts"),
    },
    required=("role", "content"),
)
CHAT = obj(
    {
        **COMMON,
        "messages": array(MESSAGE, 1),
        "max_completion_tokens": integer(0, LARGEST),
        "logprobs": boolean(),
        "top_logprobs": integer(0, 20),
        "continue_final_message": boolean(),
        "add_generation_prompt": boolean(),
        "modalities": array(string("text")),
        "response_format": obj({"type": string("text")}, required=("type",)),
    },
    required=("messages",),
)

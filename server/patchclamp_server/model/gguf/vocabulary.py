"""The keys of a GGUF file's vocabulary are of the types and lengths that they must be, and ids are those of tokens.

transformers looks an id up in a list: -1, which some writers give for "none", would be the last token.
"""

import re
from typing import Any

from patchclamp_server.model.errors import ModelSourceError
from patchclamp_server.model.gguf.header import Header

SPECIAL_TOKEN = re.compile(r"tokenizer\.ggml\.(\w+)_token_id")
_TOKENS = "tokenizer.ggml.tokens"
_LISTS: dict[str, tuple[tuple[type, ...], str]] = {
    _TOKENS: ((str,), "strings"),
    "tokenizer.ggml.merges": ((str,), "strings"),
    "tokenizer.ggml.token_type": ((int,), "integers"),
    "tokenizer.ggml.scores": ((int, float), "numbers"),
}
_FOR_EACH_TOKEN = ("tokenizer.ggml.token_type", "tokenizer.ggml.scores")
_TEXTS = ("tokenizer.ggml.model", "tokenizer.ggml.pre", "tokenizer.chat_template")


def check_vocabulary(header: Header) -> None:
    """Raises ModelSourceError, with the key, for a value that cannot be."""
    values = header.values

    def refuse(key: str, why: str) -> ModelSourceError:
        return ModelSourceError(f"{header.path}: {key} {why}")

    if _TOKENS not in values:
        raise ModelSourceError(f"{header.path} lacks the key {_TOKENS}")
    for key, (kinds, noun) in _LISTS.items():
        value = values.get(key, [])
        # A list has one type: numpy and the header's reader give no others.
        if not isinstance(value, list) or (value and type(value[0]) not in kinds):
            raise refuse(key, f"is no list of {noun}")
    n: int = len(values[_TOKENS])
    for key in _FOR_EACH_TOKEN:
        if key in values and len(values[key]) != n:
            raise refuse(key, f"has {len(values[key])} values for {n} tokens")
    for key in _TEXTS:
        if not isinstance(values.get(key, ""), str):
            raise refuse(key, f"is {_shown(values[key])}, not a string")
    for key, value in values.items():
        if SPECIAL_TOKEN.fullmatch(key) and not (type(value) is int and 0 <= value < n):
            raise refuse(key, f"is {_shown(value)}, which is none of {n} tokens")


def _shown(value: Any) -> Any:
    return f"a list of {len(value)}" if isinstance(value, list) else repr(value)

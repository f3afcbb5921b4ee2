"""End tokens are the tokens that end a generation.

A model may have several: one that ends a text, one that ends a turn of a chat, those of fill-in-the-middle. No single
file names them all, so all files that name any are read.
"""

import logging
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from patchclamp_server.model.tokenizer import template_of

logger = logging.getLogger(__name__)

# The tokens of these keys of a GGUF file, below "tokenizer.ggml.", end a generation in llama.cpp. The last three stand
# behind what fills a gap: padding, the next file, the next repository.
GGUF_KEYS = ("eos", "eot", "eom", "fim_pad", "fim_sep", "fim_rep")
# Control tokens with these texts end a generation in llama.cpp, since many files name only one of their end tokens.
GGUF_TEXTS = frozenset(
    {
        "<|endoftext|>",
        "<|end_of_text|>",
        "<|im_end|>",
        "<|end|>",
        "<|eot_id|>",
        "<|eom_id|>",
        "<end_of_turn>",
        "<end_of_utterance>",
        "<EOT>",
        "_<EOT>",
        "<\uff5cend\u2581of\u2581sentence\uff5c>",
        "<|fim_pad|>",
        "<fim-pad>",
        "<fim_pad>",
        "<|file_sep|>",
        "<|repo_name|>",
        "<|fim_repo|>",
    }
)
CONTROL = 3
_CONTENT = "\ue000"


def end_token_ids(
    config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, others: Iterable[int] = ()
) -> frozenset[int]:
    """Returns every end that the configuration, the tokenizer or the model's other files name, and the one with which
    the chat template ends a turn of the assistant."""
    text = config.get_text_config()
    named = (
        *others,
        getattr(config, "eos_token_id", None),
        getattr(text, "eos_token_id", None),
        tokenizer.eos_token_id,
        turn_end(tokenizer),
    )
    return frozenset(id for value in named for id in _ids(value) if 0 <= id < text.vocab_size)


def turn_end(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Returns the added token that the chat template writes right behind what the assistant says, if it does."""
    if template_of(tokenizer) is None:
        return None
    chat = [{"role": "user", "content": "-"}, {"role": "assistant", "content": _CONTENT}]
    try:
        text = tokenizer.apply_chat_template(chat, tokenize=False)
    # A template is a program of the model's author, which may raise anything.
    except Exception as error:
        logger.warning("the chat template does not say how it ends a turn: %s: %s", type(error).__name__, error)
        return None
    end = str(text).rpartition(_CONTENT)[2].lstrip()
    added = {token.content: id for id, token in tokenizer.added_tokens_decoder.items()}
    # The longest one is taken, because one may begin with another.
    found = max((content for content in added if content and end.startswith(content)), key=len, default="")
    return added.get(found)


def gguf_end_token_ids(values: Mapping[str, Any]) -> frozenset[int]:
    """Returns every end that a GGUF file names by a key, and every token whose text makes it one."""
    by_key = (values.get(f"tokenizer.ggml.{key}_token_id") for key in GGUF_KEYS)
    return frozenset({*(int(id) for id in by_key if id is not None), *_by_text(values)})


def _by_text(values: Mapping[str, Any]) -> Iterator[int]:
    tokens, types = (values.get(f"tokenizer.ggml.{name}") for name in ("tokens", "token_type"))
    if tokens is None or types is None:
        return
    for id, (text, type) in enumerate(zip(tokens, types, strict=True)):
        if type == CONTROL and text in GGUF_TEXTS:
            yield id


def _ids(named: Any) -> list[int]:
    if named is None:
        return []
    return [named] if isinstance(named, int) else list(named)

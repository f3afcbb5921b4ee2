"""Log-probabilities of tokens in the two forms of OpenAI's API."""

from collections.abc import Iterable
from typing import Any

from patchclamp.v1 import generation_pb2 as pb

# OpenAI's stand-in for minus infinity, which JSON has not.
LEAST = -9999.0
_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


class CompletionLogprobs:
    """Gathers tokens as completions have them; offsets count characters from `offset` on."""

    def __init__(self, offset: int = 0) -> None:
        self._offset = offset

    def of(self, tokens: Iterable[pb.GeneratedToken]) -> dict[str, Any]:
        """Returns the next tokens. A first token of a prompt has no log-probability."""
        texts: list[str] = []
        chosen: list[float | None] = []
        top: list[dict[str, float] | None] = []
        offsets: list[int] = []
        for token in tokens:
            texts.append(token.text)
            offsets.append(self._offset)
            self._offset += len(token.text)
            if not token.HasField("logprob"):
                chosen.append(None)
                top.append(None)
                continue
            chosen.append(max(token.logprob, LEAST))
            likeliest: dict[str, float] = {}
            for other in token.top_logprobs:
                # Tokens of parts of characters may look alike: the most likely stands for them.
                likeliest.setdefault(other.text, max(other.logprob, LEAST))
            likeliest.setdefault(token.text, max(token.logprob, LEAST))
            top.append(likeliest)
        return {"tokens": texts, "token_logprobs": chosen, "top_logprobs": top, "text_offset": offsets}


def chat_logprobs(tokens: Iterable[pb.GeneratedToken]) -> dict[str, Any]:
    """Returns tokens as chats have them."""
    return {
        "content": [
            {
                **_entry(token.text, token.logprob),
                "top_logprobs": [_entry(other.text, other.logprob) for other in token.top_logprobs],
            }
            for token in tokens
        ],
        "refusal": None,
    }


def _entry(text: str, logprob: float) -> dict[str, Any]:
    # Of a token that is part of a character the bytes are not known here.
    encoded = None if _INCOMPLETE in text else list(text.encode())
    return {"token": text, "logprob": max(logprob, LEAST), "bytes": encoded}

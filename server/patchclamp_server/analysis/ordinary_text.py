"""Cuts ordinary text into windows of tokens, on which perplexity and mean activations are measured."""

from collections.abc import Sequence
from functools import cache
from importlib.resources import files

from patchclamp_server.errors import InvalidArgument
from patchclamp_server.text.prompt import PromptEncoder

WINDOW = 512
# So many windows of the built-in text are used, though it has more.
BUILT_IN_WINDOWS = 4
MAX_WINDOWS = 256


@cache
def ordinary_text() -> str:
    """Returns public-domain prose, no haystack of the needle tests; data/README.md says what and from where."""
    return files("patchclamp_server.analysis").joinpath("data", "ordinary.txt").read_text(encoding="utf-8")


def windows(texts: Sequence[str], prompts: PromptEncoder, context_length: int) -> list[tuple[int, ...]]:
    """Returns the texts, or without any the built-in one, in windows of at most WINDOW tokens and at least 2. Each
    begins with what the tokenizer begins a text with.

    Raises InvalidArgument for texts that are too short or too long.
    """
    opening = prompts.text_start
    size = min(WINDOW, context_length) - len(opening)
    found: list[tuple[int, ...]] = []
    for i, text in enumerate(texts or (ordinary_text(),)):
        ids = prompts.encode_body(text, f"texts[{i}]", most_tokens=MAX_WINDOWS * WINDOW)
        own = [ids[start : start + size] for start in range(0, len(ids), size)]
        own = [opening + window for window in own if len(opening) + len(window) >= 2]
        if not own:
            raise InvalidArgument(f"texts[{i}]", "is too short: at least two tokens are needed to score one")
        found += own
    if not texts:
        return found[:BUILT_IN_WINDOWS]
    if len(found) > MAX_WINDOWS:
        raise InvalidArgument("texts", f"{len(found)} windows of {size} tokens; at most {MAX_WINDOWS} are scored")
    return found

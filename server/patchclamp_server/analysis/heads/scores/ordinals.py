"""Turns ordered sequences of words into tokens, in every spelling that the tokenizer has whole tokens for."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from patchclamp_server.errors import FailedPrecondition
from patchclamp_server.text.prompt import PromptEncoder

DATA = Path(__file__).parents[1] / "data" / "ordinals.json"
# Being first among fewer members says little.
FEWEST_MEMBERS = 5


@dataclass(frozen=True)
class Ordinal:
    """Words in order. `cyclic` says that the first follows the last; `cased`, that they are also written in lower case
    and with a capital."""

    name: str
    words: tuple[str, ...]
    cyclic: bool
    cased: bool


@dataclass(frozen=True)
class TokenSequence:
    """`pairs` are tokens and their successors; `members` are all tokens of the sequence, which compete to be first."""

    name: str
    pairs: tuple[tuple[int, int], ...]
    members: tuple[int, ...]


@cache
def ordinals() -> tuple[Ordinal, ...]:
    entries = json.loads(DATA.read_text(encoding="utf-8"))
    return tuple(Ordinal(e["name"], tuple(e["words"]), e["cyclic"], e["cased"]) for e in entries)


def token_sequences(prompts: PromptEncoder) -> list[TokenSequence]:
    """Returns the sequences; words of several tokens are left out, with the pairs they are in.

    Raises FailedPrecondition when the tokenizer has whole tokens for no sequence.
    """
    found: dict[tuple[tuple[int, int], ...], TokenSequence] = {}
    for ordinal in ordinals():
        for name, words in _spellings(ordinal):
            tokens = [prompts.token_of(word) for word in words]
            following = tokens[1:] + tokens[:1] if ordinal.cyclic else tokens[1:]
            pairs = tuple((a, b) for a, b in zip(tokens, following, strict=False) if a is not None and b is not None)
            members = tuple(dict.fromkeys(token for token in tokens if token is not None))
            # Some tokenizers spell a word alike with a space and without.
            if pairs and len(members) >= FEWEST_MEMBERS:
                found.setdefault(pairs, TokenSequence(name, pairs, members))
    if not found:
        names = ", ".join(ordinal.name for ordinal in ordinals())
        raise FailedPrecondition("method", f"the tokenizer has no whole tokens for words of a sequence: {names}")
    return list(found.values())


def _spellings(ordinal: Ordinal) -> Iterator[tuple[str, list[str]]]:
    words = list(ordinal.words)
    cases = [("lower case", [w.lower() for w in words]), ("capital", [w.capitalize() for w in words])]
    for case, spelled in cases if ordinal.cased else [("", words)]:
        name = f"{ordinal.name}, {case}" if case else ordinal.name
        yield name, spelled
        yield f"{name}, after a space", [f" {word}" for word in spelled]

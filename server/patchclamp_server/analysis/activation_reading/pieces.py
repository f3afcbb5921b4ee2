"""What is run: texts, each whole or by windows, with the tokens that are read of them.

The scope is that of the whole text: its positions, and how far a token is from its end, do not depend on where it is
cut. Special tokens in front of a later window are run and not read: the text has them at its start alone.
"""

from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass

import numpy as np

from patchclamp_server.analysis.corpora.windows import body_tokens, ids_of
from patchclamp_server.analysis.neurons.texts import TextSource
from patchclamp_server.artifacts.corpora import UNLABELLED
from patchclamp_server.interventions.program import Scope
from patchclamp_server.interventions.scopes import SequenceTokens, scope_mask
from patchclamp_server.model.arrays import BoolArray, IntArray
from patchclamp_server.text.prompt import EncodedPrompt, PromptEncoder

Choose = Callable[[BoolArray], BoolArray]


@dataclass(frozen=True, eq=False)
class Piece:
    """A text, or a window of it, of which `chosen` [T] tokens are read. Token i of a later window stands at
    `start` + i of its text, which has `length` tokens."""

    text: int
    label: int
    tokens: tuple[int, ...]
    roles: tuple[str, ...] | None
    start: int
    length: int
    chosen: BoolArray

    @property
    def positions(self) -> IntArray:
        """int64 [n], of the tokens that are read."""
        found: IntArray = np.flatnonzero(self.chosen) + self.start
        return found

    @property
    def token_ids(self) -> IntArray:
        """int64 [n], of the tokens that are read."""
        found: IntArray = np.array(self.tokens, dtype=np.int64)[self.chosen]
        return found


async def pieces_of_prompts(
    prompts: Sequence[EncodedPrompt], scope: Scope, choose: Choose
) -> AsyncGenerator[Piece, None]:
    """Those of which a token is read: each prompt as it is."""
    for index, prompt in enumerate(prompts):
        chosen = choose(_in_scope(scope, prompt.ids, prompt.roles))
        if chosen.any():
            yield Piece(index, UNLABELLED, prompt.ids, prompt.roles, 0, len(prompt.ids), chosen)


async def pieces_of_texts(
    source: TextSource, encoder: PromptEncoder, scope: Scope, choose: Choose
) -> AsyncGenerator[Piece, None]:
    """Those of which a token is read, window by window. One text at a time is tokenised. Raises what windows() does."""
    body, special = body_tokens(encoder, source.window_tokens), len(encoder.text_start)
    run = 0
    for index in range(len(source.corpus)):
        document = source.corpus.document(index)
        ids = await ids_of(document, encoder, index)
        whole = (*encoder.text_start, *ids)
        chosen = choose(_in_scope(scope, whole, None))
        for start in range(0, len(ids), body):
            tokens = (*encoder.text_start, *ids[start : start + body])
            own = chosen[start : start + len(tokens)].copy()
            if start:
                own[:special] = False
            run += len(tokens)
            if own.any():
                yield Piece(index, document.label, tokens, None, start, len(whole), own)
            if 0 < source.max_tokens <= run:
                return


def _in_scope(scope: Scope, ids: tuple[int, ...], roles: tuple[str, ...] | None) -> BoolArray:
    positions = np.arange(len(ids), dtype=np.int64)
    return scope_mask(scope, SequenceTokens(len(ids), roles), positions, np.array(ids, dtype=np.int64))


def every(chosen: BoolArray) -> BoolArray:
    return chosen


def first(chosen: BoolArray) -> BoolArray:
    return _only(chosen, np.flatnonzero(chosen)[:1])


def last(chosen: BoolArray) -> BoolArray:
    return _only(chosen, np.flatnonzero(chosen)[-1:])


def _only(chosen: BoolArray, at: IntArray) -> BoolArray:
    one = np.zeros_like(chosen)
    one[at] = True
    return one

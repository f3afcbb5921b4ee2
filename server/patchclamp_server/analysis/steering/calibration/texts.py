"""Texts that a model writes under an edit or an instruction, read again by the model without either.

Of each text, at its n tokens after the prompt:

    NLL          -log p(token)                       of the unsteered model
    divergence   KL(as it was written ‖ unsteered)   of the predictions along the text, nats
    readings     of a projection or a probe          in the unsteered model, where they are asked for

A text that was written after an instruction is read after the prompt alone. Writing and reading are ordinary requests;
the predictions of a text are kept on the device until it has been read, of a few texts at a time.
"""

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

from torch import Tensor

from patchclamp_server.analysis.requests import Make, OnEvent, completed, score_request
from patchclamp_server.engine.engine import Engine
from patchclamp_server.engine.reducers.divergence import Divergence, Reference, ScoreReducer
from patchclamp_server.engine.request import Priority, Readouts, Request, StopParams, Text, Token
from patchclamp_server.interventions.bound import BoundProgram

Ids: TypeAlias = tuple[int, ...]
# Of predictions that are kept at a time, or those of one text.
KEPT_BYTES = 256 << 20


@dataclass(frozen=True, eq=False)
class Writing:
    """`prompt` is continued under `program`; `plain` is the prompt without an instruction."""

    prompt: Ids
    plain: Ids
    program: BoundProgram | None = None

    @property
    def is_unsteered(self) -> bool:
        return self.program is None and self.prompt == self.plain

    @property
    def requests(self) -> int:
        return 2 if self.is_unsteered else 3


@dataclass(frozen=True)
class Written:
    """`nll` and `divergence` are sums over the tokens of the text, of which there is one at least."""

    ids: Ids
    text: str
    nll: float
    divergence: float
    readings: tuple[float, ...]


class _Later:
    """Scores of a text that begins `by` tokens later in one request than in another."""

    def __init__(self, scores: ScoreReducer, by: int) -> None:
        self._scores, self._by = scores, by

    def add(self, position: int, logprobs: Tensor) -> None:
        self._scores.add(position - self._by, logprobs)


async def written(
    engine: Engine, writings: Sequence[Writing], max_tokens: int, reader: BoundProgram | None
) -> AsyncGenerator[int | list[Written], None]:
    """Yields 1 for each request that has ended, then the texts. `reader` has one readout of one number."""
    texts: list[tuple[Ids, str]] = []
    async with aclosing(completed(engine, [partial(_write, each, max_tokens) for each in writings])) as finished:
        async for events in finished:
            ids = tuple(event.id for event in events if isinstance(event, Token))
            texts.append((ids, "".join(event.text for event in events if isinstance(event, Text))))
            yield 1
    few = max(1, KEPT_BYTES // (4 * engine.model.info.vocab_size * max_tokens))
    found: list[Written] = []
    for start in range(0, len(writings), few):
        chunk = texts[start : start + few]
        async with aclosing(_read(engine, writings[start : start + few], chunk, reader)) as reading:
            async for read in reading:
                if isinstance(read, int):
                    yield read
                else:
                    found += read
    yield found


async def _read(
    engine: Engine, writings: Sequence[Writing], texts: Sequence[tuple[Ids, str]], reader: BoundProgram | None
) -> AsyncGenerator[int | list[Written], None]:
    """Yields 1 for each request that has ended, then the texts. Those that were steered are first scored as they were
    written, which is what the unsteered model is compared with."""
    makes: list[Make] = []
    compared: list[Divergence | None] = []
    for writing, (ids, _) in zip(writings, texts, strict=True):
        if writing.is_unsteered:
            compared.append(None)
            continue
        kept = Reference(len(writing.plain))
        later = _Later(kept, len(writing.prompt) - len(writing.plain))
        makes.append(partial(score_request, writing.prompt, ids, writing.program, scores=later))
        compared.append(Divergence(kept))
    async with aclosing(completed(engine, makes)) as finished:
        async for _done in finished:
            yield 1
    makes = [
        partial(score_request, writing.plain, ids, reader, scores=scores)
        for writing, (ids, _), scores in zip(writings, texts, compared, strict=True)
    ]
    found: list[Written] = []
    async with aclosing(completed(engine, makes)) as finished:
        async for events in finished:
            ids, text = texts[len(found)]
            scores = compared[len(found)]
            nll = -sum(event.logprob or 0.0 for event in events if isinstance(event, Token))
            divergence = 0.0 if scores is None else scores.means()[0] * len(ids)
            readings = [v.values[0] for event in events if isinstance(event, Readouts) for v in event.values]
            found.append(Written(ids, text, nll, divergence, tuple(readings)))
            yield 1
    yield found


def _write(writing: Writing, max_tokens: int, on_event: OnEvent) -> Request:
    stop = StopParams(max_tokens=max_tokens)
    return Request(writing.prompt, on_event, writing.program, stop=stop, priority=Priority.ANALYSIS)

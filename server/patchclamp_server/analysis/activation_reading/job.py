"""Texts run as low-priority requests whose activations are read: streamed row by row, reduced, or stored.

    pieces.py   what is run and which tokens are read     reductions.py   what becomes of their rows
    rows.py     rows, in parts that fit a message         stored.py       rows as an artifact

Nothing grows with the number of texts: at most MAX_HELD_BYTES of rows are with the engine or wait for their turn, and
no text begins while nobody takes what has come.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Iterator, Mapping
from contextlib import aclosing, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor

from patchclamp_server.analysis.activation_reading.pieces import Piece, pieces_of_prompts, pieces_of_texts
from patchclamp_server.analysis.activation_reading.reductions import (
    Reduce,
    TextSoFar,
    reducer_of_piece,
    rows_of_piece,
)
from patchclamp_server.analysis.activation_reading.rows import Rows, RowsOfPlace, by_place, joined
from patchclamp_server.analysis.activation_reading.stored import StoredRows
from patchclamp_server.analysis.neurons.texts import TextSource
from patchclamp_server.analysis.progress import Progress
from patchclamp_server.analysis.requests import Make, OnEvent, completed
from patchclamp_server.artifacts.store import ArtifactStore
from patchclamp_server.artifacts.types import NO_TAGS, ArtifactInfo, Tags
from patchclamp_server.engine.engine import Engine
from patchclamp_server.engine.reducers.chosen_tokens import ChosenTokens
from patchclamp_server.engine.reducers.covariance import Covariance
from patchclamp_server.engine.reducers.gathered import AT_ONCE
from patchclamp_server.engine.reducers.kept_rows import KeptRows
from patchclamp_server.engine.reducers.per_label import PerLabel
from patchclamp_server.engine.reducers.reducer import Reducer
from patchclamp_server.engine.reducers.sums import Sums
from patchclamp_server.engine.request import Priority, Reduction, Request, StopParams
from patchclamp_server.errors import InvalidArgument
from patchclamp_server.interventions.bound import BoundProgram
from patchclamp_server.interventions.program import Scope
from patchclamp_server.model.info import ModelInfo
from patchclamp_server.model.sites import Site
from patchclamp_server.text.prompt import EncodedPrompt, PromptEncoder

STAGE = "texts"
# Of a message, besides the labels of its rows.
MAX_MESSAGE_BYTES = 1 << 20
# Rows of short texts wait for each other until they are so many.
BATCH_BYTES = 4 << 20
MAX_HELD_BYTES = 128 << 20
# One text alone may have so many: they have to be in memory together.
MAX_TEXT_BYTES = 1 << 30
SECONDS_PER_PROGRESS = 0.25


@dataclass(frozen=True, eq=False)
class ActivationReading:
    """`source`: prompts, or texts in windows. Rows are read of `layers` of each of `sites` under `program`, for tokens
    in `scope`, and have the `dtype`. `about`: JSON that the provenance of an artifact says besides."""

    source: tuple[EncodedPrompt, ...] | TextSource
    program: BoundProgram
    sites: tuple[Site, ...]
    layers: tuple[int, ...]
    scope: Scope = field(default_factory=Scope)
    reduce: Reduce = Reduce.NONE
    dtype: torch.dtype = torch.float32
    store: bool = False
    description: str = ""
    tags: Tags = NO_TAGS
    about: Mapping[str, Any] = field(default_factory=dict)

    @property
    def labels(self) -> tuple[str, ...]:
        return self.source.corpus.labels if isinstance(self.source, TextSource) else ()

    @property
    def n_texts(self) -> int:
        return len(self.source.corpus if isinstance(self.source, TextSource) else self.source)


@dataclass(frozen=True, eq=False)
class Moments:
    """Of one site and layer over `tokens` tokens: `mean` [width], and rows of the covariance [n, width] from
    `first_row` on, float32."""

    site: Site
    layer: int
    tokens: int
    mean: Tensor
    first_row: int
    covariance: Tensor


@dataclass(frozen=True, eq=False)
class LabelMean:
    """Of the texts of one label: `mean` [width] float32 over `tokens` tokens."""

    site: Site
    layer: int
    label: str
    tokens: int
    mean: Tensor


@dataclass(frozen=True)
class ReadingResult:
    """`texts`: of which a token was read; `tokens`: that were run; `rows`: that were sent or stored."""

    artifact: ArtifactInfo | None
    texts: int
    tokens: int
    rows: int
    labels: tuple[str, ...]


Event: TypeAlias = Progress | RowsOfPlace | Moments | LabelMean | ReadingResult


@dataclass(frozen=True, eq=False)
class _Asked:
    """A piece that becomes a request, whose reducers hold `weight` bytes of it at most."""

    piece: Piece
    program: BoundProgram
    reducers: dict[Site, Reducer]
    weight: int

    def __call__(self, on_event: OnEvent) -> Request:
        piece = self.piece
        return Request(
            piece.tokens,
            on_event,
            self.program,
            stop=StopParams(max_tokens=0),
            priority=Priority.ANALYSIS,
            roles=piece.roles,
            reductions=tuple(
                Reduction(site, ChosenTokens(piece.chosen, reducer), piece.text, piece.label)
                for site, reducer in self.reducers.items()
            ),
        )


async def read_activations(
    engine: Engine, store: ArtifactStore, info: ModelInfo, encoder: PromptEncoder, job: ActivationReading
) -> AsyncGenerator[Event, None]:
    """Yields progress and what is read, in the order of the texts; the result at the end. Ending the iteration early
    ends the work.

    Raises InvalidArgument on "scope" that selects no token of any text, on "dtype" that a value is beyond, on "store"
    for more rows than an artifact holds, and what the texts and requests raise.
    """
    work = _Work(engine, info, encoder, job)
    with StoredRows(job.dtype, labelled=bool(job.labels)) if job.store else nullcontext() as stored:
        async with aclosing(work.events()) as events:
            async for event in events:
                if not isinstance(event, Rows):
                    yield event
                elif stored is not None:
                    await asyncio.to_thread(stored.add, event)
                else:
                    for part in by_place(event, MAX_MESSAGE_BYTES):
                        yield part
        if not work.texts:
            raise InvalidArgument("scope", "selects no token of any text")
        for summary in work.summaries():
            yield summary
        artifact = None
        if stored is not None:
            put = partial(
                stored.put,
                store,
                info.fingerprint,
                provenance=_provenance(job),
                evidence={"texts": work.texts, "tokens": work.tokens, "rows": work.rows},
                description=job.description,
                tags=job.tags,
            )
            artifact = await asyncio.to_thread(put)
    yield ReadingResult(artifact, work.texts, work.tokens, work.rows, job.labels)


class _Work:
    """The pass over the texts, and what it has counted."""

    def __init__(self, engine: Engine, info: ModelInfo, encoder: PromptEncoder, job: ActivationReading) -> None:
        self._engine, self._info, self._encoder, self._job = engine, info, encoder, job
        self.texts = self.tokens = self.rows = 0
        self._shared = {site: self._of_all(site) for site in job.sites} if job.reduce.of_all_texts else {}
        self._waiting: list[_Asked] = []

    def _of_all(self, site: Site) -> Reducer:
        layers = self._job.layers
        if self._job.reduce is Reduce.MOMENTS:
            return Covariance(layers)
        return PerLabel(layers, len(self._job.labels), partial(Sums, layers))

    async def events(self) -> AsyncGenerator[Progress | Rows, None]:
        """Yields rows of a few texts at a time, and now and then how many texts are done."""
        job, told = self._job, 0.0
        ready: list[Rows] = []
        so_far: TextSoFar | None = None
        last = -1
        yield Progress(STAGE, 0, job.n_texts)
        asked = completed(
            self._engine,
            self._requests(),
            patient=True,
            weight=lambda make: make.weight if isinstance(make, _Asked) else 0,
            most_weight=MAX_HELD_BYTES,
        )
        async with aclosing(asked) as finished:
            async for _ in finished:
                piece, reducers = (done := self._waiting.pop(0)).piece, done.reducers
                if so_far is not None and so_far.piece.text != piece.text:
                    ready.append(so_far.row(job.dtype))
                    so_far = None
                self.texts += piece.text != last
                self.tokens += len(piece.tokens)
                last = piece.text
                if job.reduce in (Reduce.MEAN, Reduce.SUM, Reduce.MAX):
                    so_far = so_far or TextSoFar(job.reduce, piece)
                    so_far.add(piece, reducers)
                elif not job.reduce.of_all_texts:
                    kept = {site: reducer for site, reducer in reducers.items() if isinstance(reducer, KeptRows)}
                    ready.append(await asyncio.to_thread(rows_of_piece, piece, kept, job.dtype))
                if sum(rows.bytes for rows in ready) >= BATCH_BYTES:
                    yield self._batch(ready)
                if (now := time.monotonic()) - told >= SECONDS_PER_PROGRESS:
                    told = now
                    yield Progress(STAGE, piece.text, job.n_texts)
        if so_far is not None:
            ready.append(so_far.row(job.dtype))
        if ready:
            yield self._batch(ready)
        yield Progress(STAGE, job.n_texts, job.n_texts)

    def _batch(self, ready: list[Rows]) -> Rows:
        rows = joined(ready)
        ready.clear()
        self.rows += len(rows)
        return rows

    async def _requests(self) -> AsyncGenerator[Make, None]:
        job = self._job
        if isinstance(job.source, TextSource):
            pieces = pieces_of_texts(job.source, self._encoder, job.scope, job.reduce.choose)
        else:
            pieces = pieces_of_prompts(job.source, job.scope, job.reduce.choose)
        async with aclosing(pieces):
            async for piece in pieces:
                asked = _Asked(piece, job.program, self._reducers(), self._weight(piece))
                self._waiting.append(asked)
                yield asked

    def _reducers(self) -> dict[Site, Reducer]:
        return self._shared or {site: reducer_of_piece(self._job.reduce, self._job.layers) for site in self._job.sites}

    def _weight(self, piece: Piece) -> int:
        """Bytes that are held of a piece: rows that are kept, and those that wait for their reducer."""
        job = self._job
        token_bytes = 4 * len(job.layers) * sum(self._info.sites[site] for site in job.sites)
        is_kept = job.reduce in (Reduce.NONE, Reduce.FIRST, Reduce.LAST)
        # One row of sums has float64; of maxima, float32 and a position.
        kept = int(piece.chosen.sum()) if is_kept else 3 * (not job.reduce.of_all_texts)
        if kept * token_bytes > MAX_TEXT_BYTES:
            message = f"{kept} tokens of text {piece.text} have {kept * token_bytes} bytes of activations at the layers"
            raise InvalidArgument("layers", f"{message}; at most {MAX_TEXT_BYTES} are kept of one text: choose fewer")
        return (kept + min(len(piece.tokens), AT_ONCE)) * token_bytes

    def summaries(self) -> Iterator[Moments | LabelMean]:
        """Yields what reductions over all texts found."""
        for site, reducer in self._shared.items():
            for layer in self._job.layers:
                if isinstance(reducer, Covariance):
                    yield from _moments(site, layer, reducer)
                elif isinstance(reducer, PerLabel):
                    yield from _means(site, layer, reducer, self._job.labels)


def _moments(site: Site, layer: int, reducer: Covariance) -> Iterator[Moments]:
    mean, covariance = reducer.mean(layer).float().cpu(), reducer.covariance(layer).float().cpu()
    rows = max(1, MAX_MESSAGE_BYTES // (4 * len(mean)))
    for start in range(0, len(mean), rows):
        yield Moments(site, layer, reducer.count(layer), mean, start, covariance[start : start + rows])


def _means(site: Site, layer: int, reducer: PerLabel[Sums], labels: tuple[str, ...]) -> Iterator[LabelMean]:
    """Labels of which no token was read have none."""
    for label, sums in zip(labels, reducer.of, strict=True):
        if sums.counts[layer]:
            yield LabelMean(site, layer, label, sums.counts[layer], sums.mean(layer).float().cpu())


def _provenance(job: ActivationReading) -> dict[str, Any]:
    """Only what is the same for equal rows takes part in the id of an artifact."""
    source = job.source
    about: dict[str, Any] = {
        "method": "read_activations",
        "reduction": job.reduce.value,
        "program": job.program.fingerprint,
        **job.about,
    }
    if isinstance(source, TextSource):
        about["corpus"], about["window_tokens"] = source.corpus.digest, source.window_tokens
    return about | ({"labels": list(job.labels)} if job.labels else {})

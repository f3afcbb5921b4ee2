"""Windows of a corpus through the engine: low-priority requests whose rows reducers take, a few at a time.

In memory are what the reducers keep, the windows in flight, and the token ids of one document.

Results do not depend on when a job was interrupted. Counts are equal, bit for bit, where the activations of a token are
(a `batch_invariant` model; else which tokens share a step moves last bits, interrupted or not). Sums of float64 are
equal but for the order in which they were added: a relative error of about 1e-16 times the number of rows at most.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from patchclamp_server.analysis.corpora.checkpoint import (
    DEFAULT_POLICY,
    CheckpointPolicy,
    JobCheckpoint,
    Reached,
    key_of,
)
from patchclamp_server.analysis.corpora.windows import (
    DEFAULT_WINDOW_TOKENS,
    Corpus,
    Cut,
    Window,
    body_tokens,
    windows,
)
from patchclamp_server.analysis.requests import MAX_IN_FLIGHT, Make, OnEvent, completed
from patchclamp_server.artifacts.checkpoints import Checkpoints
from patchclamp_server.engine.engine import Engine
from patchclamp_server.engine.reducers import loops
from patchclamp_server.engine.request import Priority, Reduction, Request, StopParams
from patchclamp_server.errors import renaming_fields
from patchclamp_server.text.prompt import PromptEncoder

# Enough to fill the steps while one window ends and the next is made.
STEPS_IN_FLIGHT = 4


@dataclass(frozen=True, eq=False)
class CorpusJob:
    """What is to be computed: all `reductions` in one pass over each window. Their own `text` and `label` are not used:
    a window gives its number (windows.py) and its label.

    `most_tokens`: the job ends with the first window that reaches it; 0: with the corpus. `parameters`: JSON of
    whatever else the method depends on.
    """

    corpus: Corpus
    reductions: tuple[Reduction, ...]
    window_tokens: int = DEFAULT_WINDOW_TOKENS
    most_tokens: int = 0
    parameters: Mapping[str, Any] = field(default_factory=dict)

    def checkpoint(
        self, checkpoints: Checkpoints, engine: Engine, policy: CheckpointPolicy = DEFAULT_POLICY
    ) -> JobCheckpoint:
        """Where this job over the model of this engine is written down. The reducers must be `Resumable`."""
        parts = (
            engine.model.info.fingerprint,
            self.corpus.digest,
            self.window_tokens,
            self.most_tokens,
            dict(self.parameters),
        )
        return JobCheckpoint(checkpoints, key_of(parts, self.reductions), policy)


@dataclass(frozen=True)
class CorpusProgress:
    """`tokens` of `windows` are in the reducers, special tokens too; `documents` of `total_documents` are done.

    `resumed_tokens`: came from a checkpoint; `kept_tokens`: a restart now would keep. `refused` says why a checkpoint
    that was there is not used, "" where none was refused.
    """

    tokens: int
    windows: int
    documents: int
    total_documents: int
    resumed_tokens: int = 0
    kept_tokens: int = 0
    refused: str = ""


async def run_corpus(
    engine: Engine, encoder: PromptEncoder, job: CorpusJob, checkpoint: JobCheckpoint | None = None
) -> AsyncGenerator[CorpusProgress, None]:
    """Yields progress at the start, after each window and after each checkpoint; then the reducers of the job have the
    windows of the whole corpus, or of its first `most_tokens`.

    With `checkpoint` the reducers go on from where it was left, and are written there when its policy says so and at
    the end. It stays until `checkpoint.remove()`, so that nothing is lost if the result cannot be stored. When the
    iteration ends early, by `aclose`, by cancellation of the task or by an error, no window is left with the engine.

    Raises InvalidArgument on "window_tokens" that has no room or is more than the engine takes, and on "documents[i]"
    with tokens that the model lacks; what a window failed with; ResourceExhausted where a checkpoint has no room. Where
    serving traffic leaves no room for a window, it waits.
    """
    body = body_tokens(encoder, job.window_tokens)
    if engine.model.decoder.device.type == "cpu":
        # Not on the engine's thread, where everybody would wait for it.
        await asyncio.to_thread(loops.warm_up)
    reached, refused = Reached(), ""
    if checkpoint is not None:
        reached, refused = await asyncio.to_thread(checkpoint.load, job.reductions)
    resumed = kept = reached.tokens

    def progress() -> CorpusProgress:
        documents, total = reached.cut.document, len(job.corpus)
        return CorpusProgress(reached.tokens, reached.windows, documents, total, resumed, kept, refused)

    yield progress()
    in_flight = max(2, min(MAX_IN_FLIGHT, STEPS_IN_FLIGHT * engine.config.max_tokens_per_step // job.window_tokens))
    async with aclosing(windows(job.corpus, encoder, job.window_tokens, reached.cut)) as source:
        given = _Given(source, job, checkpoint)
        while not given.all:
            # Ends when a checkpoint is due and nothing is in flight any more.
            asked = completed(engine, given.requests(reached.tokens), max_in_flight=in_flight, patient=True)
            # A client has sent no prompt: that a window cannot run is a matter of its length.
            with renaming_fields({"prompt": "window_tokens"}):
                async with aclosing(asked) as finished:
                    async for _ in finished:
                        window = given.windows.pop(0)
                        cut, tokens = Cut.behind(window, body), reached.tokens + len(window.tokens)
                        reached = Reached(cut, reached.windows + 1, tokens)
                        yield progress()
            if checkpoint is not None and reached.tokens > kept:
                await asyncio.to_thread(checkpoint.save, job.reductions, reached)
                kept = reached.tokens
                yield progress()


class _Given:
    """Gives out the windows, up to the next checkpoint each time it is asked."""

    def __init__(self, source: AsyncIterator[Window], job: CorpusJob, checkpoint: JobCheckpoint | None) -> None:
        self._source, self._job, self._checkpoint = source, job, checkpoint
        self.all = False
        # Those in flight, in order.
        self.windows: list[Window] = []

    async def requests(self, tokens: int) -> AsyncIterator[Make]:
        """`tokens`: that are done."""
        while self._checkpoint is None or not self._checkpoint.is_due(tokens):
            enough = 0 < self._job.most_tokens <= tokens
            window = None if enough else await anext(self._source, None)
            if window is None:
                self.all = True
                return
            tokens += len(window.tokens)
            self.windows.append(window)
            yield partial(_request, window, self._job.reductions)


def _request(window: Window, reductions: tuple[Reduction, ...], on_event: OnEvent) -> Request:
    own = tuple(replace(reduction, text=window.number, label=window.label) for reduction in reductions)
    stop = StopParams(max_tokens=0)
    return Request(window.tokens, on_event, stop=stop, priority=Priority.ANALYSIS, reductions=own)

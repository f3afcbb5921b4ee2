"""States of labelled texts in three parts: those that train a probe, those that calibrate it, and those of the report.

    of n documents of a label    round(fraction · n) are held out (holdout.py), and of those half are for the report

Each window of a document is a text of its own; all windows of a document are in one part. Numbers of ridge are dealt
as one label.
"""

import math
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from patchclamp_server.analysis.activations import collect
from patchclamp_server.analysis.corpora.windows import windows
from patchclamp_server.analysis.neurons.localize.holdout import Relabelled, held_out, of_documents_run
from patchclamp_server.analysis.neurons.texts import TextSource
from patchclamp_server.analysis.probes.fitting import Examples
from patchclamp_server.analysis.progress import Progress
from patchclamp_server.artifacts.corpora import UNLABELLED
from patchclamp_server.engine.engine import Engine
from patchclamp_server.engine.request import Capture
from patchclamp_server.errors import InvalidArgument
from patchclamp_server.interventions.scopes import SequenceTokens, scope_mask
from patchclamp_server.text.prompt import PromptEncoder

MAX_BYTES = 4 << 30
# Its square, and the sum of many, is finite.
MAX_NUMBER = 1e100
PROGRESS_EVENTS = 100
TRAINING, CALIBRATION, REPORT = range(3)
# Documents of each label, or of all where labels are numbers, in the three parts.
LEAST = (2, 1, 1)
LEAST_NUMBERS = (4, 2, 2)
FIELD = "texts"


@dataclass(frozen=True, eq=False)
class LabelledStates:
    """States float32 [texts, layers, width] with the class or number y, the document and the part of each text."""

    states: NDArray[np.float32]
    y: NDArray[np.float64]
    documents: NDArray[np.int64]
    parts: NDArray[np.int64]
    n_classes: int

    def part(self, part: int) -> tuple[NDArray[np.float32], Examples]:
        own = self.parts == part
        return self.states[own], Examples(self.y[own], self.documents[own], self.n_classes)


def numbers_of(labels: tuple[str, ...]) -> list[float]:
    """Returns labels as numbers. Raises InvalidArgument for one that is none."""
    found = []
    for label in labels:
        try:
            number = float(label)
        except ValueError:
            number = math.nan
        if not abs(number) <= MAX_NUMBER:
            message = (
                f"the label {label!r:.80} is no number of at most {MAX_NUMBER:g}, which labels of a ridge probe are"
            )
            raise InvalidArgument(FIELD, message)
        found.append(number)
    return found


async def labelled_states(
    engine: Engine,
    prompts: PromptEncoder,
    source: TextSource,
    capture: Capture,
    *,
    fraction: float,
    seed: int,
    numbers: list[float] | None,
) -> AsyncGenerator[Progress | LabelledStates, None]:
    """Yields progress in texts, then their states. `numbers` are those of the labels, None where they are classes.

    Raises InvalidArgument on "texts": too few documents of a label, one that the scope has no token of, or more states
    than MAX_BYTES. Nothing is run then.
    """
    corpus = Relabelled(source.corpus, source.corpus.document_labels, source.corpus.labels)
    width = engine.model.info.sites[capture.site]
    texts: list[tuple[int, ...]] = []
    documents: list[int] = []
    tokens = 0
    async with aclosing(windows(corpus, prompts, source.window_tokens)) as found:
        async for window in found:
            if window.is_left_over:
                continue
            _check_scope(capture, window.tokens, f"document {corpus.documents[window.document]}")
            texts.append(window.tokens)
            documents.append(window.document)
            tokens += len(window.tokens)
            if 4 * len(texts) * len(capture.layers) * width > MAX_BYTES:
                has = f"{len(texts)} texts have more than {MAX_BYTES} bytes of states at {len(capture.layers)} layers"
                raise InvalidArgument(FIELD, f"{has}; name fewer layers, or set max_tokens")
            if source.max_tokens and tokens >= source.max_tokens:
                break
    labels = of_documents_run(corpus.document_labels, documents)
    kinds = labels if numbers is None else np.where(labels == UNLABELLED, UNLABELLED, 0)
    dealt = _dealt(kinds, fraction, seed)
    _check(labels, dealt, corpus.labels, is_number=numbers is not None)
    document_of = np.array(documents, dtype=np.int64)
    classes = labels[document_of]
    y = classes.astype(np.float64) if numbers is None else np.array(numbers)[classes]
    states = np.empty((len(texts), len(capture.layers), width), dtype=np.float32)
    async with aclosing(collect(engine, texts, capture)) as collected:
        async for index, pooled in collected:
            states[index] = pooled.values.numpy()
            done = index + 1
            if done * PROGRESS_EVENTS // len(texts) > index * PROGRESS_EVENTS // len(texts):
                yield Progress("activations", done, len(texts))
    n_classes = len(corpus.labels) if numbers is None else 1
    yield LabelledStates(states, y, document_of, dealt[document_of], n_classes)


def _check_scope(capture: Capture, tokens: tuple[int, ...], name: str) -> None:
    positions, ids = np.arange(len(tokens)), np.array(tokens, dtype=np.int64)
    if not scope_mask(capture.scope, SequenceTokens(len(tokens), None), positions, ids).any():
        raise InvalidArgument("scope", f"selects no token of {name} of the texts")


def _dealt(labels: NDArray[np.int64], fraction: float, seed: int) -> NDArray[np.int64]:
    """Returns the part of each document, given its label."""
    out = held_out(labels, fraction, seed)
    report = held_out(np.where(out, labels, UNLABELLED), 0.5, seed + 1)
    return np.where(report, REPORT, np.where(out, CALIBRATION, TRAINING))


def _check(labels: NDArray[np.int64], parts: NDArray[np.int64], names: tuple[str, ...], *, is_number: bool) -> None:
    if not is_number and len(names) < 2:
        raise InvalidArgument(FIELD, f"expected texts of two labels at least, got {len(names)}")
    kinds = [("all labels", labels != UNLABELLED, LEAST_NUMBERS)]
    if not is_number:
        kinds = [(f"the label {name!r:.80}", labels == i, LEAST) for i, name in enumerate(names)]
    for name, own, least in kinds:
        counts = [int((own & (parts == part)).sum()) for part in (TRAINING, CALIBRATION, REPORT)]
        if any(count < needed for count, needed in zip(counts, least, strict=True)):
            has = f"of {name} {counts[0]} texts train, {counts[1]} calibrate and {counts[2]} are for the report"
            raise InvalidArgument(
                FIELD, f"{has}; expected at least {least[0]}, {least[1]} and {least[2]}: give more texts"
            )

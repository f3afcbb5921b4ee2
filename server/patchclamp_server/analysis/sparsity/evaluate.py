"""What policies do to the model's predictions: dense prompts, then the following tokens computed sparsely.

    perplexity ratio = exp(mean NLL sparse - mean NLL dense)        over the scored tokens of all documents
    divergence       = mean over tokens of KL(dense ‖ sparse)       nats
    top-1 agreement  = share of tokens with the same first choice
    sparsity         = share of neurons (channels, for TEAL and WINA) that were not computed

Each document is scored by requests of the engine: its first `prompt` tokens are computed densely and observed by its
policy, the next ones are fed from the text (as decoding them would) and scored, from the first on that a sparse token
predicts. It is scored densely once for all policies, and what came of that is kept on the device until they have been
compared with it.
"""

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import asdict, dataclass
from functools import partial
from math import fsum

import torch
from torch import Tensor

from patchclamp_server.analysis.requests import OnEvent, completed
from patchclamp_server.engine.engine import Engine
from patchclamp_server.engine.reducers.divergence import Divergence, Reference, ScoreReducer
from patchclamp_server.engine.request import Event, Finished, Priority, Request, SparseInference, Token
from patchclamp_server.errors import InvalidArgument, renaming_fields
from patchclamp_server.sparsity.policy import Selector

# Of dense predictions at a time, or those of one document.
KEPT_BYTES = 256 << 20


@dataclass(frozen=True, eq=False)
class Scored:
    """One document under one policy: means over its scored tokens, and the active share of layers that select."""

    dense_nll: float
    nll: float
    divergence: float
    top1_agreement: float
    active: Mapping[int, float]


@dataclass(frozen=True)
class Quality:
    perplexity_ratio: float
    divergence: float
    top1_agreement: float
    sparsity: float
    # Of the dense bytes (Cost), at 16 and 32 bits a weight.
    bytes_read_16: float
    bytes_read_32: float

    @classmethod
    def of(cls, documents: Sequence[Scored], selector: Selector) -> "Quality":
        """Of documents of one length. Layers that select nothing count as 1."""
        n_layers, active = selector.model.n_layers, [scored.active for scored in documents]

        def read(bits: int) -> float:
            return _mean(
                [
                    (sum(selector.cost(i, bits).bytes_read(s) for i, s in shares.items()) + n_layers - len(shares))
                    / n_layers
                    for shares in active
                ]
            )

        log_ratio = _mean([scored.nll - scored.dense_nll for scored in documents])
        return cls(
            # Infinite where math.exp overflows.
            perplexity_ratio=float(torch.tensor(log_ratio, dtype=torch.float64).exp()),
            divergence=_mean([scored.divergence for scored in documents]),
            top1_agreement=_mean([scored.top1_agreement for scored in documents]),
            sparsity=_mean([sum(1.0 - share for share in shares.values()) / n_layers for shares in active]),
            bytes_read_16=read(16),
            bytes_read_32=read(32),
        )

    def card(self) -> dict[str, float]:
        return {name: round(value, 5) for name, value in asdict(self).items()}


async def scored(
    engine: Engine, documents: Tensor, prompt: int, selectors: Sequence[Selector]
) -> AsyncGenerator[tuple[int, Scored], None]:
    """Yields the index of a selector, and what came of a document [tokens] under it: of a few documents by selector and
    document, then of the next.

    Raises InvalidArgument where no token is left to score or a document is longer than the engine has room for, by the
    field "text.document_tokens", and what the engine refuses or fails with.
    """
    tokens = documents.shape[1]
    if tokens < prompt + 2 or prompt < 1:
        raise InvalidArgument("text.document_tokens", f"{tokens} tokens leave none to score after {prompt}")
    for selector in selectors:
        await asyncio.to_thread(selector.prepare)
    kept = 4 * (tokens - prompt - 1) * engine.model.info.vocab_size
    with renaming_fields({"prompt": "text.document_tokens"}):
        for few in torch.split(documents, max(1, KEPT_BYTES // kept)):
            async with aclosing(_scored(engine, [tuple(ids) for ids in few.tolist()], prompt, selectors)) as found:
                async for each in found:
                    yield each


async def _scored(
    engine: Engine, documents: Sequence[tuple[int, ...]], prompt: int, selectors: Sequence[Selector]
) -> AsyncGenerator[tuple[int, Scored], None]:
    references = [Reference(prompt + 1) for _ in documents]
    requests = [partial(_request, ids, prompt, kept, None) for ids, kept in zip(documents, references, strict=True)]
    async with aclosing(completed(engine, requests)) as finished:
        dense = [_nll(events, prompt) async for events in finished]
    for index, selector in enumerate(selectors):
        asked = SparseInference("", selector)
        compared = [Divergence(reference) for reference in references]
        requests = [partial(_request, ids, prompt, into, asked) for ids, into in zip(documents, compared, strict=True)]
        async with aclosing(completed(engine, requests)) as finished:
            done = 0
            async for events in finished:
                ended = events[-1]
                assert isinstance(ended, Finished)
                assert ended.sparsity is not None
                active = ended.sparsity.active_by_layer
                yield index, Scored(dense[done], _nll(events, prompt), *compared[done].means(), active)
                done += 1


def _request(
    ids: tuple[int, ...], prompt: int, scores: ScoreReducer, sparsity: SparseInference | None, on_event: OnEvent
) -> Request:
    return Request(ids, on_event, priority=Priority.ANALYSIS, score_from=prompt, scores=scores, sparsity=sparsity)


def _nll(events: Sequence[Event], prompt: int) -> float:
    """The first scored token is the dense prompt's prediction, and left out."""
    return _mean([-(e.logprob or 0.0) for e in events if isinstance(e, Token) and e.position > prompt])


def _mean(values: Sequence[float]) -> float:
    return fsum(values) / len(values)

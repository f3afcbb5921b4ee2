"""The quality card of a policy: what evaluate.py measures of it on documents that are half prompt."""

import math
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from patchclamp_server.analysis.progress import Progress, Steps
from patchclamp_server.analysis.sparsity.evaluate import Quality, Scored, scored
from patchclamp_server.engine.engine import Engine
from patchclamp_server.sparsity.policy import Selector


@dataclass(frozen=True)
class QualityCard:
    """Has the fields of the message QualityCard."""

    perplexity_ratio: float
    divergence: float
    top1_agreement: float
    sparsity: float
    bytes_read_16: float
    documents: int
    scored_tokens: int
    dense_perplexity: float

    def as_json(self) -> dict[str, Any]:
        """Returns the card for JSON, in which a number that is not finite is null."""
        return {name: value if math.isfinite(value) else None for name, value in asdict(self).items()}


async def measure_quality(
    engine: Engine, documents: Tensor, selectors: Sequence[Selector], steps: Steps
) -> AsyncGenerator[Progress | QualityCard, None]:
    """Yields progress, then the card of each selector on documents [n, tokens], of which the first half is the prompt.

    A document under a selector is a step. Raises as `scored`.
    """
    prompt = prompt_tokens(documents)
    found: list[list[Scored]] = [[] for _ in selectors]
    async with aclosing(scored(engine, documents, prompt, selectors)) as measured:
        async for index, document in measured:
            found[index].append(document)
            yield steps.advance()
    n = len(documents)
    for selector, of in zip(selectors, found, strict=True):
        quality = Quality.of(of, selector)
        yield QualityCard(
            perplexity_ratio=quality.perplexity_ratio,
            divergence=quality.divergence,
            top1_agreement=quality.top1_agreement,
            sparsity=quality.sparsity,
            bytes_read_16=quality.bytes_read_16,
            documents=n,
            scored_tokens=n * (documents.shape[1] - prompt - 1),
            dense_perplexity=math.exp(math.fsum(document.dense_nll for document in of) / n),
        )


def prompt_tokens(documents: Tensor) -> int:
    """Returns the number of tokens of each document that are its dense prompt."""
    return documents.shape[1] // 2

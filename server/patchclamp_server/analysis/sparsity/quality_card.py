"""The quality card of a policy: what evaluate.py measures, document by document, so that any number of them fits.

    perplexity ratio = exp(mean over documents of NLL sparse - NLL dense)         the others: means over documents

All documents have the same length, so these are the numbers of evaluating them together.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from patchclamp_server.analysis.progress import Steps
from patchclamp_server.analysis.sparsity.evaluate import Evaluator, Quality
from patchclamp_server.sparsity.mlp import SparseModel
from patchclamp_server.sparsity.policy import Selector


@dataclass(frozen=True)
class QualityCard:
    """Fields as in the message QualityCard."""

    perplexity_ratio: float
    divergence: float
    top1_agreement: float
    sparsity: float
    bytes_read_16: float
    documents: int
    scored_tokens: int
    dense_perplexity: float

    def as_json(self) -> dict[str, Any]:
        """A number that is not finite, which JSON lacks, is null."""
        return {name: value if math.isfinite(value) else None for name, value in asdict(self).items()}


def measure_quality(model: SparseModel, documents: Tensor, selector: Selector, steps: Steps) -> QualityCard:
    """The card on documents [n, tokens], of which the first half is the prompt. A document is a step."""
    prompt = prompt_tokens(documents)
    found: list[Quality] = []
    dense_nll = 0.0
    for document in documents.to(model.decoder.device):
        evaluator = Evaluator(model, document[None], prompt)
        dense_nll += evaluator.dense_nll
        found.append(evaluator.quality(selector))
        steps.advance()
    n = len(documents)
    return QualityCard(
        perplexity_ratio=math.prod(q.perplexity_ratio ** (1 / n) for q in found),
        divergence=_mean([q.divergence for q in found]),
        top1_agreement=_mean([q.top1_agreement for q in found]),
        sparsity=_mean([q.sparsity for q in found]),
        bytes_read_16=_mean([q.bytes_read_16 for q in found]),
        documents=n,
        scored_tokens=n * (documents.shape[1] - prompt - 1),
        dense_perplexity=math.exp(dense_nll / n),
    )


def prompt_tokens(documents: Tensor) -> int:
    """Tokens of each document that are its dense prompt."""
    return documents.shape[1] // 2


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)

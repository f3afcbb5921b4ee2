"""Quality cards: what a cheaper way to run a model does to the next token's distribution, against the exact one.

perplexity ratio     exp(mean_t log p_t(x_t+1) - log q_t(x_t+1))    p of the exact way, q of the other
divergence           mean_t KL(p_t || q_t), nats
same first choice    share of tokens t with argmax p_t = argmax q_t
"""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from brown import evaluation_texts
from torch import Tensor

from patchclamp_server.model.load import LoadedModel

# Rows of logits that are compared at once.
_COMPARED = 256
Logits = Callable[[Tensor], Tensor]


def held_out(model: LoadedModel, documents: int, tokens: int) -> Iterator[Tensor]:
    """The first tokens [1, tokens] of documents of the Brown corpus that no calibration sees."""
    texts = [ids for ids in (model.tokenizer(text).input_ids for text in evaluation_texts()) if len(ids) >= tokens]
    if len(texts) < documents:
        raise SystemExit(f"{len(texts)} documents have {tokens} tokens, not {documents}")
    for ids in texts[:documents]:
        yield torch.tensor([ids[:tokens]])


class Comparison:
    """Compares ways to run a model by the logits that each gives for the same rows."""

    def __init__(self, exact: str, ways: list[str]) -> None:
        self.exact = exact
        self.tokens = 0
        self._sums = {way: {"loss": 0.0, "divergence": 0.0, "same": 0.0} for way in ways}

    def add(self, document: Tensor, states: Mapping[str, Tensor], logits: Mapping[str, Logits]) -> None:
        """Adds a document [1, T], the states at the end [T, d_model] of each way, and what makes logits of them."""
        for start in range(0, document.shape[1] - 1, _COMPARED):
            rows = slice(start, min(start + _COMPARED, document.shape[1] - 1))
            targets = document[0, 1:][rows]
            log_p = logits[self.exact](states[self.exact][rows]).double().log_softmax(1)
            for way, own in self._sums.items():
                log_q = log_p if way == self.exact else logits[way](states[way][rows]).double().log_softmax(1)
                own["loss"] -= float(log_q.gather(1, targets[:, None]).sum())
                own["divergence"] += float((log_p.exp() * (log_p - log_q)).sum())
                own["same"] += int((log_p.argmax(1) == log_q.argmax(1)).sum())
            self.tokens += len(targets)

    def cards(self) -> dict[str, dict[str, Any]]:
        exact = self._sums[self.exact]["loss"]
        return {
            way: {
                "perplexity": round(math.exp(own["loss"] / self.tokens), 4),
                "perplexity_ratio": round(math.exp((own["loss"] - exact) / self.tokens), 6),
                "divergence": own["divergence"] / self.tokens,
                "same_first_choice": round(own["same"] / self.tokens, 6),
            }
            for way, own in self._sums.items()
        }

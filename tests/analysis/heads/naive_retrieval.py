"""Retrieval scores by plain transformers with full attention matrices: no engine, no cache, one needle at a time.

    for every token of the answer: one pass over all tokens so far, whose attentions are n_layers x [heads, T, T]

The definitions are written once more here, with sets and loops; nothing of patchclamp_server is called.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel


@dataclass(frozen=True)
class NaiveRun:
    """Tokens generated, and the share of the needle that each head copied: [n_layers][n_heads]."""

    tokens: tuple[int, ...]
    scores: tuple[tuple[float, ...], ...]


@torch.no_grad()
def naive_run(
    model: PreTrainedModel,
    prompt: Sequence[int],
    needle: range,
    max_tokens: int,
    eos: frozenset[int],
    *,
    cache: bool = False,
) -> NaiveRun:
    """Decodes greedily with a model loaded with eager attention. `cache`: keys and values of earlier tokens are kept,
    so that only the pass over the prompt has full matrices."""
    ids = list(prompt)
    copied: dict[tuple[int, int], set[int]] = {}
    layers = heads = 0
    past = None
    while len(ids) < len(prompt) + max_tokens:
        new = ids if past is None else ids[-1:]
        out = model(torch.tensor([new]), past_key_values=past, use_cache=cache, output_attentions=True)
        past = out.past_key_values if cache else None
        token = int(out.logits[0, -1].argmax())
        layers = len(out.attentions)
        for layer, attention in enumerate(out.attentions):
            keys = attention[0, :, -1].argmax(dim=1).tolist()
            heads = len(keys)
            for head, key in enumerate(keys):
                if key in needle and ids[key] == token:
                    copied.setdefault((layer, head), set()).add(key)
        ids.append(token)
        if token in eos:
            break
    scores = tuple(
        tuple(len(copied.get((layer, head), ())) / len(needle) for head in range(heads)) for layer in range(layers)
    )
    return NaiveRun(tuple(ids[len(prompt) :]), scores)


def naive_success(text: str, answer: str) -> bool:
    """ROUGE-1 recall above 0.5: every word of the answer is looked for among the words of the text not yet used."""
    left = re.findall(r"\w+", text.lower())
    words = re.findall(r"\w+", answer.lower())
    found = 0
    for word in words:
        if word in left:
            left.remove(word)
            found += 1
    return found / len(words) > 0.5


def naive_mean(runs: Sequence[NaiveRun]) -> torch.Tensor:
    """[n_layers, n_heads] over runs."""
    return torch.tensor([run.scores for run in runs], dtype=torch.float64).mean(dim=0)

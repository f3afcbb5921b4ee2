"""Successor heads: from a token of an ordered sequence to the one that follows it, from the weights alone.

    logits_h(a) = W_U norm(W_O^h W_V^h norm_l(MLP_0(norm(E a))))
    score_h = share of tokens a of all sequences for which the successor of a has the largest logit of its sequence

E a is the embedding: no attention and no position takes part. Sequences: days, months, numbers, letters and others
(data/ordinals.json) in every case and with and without the space before a word that the tokenizer has whole tokens for;
those that wrap around do. Both norms are the model's own (the first MLP's input, the head's layer); the paper's formula
leaves them out, as its models have them folded into the weights. Heads of layer 0 stand before MLP_0 and read the
embedding. The control is the share for which another token of the sequence, drawn at random, has the largest logit.

The score is that of the paper, among the tokens of the sequence (of one case and spacing). How often the successor is
first of the whole vocabulary is in the evidence, for the best heads and as many random ones. Source: Gould et al. 2023,
Successor Heads: Recurring, Interpretable Attention Heads In The Wild.
"""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from patchclamp_server.analysis.heads.scores.ordinals import TokenSequence, token_sequences
from patchclamp_server.analysis.heads.scores.ov import ov_weights
from patchclamp_server.analysis.heads.scores.scoring import BEST, HeadScores, Scoring
from patchclamp_server.analysis.progress import Progress
from patchclamp_server.analysis.requests import exclusively
from patchclamp_server.engine.engine import Engine
from patchclamp_server.engine.exclusive import Slice, Work
from patchclamp_server.model.decoder import Decoder
from patchclamp_server.sparsity.mlp import matrix
from patchclamp_server.text.prompt import PromptEncoder


async def scores(engine: Engine, prompts: PromptEncoder, job: Scoring) -> AsyncGenerator[Progress | HeadScores, None]:
    sequences = await prompts.analysis.run(token_sequences, prompts)
    work = _scores(engine.model.decoder, sequences, job)
    told: AsyncGenerator[Progress | HeadScores, None] = exclusively(engine, work)
    async with aclosing(told) as events:
        async for event in events:
            yield event


def _scores(decoder: Decoder, sequences: list[TokenSequence], job: Scoring) -> Work[Progress | HeadScores]:
    yield Slice(1)
    circuit = OvCircuit(decoder, sequences)
    random = circuit.random_targets(torch.Generator().manual_seed(job.seed))
    hits, random_hits = [], []
    n_layers = decoder.spec.n_layers
    for layer in range(n_layers):
        yield Slice(len(circuit.inputs))
        logits = circuit.logits(layer)
        hits.append(circuit.is_first(logits, circuit.targets))
        random_hits.append(circuit.is_first(logits, random))
        yield Progress("layers", layer + 1, n_layers)
    samples, control = (torch.stack(found).permute(2, 0, 1).float() for found in (hits, random_hits))
    found = HeadScores.means(samples, control, job.seed)
    vocabulary: dict[str, list[dict[str, Any]]] = {}
    for name, heads in (("best", found.best), ("random", _random_heads(found, job.seed))):
        vocabulary[name] = []
        for head in heads:
            yield Slice(len(circuit.inputs))
            vocabulary[name].append(_head(head, share=circuit.first_of_vocabulary(*head)))
        yield Progress("vocabulary", len(vocabulary), 2)
    evidence = {
        "tokens": len(circuit.inputs),
        "chance": float(circuit.chance),
        "sequences": _by_sequence(sequences, samples, found),
        "first_of_vocabulary": vocabulary,
    }
    yield replace(found, evidence=evidence)


class OvCircuit:
    """The N tokens that have a successor, and what heads make of them. All sequences together have K tokens."""

    @torch.inference_mode()
    def __init__(self, decoder: Decoder, sequences: list[TokenSequence]) -> None:
        self.decoder = decoder
        self.inputs = torch.tensor([a for s in sequences for a, _ in s.pairs])  # [N]
        members = sorted({token for s in sequences for token in s.members})
        column = {token: index for index, token in enumerate(members)}
        self.members = torch.tensor(members)  # [K]
        self.targets = torch.tensor([column[b] for s in sequences for _, b in s.pairs])  # [N], of K
        # The mask [N, K] says which tokens are of the sequence.
        self.candidates = torch.zeros(len(self.inputs), len(members), dtype=torch.bool)
        row = 0
        for s in sequences:
            self.candidates[row : row + len(s.pairs), [column[token] for token in s.members]] = True
            row += len(s.pairs)
        self.chance = (1 / self.candidates.sum(1)).mean()
        unembedding = decoder.unembedding
        self._rows = matrix(unembedding)[self.members].float()  # [K, d_model]
        self._bias = 0.0 if unembedding.bias is None else unembedding.bias[self.members].float()
        self._embedded = decoder.embed(self.inputs)
        self._processed = decoder.mlp(0, decoder.blocks[0].mlp_norm(self._embedded))

    @torch.inference_mode()
    def written(self, layer: int, head: int | None = None) -> Tensor:
        """Returns what heads of a layer, or one, write of each token after the final norm, [n_heads or 1, N,
        d_model]."""
        decoder, block = self.decoder, self.decoder.blocks[layer]
        values, outputs = ov_weights(decoder, layer)
        if head is not None:
            values, outputs = values[head : head + 1], outputs[head : head + 1]
        x = block.attn_norm(self._processed if layer else self._embedded)
        out = x @ values.mT @ outputs.mT
        # In the model this norm follows the sum of all heads. Its weights apply to each; its scale changes no rank.
        return decoder.final_norm(out if block.post_attn_norm is None else block.post_attn_norm(out))

    @torch.inference_mode()
    def logits(self, layer: int) -> Tensor:
        """Returns the logits [n_heads, N, K] without the cap that some models put on them, which changes no rank."""
        return (self.written(layer).float() @ self._rows.T + self._bias).cpu()

    def is_first(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Returns whether targets [N] have a larger logit than all others of their sequence, bool [n_heads, N]."""
        own = torch.zeros_like(self.candidates).scatter_(1, targets[:, None], True)
        others = logits.masked_fill(~self.candidates | own, float("-inf")).amax(2)
        return (logits * own).sum(2) > others

    def random_targets(self, generator: torch.Generator) -> Tensor:
        """Returns for each token another one of its sequence that is not its successor: [N], indices into K."""
        allowed = self.candidates.clone().scatter_(1, self.targets[:, None], False)
        return torch.multinomial(allowed.float(), 1, generator=generator)[:, 0]

    @torch.inference_mode()
    def first_of_vocabulary(self, layer: int, head: int) -> float:
        """Returns the share of tokens for which no token has a logit as large as the successor's."""
        logits = self.decoder.unembed(self.written(layer, head)[0]).cpu()
        successors = self.members[self.targets][:, None]
        return float(((logits >= logits.gather(1, successors)).sum(1) == 1).float().mean())


def _random_heads(found: HeadScores, seed: int) -> list[tuple[int, int]]:
    n_heads = found.scores.shape[1]
    order = torch.randperm(found.scores.numel(), generator=torch.Generator().manual_seed(seed))
    return [divmod(index, n_heads) for index in order[:BEST].tolist()]


def _by_sequence(sequences: list[TokenSequence], samples: Tensor, found: HeadScores) -> list[dict[str, Any]]:
    """Returns the share of hits of each sequence in the best head."""
    (layer, head), row, described = found.best[0], 0, []
    for s in sequences:
        share = float(samples[row : row + len(s.pairs), layer, head].mean())
        described.append({"name": s.name, "tokens": len(s.pairs), "best_head": share})
        row += len(s.pairs)
    return described


def _head(head: tuple[int, int], share: float) -> dict[str, Any]:
    return {"layer": head[0], "head": head[1], "share": share}

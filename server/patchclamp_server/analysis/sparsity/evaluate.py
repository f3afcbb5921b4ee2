"""What a policy does to the model's predictions: dense prompts, then the following tokens computed sparsely.

    perplexity ratio = exp(mean NLL sparse - mean NLL dense)        over the scored tokens of all documents
    divergence       = mean over tokens of KL(dense ‖ sparse)       nats
    top-1 agreement  = share of tokens with the same first choice
    sparsity         = share of neurons (channels, for TEAL and WINA) that were not computed

Each document is a sequence of its own: its first `prompt` tokens are computed densely and observed by its policy, the
next ones are fed from the text (as decoding them would) and scored. The dense pass is made once for all policies.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from patchclamp_server.analysis.documents import KeepSite, NoHooks, inputs_of, pools_for
from patchclamp_server.callers import computes
from patchclamp_server.errors import InvalidArgument
from patchclamp_server.model.sites import Site
from patchclamp_server.sparsity.apply import Rows, Step, sparse_decoder
from patchclamp_server.sparsity.mlp import SparseModel
from patchclamp_server.sparsity.policy import PROJECTIONS, Selector, SequenceState, weight_shares


@dataclass(frozen=True)
class Quality:
    perplexity_ratio: float
    divergence: float
    top1_agreement: float
    sparsity: float
    # Of the dense bytes (Cost), at 16 and 32 bits a weight.
    bytes_read_16: float
    bytes_read_32: float

    def card(self) -> dict[str, float]:
        return {name: round(value, 5) for name, value in asdict(self).items()}


class Evaluator:
    """Documents [n, tokens] of one length, and what the dense model makes of them."""

    @torch.inference_mode()
    def __init__(self, model: SparseModel, documents: Tensor, prompt: int) -> None:
        if documents.shape[1] < prompt + 2 or prompt < 1:
            raise InvalidArgument("documents", f"{documents.shape[1]} tokens leave none to score after {prompt}")
        self.model = model
        self.prompt = prompt
        self.documents = documents
        tokens = documents.shape[1]
        decoder = model.decoder
        self._pools = pools_for(decoder, documents)
        observer = KeepSite(Site.MLP_POST)
        decoder.forward(inputs_of(documents, 0, prompt, decoder), self._pools, observer)
        self._neurons = observer.kept
        self._scored = inputs_of(documents, prompt, tokens - 1, decoder)
        x = decoder.forward(self._scored, self._pools, NoHooks())
        self._targets = documents[:, prompt + 1 :]
        self._dense: list[Tensor] = []  # probabilities [scored, vocab] of each document
        self._choices: list[Tensor] = []
        entropies, nll = [], []
        for targets, logits in zip(self._targets, self._logits(x), strict=True):
            log_p = logits.log_softmax(1)
            nll.append(-float(log_p.gather(1, targets[:, None]).mean()))
            self._choices.append(log_p.argmax(1))
            self._dense.append(log_p.exp())
            entropies.append(-float((self._dense[-1] * log_p).sum(1).mean()))
        self.dense_nll = sum(nll) / len(nll)
        self._entropy = sum(entropies) / len(entropies)

    def states(self, selector: Selector) -> list[SequenceState]:
        """The state of every document after its prompt."""
        states = []
        for i in range(len(self.documents)):
            state = selector.begin()
            for layer, neurons in self._neurons.items():
                selector.observe_prompt(state, layer, neurons[i * self.prompt : (i + 1) * self.prompt])
            selector.end_prompt(state)
            states.append(state)
        return states

    @torch.inference_mode()
    def quality(self, selector: Selector) -> Quality:
        tokens = self.documents.shape[1] - self.prompt - 1
        rows = [
            Rows(slice(i * tokens, (i + 1) * tokens), selector, state) for i, state in enumerate(self.states(selector))
        ]
        step = Step(rows)
        decoder = sparse_decoder(self.model, step)
        computes(len(self._scored.token_ids))
        x = decoder.forward(self._scored, self._pools, NoHooks())
        nll = cross_entropy = agreement = 0.0
        for dense, choices, targets, logits in zip(
            self._dense, self._choices, self._targets, self._logits(x), strict=True
        ):
            total = logits.logsumexp(1)
            nll += float((total - logits.gather(1, targets[:, None])[:, 0]).mean())
            cross_entropy += float((total - torch.linalg.vecdot(dense, logits)).mean())
            agreement += float((logits.argmax(1) == choices).double().mean())
        n = len(self.documents)
        active = self._active(step)
        share = self._mean(sum(active.values()), len(active))
        read = {bits: self._bytes_read(selector, active, bits) for bits in (16, 32)}
        ratio = float(torch.tensor(nll / n - self.dense_nll, dtype=torch.float64).exp())
        return Quality(
            ratio, max(0.0, cross_entropy / n - self._entropy), agreement / n, 1.0 - share, read[16], read[32]
        )

    def _active(self, step: Step) -> dict[int, float]:
        """Active share of each sparse layer: of its neurons, or of its channels, weighted by what a channel reads."""
        weight = dict(zip(PROJECTIONS, weight_shares(self.model.spec), strict=True))
        shares: dict[int, float] = {}
        for (layer, kind), (active, total) in step.active.items():
            shares[layer] = shares.get(layer, 0.0) + weight.get(kind, 1.0) * int(active) / total
        return shares

    def _bytes_read(self, selector: Selector, active: dict[int, float], bits: int) -> float:
        sparse = sum(selector.cost(layer, bits).bytes_read(share) for layer, share in active.items())
        return self._mean(sparse, len(active))

    def _mean(self, sparse: float, layers: int) -> float:
        """Over all layers, of which those that select nothing count as 1."""
        return (sparse + self.model.n_layers - layers) / self.model.n_layers

    def _logits(self, x: Tensor) -> Iterator[Tensor]:
        """One document at a time: all logits at once would be gigabytes."""
        tokens = x.shape[0] // len(self.documents)
        return (self.model.decoder.logits(part) for part in torch.split(x, tokens))

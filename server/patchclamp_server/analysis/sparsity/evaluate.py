"""What a policy does to the model's predictions: dense prompts, then the following tokens computed sparsely.

    perplexity ratio = exp(mean NLL sparse - mean NLL dense)        over the scored tokens of all documents
    divergence       = mean over tokens of KL(dense ‖ sparse)       nats
    top-1 agreement  = share of tokens with the same first choice
    sparsity         = share of neurons (channels, for TEAL and WINA) that were not computed

Each document is a sequence of its own: its first `prompt` tokens are computed densely and observed by its policy, the
next ones are fed from the text (as decoding them would) and scored. The dense pass is made once for all policies.
"""

from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from patchclamp_server.analysis.documents import KeepSite, forward, inputs_of, pools_for
from patchclamp_server.engine.exclusive import Slice, Sliced
from patchclamp_server.errors import InvalidArgument
from patchclamp_server.model.decoder import Decoder
from patchclamp_server.model.sites import Site
from patchclamp_server.sparsity.apply import Rows, Step
from patchclamp_server.sparsity.blocks import sparse_blocks
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

    def __init__(self, model: SparseModel, documents: Tensor, prompt: int) -> None:
        """What `of` begins with."""
        if documents.shape[1] < prompt + 2 or prompt < 1:
            raise InvalidArgument("documents", f"{documents.shape[1]} tokens leave none to score after {prompt}")
        self.model = model
        self.prompt = prompt
        self.documents = documents
        self._pools = pools_for(model.decoder, documents)
        self._scored = inputs_of(documents, prompt, documents.shape[1] - 1, model.decoder)
        self._targets = documents[:, prompt + 1 :]
        self._neurons: dict[int, Tensor] = {}
        # By document.
        self._dense: list[Tensor] = []  # probabilities [scored, vocab]
        self._choices: list[Tensor] = []
        self.dense_nll = self._entropy = 0.0

    @classmethod
    def of(cls, model: SparseModel, documents: Tensor, prompt: int) -> "Sliced[Evaluator]":
        """After the dense pass. Raises InvalidArgument where no token is left to score."""
        made = cls(model, documents, prompt)
        decoder, observer = model.decoder, KeepSite(Site.MLP_POST)
        yield from forward(decoder, inputs_of(documents, 0, prompt, decoder), made._pools, observer)
        made._neurons = observer.kept
        x = yield from forward(decoder, made._scored, made._pools)
        for targets, states in zip(made._targets, made._by_document(x), strict=True):
            log_p = (yield from _logits(decoder, states)).log_softmax(1)
            made.dense_nll -= float(log_p.gather(1, targets[:, None]).mean()) / len(documents)
            made._choices.append(log_p.argmax(1))
            made._dense.append(log_p.exp())
            made._entropy -= float((made._dense[-1] * log_p).sum(1).mean()) / len(documents)
        return made

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

    def quality(self, selector: Selector) -> Sliced[Quality]:
        tokens = self.documents.shape[1] - self.prompt - 1
        rows = [
            Rows(slice(i * tokens, (i + 1) * tokens), selector, state) for i, state in enumerate(self.states(selector))
        ]
        step = Step(rows)
        decoder, products = self.model.decoder, sparse_blocks(self.model, step)
        x = yield from forward(decoder, self._scored, self._pools, products=products)
        nll = cross_entropy = agreement = 0.0
        for dense, choices, targets, states in zip(
            self._dense, self._choices, self._targets, self._by_document(x), strict=True
        ):
            logits = yield from _logits(decoder, states)
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

    def _by_document(self, x: Tensor) -> tuple[Tensor, ...]:
        return torch.split(x, x.shape[0] // len(self.documents))


def _logits(decoder: Decoder, x: Tensor) -> Sliced[Tensor]:
    """Of residual states [n, d_model] of one document, a few rows at a time: [n, vocab].

    All documents at once would be gigabytes.
    """
    parts: list[Tensor] = []
    done = 0
    while done < len(x):
        granted = yield Slice(len(x) - done)
        parts.append(decoder.logits(x[done : done + granted]))
        done += granted
    return torch.cat(parts)

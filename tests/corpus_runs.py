"""A corpus of words for a tiny model, and jobs over it."""

from dataclasses import dataclass, field
from functools import cache

import numpy as np
import torch
from engine_runs import loaded
from kept_sites import KeepSite
from tiny_models import VOCAB
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from patchclamp_server.analysis.corpora.run import CorpusJob
from patchclamp_server.analysis.corpora.windows import ListedCorpus
from patchclamp_server.analysis.documents import inputs_of, pools_for
from patchclamp_server.artifacts.corpora import UNLABELLED, Document
from patchclamp_server.engine.reducers.firing import Firing
from patchclamp_server.engine.reducers.moments import Moments
from patchclamp_server.engine.reducers.occurrences import Occurrences
from patchclamp_server.engine.reducers.top_k import TopK
from patchclamp_server.engine.request import Reduction
from patchclamp_server.model.sites import Site
from patchclamp_server.text.prompt import PromptEncoder

BOS = 1
LAYERS = (0, 2)
WINDOW = 8


@cache
def word_encoder() -> PromptEncoder:
    """Word w<i> is token i; <s> before every text."""
    words = {"<s>" if i == BOS else f"w{i}": i for i in range(VOCAB)}
    backend = Tokenizer(models.WordLevel(vocab=words, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>")  # type: ignore[no-untyped-call]
    return PromptEncoder(tokenizer, loaded("llama").info)


def documents(*lengths: int, seed: int = 0) -> list[Document]:
    rng = np.random.default_rng(seed)
    return [
        Document(" ".join(f"w{id}" for id in rng.integers(2, VOCAB, n)), (0, 1, UNLABELLED)[i % 3])
        for i, n in enumerate(lengths)
    ]


def corpus(*lengths: int) -> ListedCorpus:
    return ListedCorpus(documents(*lengths), ("even", "odd"))


@dataclass(eq=False)
class Asked:
    """Reducers of one job, at two sites."""

    firing: Firing = field(default_factory=lambda: Firing(LAYERS))
    moments: Moments = field(default_factory=lambda: Moments((1,)))
    largest: TopK = field(default_factory=lambda: TopK(LAYERS, 3))
    occurrences: Occurrences = field(default_factory=lambda: Occurrences(0, VOCAB, 1 << 10))

    def job(self, over: ListedCorpus, *, window_tokens: int = WINDOW, most_tokens: int = 0) -> CorpusJob:
        reductions = (
            Reduction(Site.MLP_POST, self.firing),
            Reduction(Site.RESID_POST, self.moments),
            Reduction(Site.MLP_POST, self.largest),
            Reduction(Site.MLP_POST, self.occurrences),
        )
        return CorpusJob(over, reductions, window_tokens, most_tokens)


def assert_equal(own: Asked, other: Asked) -> None:
    """Counts, values and places bit for bit; sums but for the order of their terms."""
    for exact in ("firing", "largest", "occurrences"):
        found, expected = getattr(own, exact).state(), getattr(other, exact).state()
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(found[name], tensor), (exact, name)
    for name, tensor in other.moments.state().items():
        torch.testing.assert_close(own.moments.state()[name], tensor, rtol=1e-13, atol=1e-13)


def states(tokens: tuple[int, ...], site: Site, layer: int) -> Tensor:
    """What stands at a site, [n, width], of a text alone."""
    decoder, document, kept = loaded("llama").decoder, torch.tensor([tokens]), KeepSite(site)
    decoder.forward(inputs_of(document, 0, len(tokens), decoder), pools_for(decoder, document), kept)
    return kept.kept[layer]

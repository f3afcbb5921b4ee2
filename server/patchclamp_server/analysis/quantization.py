"""What quantising costs a model: the next token's distribution on ordinary text, against that of the dense model.

    divergence        mean_t KL(p_t || q_t)          p of the dense model, q of the quantised one, nats
    top-1 agreement   share of tokens t with argmax p_t = argmax q_t
    perplexity ratio  exp(mean_t log p_t(x_t+1) - log q_t(x_t+1))

The models are loaded one after the other, so that the memory of both is never needed at once; what the dense one
says is kept, 4 · vocabulary · TOKENS · TEXTS bytes.
"""

import gc
import math
from dataclasses import replace

import torch
from torch import Tensor

from patchclamp_server.analysis.documents import documents_of, inputs_of, pool_for
from patchclamp_server.analysis.ordinary_text import ordinary_text
from patchclamp_server.model.info import ModelInfo
from patchclamp_server.model.load import LoadedModel, load_model
from patchclamp_server.model.progress import Progress
from patchclamp_server.model.quantization.card import Quality
from patchclamp_server.model.quantization.scheme import Scheme

# Passages of the text, their tokens, and the characters in which these are looked for.
TEXTS, TOKENS = 4, 128
_CHARACTERS = 4096


def measure(ref: str, scheme: Scheme, progress: Progress | None = None) -> ModelInfo:
    """Returns the model `ref`, quantised, with its card and the quality in it. Raises ModelSourceError."""
    dense = load_model(ref, progress=progress)
    documents = passages(dense)
    expected = logprobs_of(dense, documents)
    del dense
    gc.collect()
    quantized = load_model(ref, quantize=scheme, progress=progress)
    card = quantized.info.quantization
    assert card is not None
    quality = compare(expected, logprobs_of(quantized, documents), documents)
    return replace(quantized.info, quantization=replace(card, quality=quality))


def passages(model: LoadedModel) -> Tensor:
    """Returns documents [TEXTS, tokens] of ordinary text."""
    text = ordinary_text()
    texts = [text[i * _CHARACTERS : (i + 1) * _CHARACTERS] for i in range(TEXTS)]
    return documents_of(texts, lambda own: model.tokenizer(own)["input_ids"], min(TOKENS, model.info.context_length))


@torch.inference_mode()
def logprobs_of(model: LoadedModel, documents: Tensor) -> Tensor:
    """Returns log-probabilities [n, tokens - 1, vocab] of what follows each token of the documents but the last."""
    decoder = model.decoder
    rows = []
    for document in documents:
        inputs = inputs_of(document[None], 0, len(document), decoder)
        x = decoder.forward(inputs, pool_for(decoder, document[None]))
        rows.append(decoder.logits(x[:-1]).log_softmax(dim=-1))
    return torch.stack(rows)


def compare(dense: Tensor, quantized: Tensor, documents: Tensor) -> Quality:
    """Compares log-probabilities [n, tokens - 1, vocab] on the documents [n, tokens]."""
    divergence = sum(
        float(torch.linalg.vecdot(own.exp(), own - other).double().clamp_min(0.0).sum())
        for own, other in zip(dense.flatten(0, 1), quantized.flatten(0, 1), strict=True)
    )
    following = documents[:, 1:, None]
    own, other = (logprobs.gather(2, following).double().mean() for logprobs in (dense, quantized))
    tokens = following.numel()
    return Quality(
        divergence=divergence / tokens,
        top1_agreement=float((dense.argmax(dim=2) == quantized.argmax(dim=2)).double().mean()),
        perplexity_ratio=math.exp(own - other),
        dense_perplexity=math.exp(-own),
        tokens=tokens,
    )

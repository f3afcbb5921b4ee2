"""A model in which "." is an attention sink: its residual norm is some twenty times that of the other tokens.

Qwen2.5 does so with the first "." or "," of a text, up to seventeen times the median norm; the embedded model with some
words, up to fifty times. A concept is planted in the letters p and n.
"""

from pathlib import Path

import torch
from tiny_llama import byte_tokenizer, save_tiny_llama
from transformers import AutoModelForCausalLM

from patchclamp_server.model.load import LoadedModel, load_model

SINK_COORDINATES = [5, 21]


def save_sink_model(directory: Path) -> None:
    save_tiny_llama(directory)
    model = AutoModelForCausalLM.from_pretrained(directory)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        embedding = model.get_input_embeddings().weight
        embedding.copy_(torch.randn(embedding.shape, generator=generator))
        concept = torch.randn(embedding.shape[1], generator=generator)
        for letter, sign in (("p", 1), ("n", -1)):
            embedding[id_of(letter)] += sign * concept
        embedding[id_of(".")] = 0.0
        embedding[id_of("."), SINK_COORDINATES] = 20 * embedding.shape[1] ** 0.5 / 2**0.5
    model.save_pretrained(directory)


def sink_model(directory: Path) -> LoadedModel:
    save_sink_model(directory)
    return load_model(str(directory))


def id_of(letter: str) -> int:
    return int(byte_tokenizer().get_vocab()[letter])

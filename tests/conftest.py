"""Fixtures of every package: the real embedded model, and a tiny one of random weights."""

from patchclamp_server.threads import configure_threads

configure_threads()

import os

import torch

# Kernels run in Triton's interpreter where there is no GPU; Triton decides when it is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from patchclamp_server.model.embedded import embedded_directory
from patchclamp_server.model.progress import RichProgress

if TYPE_CHECKING:
    from live import LiveServer

SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="session")
def embedded_dir() -> Path:
    """The embedded model in the user's own cache: fetched and converted there by the first run that needs it."""
    with RichProgress() as progress:
        return embedded_directory(progress)


@pytest.fixture(scope="session")
def tiny_llama_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama of two layers and width 32 with random weights, and a tokenizer of one token a byte."""
    directory = tmp_path_factory.mktemp("tiny_llama")
    tokenizer = byte_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def live_server(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> "Iterator[LiveServer]":
    """A real server of the tiny llama on an ephemeral port, shared by every test that changes nothing in it."""
    from live import LiveServer

    from patchclamp_server.model.load import load_model

    with LiveServer(load_model(str(tiny_llama_dir)), tmp_path_factory.mktemp("artifacts")) as server:
        yield server


@pytest.fixture(scope="session")
def embedded_server(embedded_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> "Iterator[LiveServer]":
    """A real server of the embedded model, for every test that needs one."""
    from live import LiveServer

    from patchclamp_server.model.load import load_model

    with LiveServer(load_model(str(embedded_dir)), tmp_path_factory.mktemp("embedded_artifacts")) as server:
        yield server


@pytest.fixture
def channel(live_server: "LiveServer") -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(live_server.address) as channel:
        yield channel


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Three special tokens, then one token for each byte, in the alphabet of byte-level BPE."""
    vocabulary = SPECIAL_TOKENS + sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(vocabulary)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<|im_start|>", eos_token="<|im_end|>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|endoftext|>"]})
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer

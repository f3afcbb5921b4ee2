"""Weights are served from the mapped files: none of them is copied, and what happens to a file's name is no matter."""

import mmap
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf_files import logits_of, some_ids, write_gguf
from numpy.typing import NDArray
from stored_blocks import Kind
from tiny_llama import byte_tokenizer
from tiny_models import tiny_model

from patchclamp_server.cpu.stored import StoredMatrix
from patchclamp_server.model.checkpoint import Checkpoint, open_checkpoint
from patchclamp_server.model.load import load_model
from patchclamp_server.model.mapping import mapped
from patchclamp_server.model.progress import Silent
from patchclamp_server.model.source import resolve

pytestmark = pytest.mark.usefixtures("own_cache")


def opened(path: Path) -> Checkpoint:
    return open_checkpoint(resolve(str(path)), Silent())


def is_mapped(memory: NDArray[np.uint8]) -> bool:
    owner: object = memory
    while isinstance(owner, np.ndarray):
        owner = owner.base
    if isinstance(owner, memoryview):
        owner = owner.obj
    return isinstance(owner, mmap.mmap) and not memory.flags.writeable


def gguf_file(path: Path) -> Path:
    model = tiny_model("llama", hidden_size=64, intermediate_size=96, tie_word_embeddings=True)
    return write_gguf(path, model, formats=lambda _: Kind.Q8_0)


def test_every_matrix_of_a_gguf_file_is_the_mapped_file(tmp_path: Path) -> None:
    path = gguf_file(tmp_path / "m.gguf")
    tensors = opened(path).tensors.tensors
    matrices = [tensor.part() for tensor in tensors.values() if len(tensor.shape) == 2]
    assert len(matrices) == 1 + 3 * 7
    assert all(is_mapped(part.memory) for part in matrices)
    stored = StoredMatrix(tuple(part for part in matrices if part.width == 64))
    assert stored.nbytes == sum(len(part.starts) * 64 // 32 * 34 for part in matrices if part.width == 64)


@pytest.mark.parametrize("family", ["llama", "opt", "gpt_neox", "gemma2"])
def test_every_matrix_of_a_safetensors_file_is_the_mapped_file(family: str, tmp_path: Path) -> None:
    tiny_model(family).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    tensors = opened(tmp_path).tensors.tensors
    assert all(is_mapped(tensor.part().memory) for tensor in tensors.values() if len(tensor.shape) == 2)


def test_embeddings_are_looked_up_in_the_mapped_file(tmp_path: Path) -> None:
    embedding = load_model(str(gguf_file(tmp_path / "m.gguf"))).decoder.embedding
    assert isinstance(embedding.weight, StoredMatrix)
    (part,) = embedding.weight.parts
    assert is_mapped(part.memory)
    ids = torch.tensor([3, 250, 3, 0])
    assert torch.equal(embedding.rows(ids), embedding.weight.dense()[ids])
    with pytest.raises(IndexError):
        embedding.rows(torch.tensor([256]))
    with pytest.raises(IndexError):
        embedding.rows(torch.tensor([-1]))


@pytest.mark.parametrize("change", [Path.unlink, lambda path: os.replace(gguf_file(path.with_name("other")), path)])
def test_a_file_that_is_deleted_or_replaced_is_served_on(change: object, tmp_path: Path) -> None:
    path = gguf_file(tmp_path / "m.gguf")
    decoder = load_model(str(path)).decoder
    before = logits_of(decoder, some_ids())
    assert callable(change)
    change(path)
    assert torch.equal(logits_of(decoder, some_ids()), before)


def test_a_mapped_file_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"weights")
    memory = mapped(tmp_path / "file")
    assert bytes(memory) == b"weights"
    with pytest.raises(ValueError, match="read-only"):
        memory[0] = 0


def test_an_empty_file_has_no_bytes(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert len(mapped(tmp_path / "file")) == 0


# Loads a small model first, so that libraries and compiled code are there, then prints what the large one adds.
_MEASURE = """
import sys
from patchclamp_server.model.load import load_model

def resident():
    lines = open("/proc/self/smaps_rollup").read().splitlines()
    return {name: int(line.split()[1]) for line in lines for name in ("Rss:", "Anonymous:") if line.startswith(name)}

small = load_model(sys.argv[1])
before = resident()
large = load_model(sys.argv[2])
after = resident()
print(*(after[name] - before[name] for name in ("Rss:", "Anonymous:")))
"""


def test_a_served_model_takes_hardly_more_memory_than_its_file(tmp_path: Path) -> None:
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 8, "num_hidden_layers": 4}
    paths = []
    for name, changes in {"small": {"num_hidden_layers": 1, "intermediate_size": 256}, "large": {}}.items():
        model = tiny_model("llama", **{**sizes, **changes})
        paths.append(write_gguf(tmp_path / f"{name}.gguf", model, formats=lambda _: Kind.Q4_K))
    command = [sys.executable, "-c", _MEASURE, *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    rss, anonymous = (int(number) << 10 for number in done.stdout.split())
    file = paths[1].stat().st_size
    as_float32 = sum(4 * weight.numel() for weight in tiny_model("llama", **sizes).parameters())
    assert as_float32 > 6 * file
    assert rss < 1.3 * file + (6 << 20)
    assert anonymous < file

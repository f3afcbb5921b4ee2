"""The model of transformers that a GGUF file is compared with."""

from pathlib import Path

import pytest
import torch
from gguf import GGUFReader
from safetensors import safe_open

from patchclamp_server.model.cache import is_sound
from patchclamp_server.model.gguf.conversion import converted_gguf
from patchclamp_server.model.progress import Stage


class Recording:
    """Remembers the stages, and raises in the middle of one when told to."""

    def __init__(self, interrupt_at: Stage | None = None) -> None:
        self.stages: list[Stage] = []
        self.interrupt_at = interrupt_at

    def update(self, stage: Stage, done: int = 0, total: int | None = None) -> None:
        if not self.stages or self.stages[-1] is not stage:
            self.stages.append(stage)
        if stage is self.interrupt_at and total is not None and done >= total // 2:
            raise KeyboardInterrupt


def tensor(directory: Path, name: str) -> torch.Tensor:
    with safe_open(directory / "model.safetensors", "pt") as file:
        return file.get_tensor(name)


@pytest.mark.usefixtures("own_cache")
def test_a_gguf_file_becomes_its_own_weights_in_float32(tiny_gguf: Path) -> None:
    directory = converted_gguf(tiny_gguf)
    written = {entry.name: torch.from_numpy(entry.data.copy()) for entry in GGUFReader(tiny_gguf).tensors}
    weight = tensor(directory, "model.layers.1.mlp.up_proj.weight")
    assert weight.dtype == torch.float32
    assert torch.equal(weight, written["blk.1.ffn_up.weight"])


@pytest.mark.usefixtures("own_cache")
def test_a_file_is_converted_once_wherever_it_lies(tiny_gguf: Path, tmp_path: Path) -> None:
    first, second = Recording(), Recording()
    directory = converted_gguf(tiny_gguf, first)
    copy = tmp_path / "copy.gguf"
    copy.write_bytes(tiny_gguf.read_bytes())
    assert converted_gguf(copy, second) == directory
    assert first.stages == [Stage.VERIFY, Stage.CONVERT, Stage.WRITE]
    assert second.stages == [Stage.VERIFY]


def test_an_interrupted_conversion_leaves_no_entry_and_the_next_one_succeeds(own_cache: Path, tiny_gguf: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        converted_gguf(tiny_gguf, Recording(interrupt_at=Stage.CONVERT))
    assert [path.suffix for path in (own_cache / "models").iterdir()] == [".lock"]
    assert is_sound(converted_gguf(tiny_gguf))


@pytest.mark.usefixtures("own_cache")
def test_a_corrupted_conversion_is_made_again(tiny_gguf: Path) -> None:
    weights = converted_gguf(tiny_gguf) / "model.safetensors"
    good = weights.read_bytes()
    weights.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    converted_gguf(tiny_gguf)
    assert weights.read_bytes() == good

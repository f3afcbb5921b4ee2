"""The tokenizer of a GGUF file is made of its keys once, and kept."""

import json
import shutil
from pathlib import Path

import pytest
from gguf_files import write_gguf
from tiny_models import tiny_model

from patchclamp_server.model.cache import is_sound
from patchclamp_server.model.gguf.header import read_header
from patchclamp_server.model.gguf.tokenizer import gguf_tokenizer
from patchclamp_server.model.progress import Silent, Stage


class Stages:
    def __init__(self, interrupt_at: Stage | None = None) -> None:
        self.seen: list[Stage] = []
        self.interrupt_at = interrupt_at

    def update(self, stage: Stage, done: int = 0, total: int | None = None) -> None:
        self.seen.append(stage)
        if stage is self.interrupt_at:
            raise KeyboardInterrupt


def made(path: Path) -> bool:
    stages = Stages()
    gguf_tokenizer(read_header(path), stages)
    return stages.seen == [Stage.TOKENIZER]


def entries(cache: Path) -> list[Path]:
    return [path for path in (cache / "models").iterdir() if path.suffix != ".lock"]


@pytest.mark.usefixtures("own_cache")
def test_it_splits_digits_apart_where_the_file_says_so(tiny_gguf: Path) -> None:
    tokenizer = gguf_tokenizer(read_header(tiny_gguf), Silent())
    assert tokenizer.tokenize("a  4") == ["a", "ĠĠ", "4"]
    assert tokenizer.eos_token == "<|im_end|>"


def test_it_is_made_once_for_the_same_keys_wherever_they_are(own_cache: Path, tmp_path: Path) -> None:
    first = write_gguf(tmp_path / "a.gguf", tiny_model("llama"))
    same = write_gguf(tmp_path / "b.gguf", tiny_model("llama"), tensors={"output_norm.weight": [1.0] * 48})
    other = write_gguf(tmp_path / "c.gguf", tiny_model("llama"), template="{{ messages }}")
    assert [made(path) for path in (first, first, same, other)] == [True, False, False, True]
    assert len(entries(own_cache)) == 2


def test_a_damaged_entry_is_made_again(own_cache: Path, tiny_gguf: Path) -> None:
    assert made(tiny_gguf)
    (entry,) = entries(own_cache)
    (entry / "tokenizer.json").write_text("{}")
    assert made(tiny_gguf)
    assert is_sound(entry)


def test_an_interrupted_one_leaves_no_entry(own_cache: Path, tiny_gguf: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        gguf_tokenizer(read_header(tiny_gguf), Stages(interrupt_at=Stage.TOKENIZER))
    assert entries(own_cache) == []
    assert made(tiny_gguf)


@pytest.mark.usefixtures("own_cache")
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer_config.json", json.dumps({"tokenizer_class": "GPT2Tokenizer", "model_max_length": 7})),
        ("tokenizer_config.json", json.dumps({"auto_map": {"AutoTokenizer": ["code.Slow", "code.Fast"]}})),
        ("tokenizer_config.json", "{"),
        ("tokenizer.json", "{"),
    ],
)
def test_tokenizer_files_beside_it_are_those_of_another_model(
    name: str, content: str, tiny_gguf: Path, tmp_path: Path
) -> None:
    alone = gguf_tokenizer(read_header(tiny_gguf), Silent())
    shutil.rmtree(tmp_path / "cache")
    (tmp_path / name).write_text(content)
    path = Path(shutil.copy(tiny_gguf, tmp_path / "m.gguf"))
    tokenizer = gguf_tokenizer(read_header(path), Silent())
    assert type(tokenizer) is type(alone)
    assert tokenizer.model_max_length == alone.model_max_length

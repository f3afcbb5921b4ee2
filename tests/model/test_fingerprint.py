import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf_files import VOCABULARY, write_gguf
from safetensors.torch import load_file, save_file
from stored_blocks import Kind
from tiny_models import tiny_model
from transformers import AutoModelForCausalLM

from patchclamp_server.model.errors import ModelSourceError
from patchclamp_server.model.fingerprint import gguf_fingerprint, model_fingerprint
from patchclamp_server.model.gguf.files import read_headers
from patchclamp_server.model.progress import Stage

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture
def model_copy(tiny_llama_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_llama_dir, tmp_path / "copy", copy_function=shutil.copyfile))


class BytesRead:
    def __init__(self) -> None:
        self.done = 0

    def update(self, stage: Stage, done: int = 0, total: int | None = None) -> None:
        self.done = max(self.done, done)


def edit_config(directory: Path, **changes: object) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_equal_models_at_other_paths_and_times_are_one_model(tiny_llama_dir: Path, model_copy: Path) -> None:
    os.utime(model_copy / "model.safetensors", (0, 0))
    assert model_fingerprint(model_copy) == model_fingerprint(tiny_llama_dir)
    assert len(model_fingerprint(model_copy)) == 64


def test_sharding_makes_no_other_model(tiny_llama_dir: Path, model_copy: Path) -> None:
    (model_copy / "model.safetensors").unlink()
    AutoModelForCausalLM.from_pretrained(tiny_llama_dir).save_pretrained(model_copy, max_shard_size="40KB")
    assert not (model_copy / "model.safetensors").exists()
    assert model_fingerprint(model_copy) == model_fingerprint(tiny_llama_dir)


def test_one_changed_weight_makes_another_model(tiny_llama_dir: Path, model_copy: Path) -> None:
    tensors = load_file(model_copy / "model.safetensors")
    weight = tensors["model.layers.1.mlp.up_proj.weight"]
    weight[0, 0] = torch.nextafter(weight[0, 0], torch.tensor(9.0))
    save_file(tensors, model_copy / "model.safetensors", metadata={"format": "pt"})
    assert model_fingerprint(model_copy) != model_fingerprint(tiny_llama_dir)


def test_a_weight_of_another_shape_makes_another_model(tiny_llama_dir: Path, model_copy: Path) -> None:
    """Its bytes are the same."""
    tensors = load_file(model_copy / "model.safetensors")
    weight = tensors["model.layers.1.mlp.up_proj.weight"]
    tensors["model.layers.1.mlp.up_proj.weight"] = weight.reshape(weight.shape[1], weight.shape[0])
    save_file(tensors, model_copy / "model.safetensors", metadata={"format": "pt"})
    assert model_fingerprint(model_copy) != model_fingerprint(tiny_llama_dir)


def test_the_order_of_keys_in_the_config_makes_no_other_model(tiny_llama_dir: Path, model_copy: Path) -> None:
    path = model_copy / "config.json"
    path.write_text(json.dumps(dict(reversed(json.loads(path.read_text()).items())), indent=7))
    assert model_fingerprint(model_copy) == model_fingerprint(tiny_llama_dir)


def test_a_config_that_computes_something_else_makes_another_model(tiny_llama_dir: Path, model_copy: Path) -> None:
    edit_config(model_copy, rms_norm_eps=1e-3)
    assert model_fingerprint(model_copy) != model_fingerprint(tiny_llama_dir)


def test_bookkeeping_in_the_config_does_not_count(tiny_llama_dir: Path, model_copy: Path) -> None:
    edit_config(model_copy, transformers_version="0", _name_or_path="elsewhere", use_cache=False)
    assert model_fingerprint(model_copy) == model_fingerprint(tiny_llama_dir)


def test_another_tokenizer_makes_another_model(tiny_llama_dir: Path, model_copy: Path) -> None:
    path = model_copy / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    path.write_text(json.dumps(tokenizer))
    assert model_fingerprint(model_copy) != model_fingerprint(tiny_llama_dir)


def test_the_weights_are_read_only_once(model_copy: Path) -> None:
    first, second = BytesRead(), BytesRead()
    assert model_fingerprint(model_copy, first) == model_fingerprint(model_copy, second)
    assert first.done > 0
    assert second.done == 0


def test_a_file_changed_in_place_is_read_again(model_copy: Path) -> None:
    before = model_fingerprint(model_copy)
    weights = model_copy / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert model_fingerprint(model_copy) != before


@pytest.mark.parametrize("content", [b"", b"\x10\0\0\0\0\0\0\0not json at all.", b"\x80\x02}q\x00."])
def test_a_file_that_is_not_safetensors_is_refused(model_copy: Path, content: bytes) -> None:
    (model_copy / "model.safetensors").write_bytes(content)
    with pytest.raises(ModelSourceError, match="not a safetensors file"):
        model_fingerprint(model_copy)


def test_a_cut_safetensors_file_is_refused(model_copy: Path) -> None:
    weights = model_copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(ModelSourceError, match="cut short"):
        model_fingerprint(model_copy)


def gguf_print(path: Path, **options: Any) -> str:
    write_gguf(path, tiny_model("llama", hidden_size=64, intermediate_size=96), formats=lambda _: Kind.Q8_0, **options)
    files = sorted(path.parent.glob(f"{path.stem}-*")) or [path]
    return gguf_fingerprint(read_headers(files), files)


def test_a_gguf_file_is_one_model_by_any_name_split_or_whole_with_any_template(tmp_path: Path) -> None:
    plain = gguf_print(tmp_path / "a.gguf")
    assert re.fullmatch("[0-9a-f]{64}-gguf-Q8_0", plain)
    assert gguf_print(tmp_path / "b.gguf", name="another") == plain
    assert gguf_print(tmp_path / "split.gguf", tensors_in_a_part=7) == plain
    assert gguf_print(tmp_path / "chat.gguf", template="{{ messages }}") == plain


def test_a_key_a_token_or_a_weight_makes_another_model_of_a_gguf_file(tmp_path: Path) -> None:
    plain = gguf_print(tmp_path / "a.gguf")
    others = [
        gguf_print(tmp_path / "key.gguf", keys={"rope.freq_base": 500.0}),
        gguf_print(tmp_path / "token.gguf", vocabulary=[*VOCABULARY[:-1], "other"]),
        gguf_print(tmp_path / "weight.gguf", tensors={"output_norm.weight": [1.0] * 64}),
    ]
    assert len({plain, *others}) == 4


def test_another_format_makes_another_model(tmp_path: Path) -> None:
    prints = []
    for kind in (Kind.F32, Kind.F16):
        path = write_gguf(tmp_path / kind.name, tiny_model("llama"), formats=lambda _, kind=kind: kind)
        prints.append(gguf_fingerprint(read_headers([path]), [path]))
    assert [one.partition("-")[2] for one in prints] == ["gguf-F32", "gguf-F16"]
    assert prints[0][:64] != prints[1][:64]


def test_a_gguf_file_is_read_only_once(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", tiny_model("llama"))
    first, second = BytesRead(), BytesRead()
    assert gguf_fingerprint(read_headers([path]), [path], first) == gguf_fingerprint(
        read_headers([path]), [path], second
    )
    assert first.done > 0
    assert second.done == 0

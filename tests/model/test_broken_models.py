"""Whatever is wrong with a model, one line names it, before the weights are read where that is possible."""

import json
import os
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from patchclamp_server.cli.commands import main
from patchclamp_server.model.errors import ModelSourceError
from patchclamp_server.model.load import load_model
from patchclamp_server.model.progress import Stage

UP = "model.layers.1.mlp.up_proj.weight"
Tensors = dict[str, torch.Tensor]


@pytest.fixture
def model_copy(tiny_llama_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_llama_dir, tmp_path / "copy"))


class Stages:
    def __init__(self) -> None:
        self.seen: set[Stage] = set()

    def update(self, stage: Stage, done: int = 0, total: int | None = None) -> None:
        self.seen.add(stage)


def refusal(directory: Path, stages: Stages | None = None) -> str:
    with pytest.raises(ModelSourceError) as refused:
        load_model(str(directory), progress=stages)
    return str(refused.value)


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(directory: Path, edit: Callable[[Tensors], object]) -> None:
    tensors = load_file(directory / "model.safetensors")
    edit(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "architecture": ({"model_type": "mamba"}, "architecture 'mamba' is not supported: llama, mistral"),
    "no architecture": ({"model_type": None}, "architecture None is not supported"),
    "architecture that is no name": ({"model_type": []}, "architecture [] is not supported"),
    "activation": ({"hidden_act": "laplace"}, "activation 'laplace' is not supported"),
    "rope type": (
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
        "rotary scaling 'dynamic' is not supported: default, linear, llama3, longrope, yarn",
    ),
    "GPTQ": ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "(quantization_config: gptq)"),
    "AWQ": ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "(quantization_config: awq)"),
    "bitsandbytes": (
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
        "(quantization_config: bitsandbytes)",
    ),
    "compressed tensors": (
        {"quantization_config": {"quant_method": "compressed-tensors"}},
        "(quantization_config: compressed-tensors)",
    ),
    "compressed tensors, the old key": ({"compression_config": {"format": "int"}}, "(compression_config: unnamed)"),
    "heads that do not divide": ({"num_key_value_heads": 3}, "4 heads cannot share 3 key-value heads"),
    "negative positions": ({"max_position_embeddings": -1}, "-1 positions is not supported"),
    "an epsilon that is no number": ({"rms_norm_eps": float("nan")}, "llama with rms_norm_eps=nan is not supported"),
    "a negative epsilon": ({"rms_norm_eps": -1.0}, "llama with rms_norm_eps=-1.0 is not supported"),
    "a base without end": (
        {"rope_parameters": {"rope_type": "default", "rope_theta": float("inf")}},
        "llama with rope_theta=inf is not supported",
    ),
    "more layers than memory": (
        {"num_hidden_layers": 1 << 31},
        "num_hidden_layers=2147483648 is not supported: at most",
    ),
    "no layers": ({"num_hidden_layers": 0}, "0 layers is not supported"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_what_the_configuration_says_is_refused_before_the_weights_are_read(name: str, model_copy: Path) -> None:
    changes, message = CONFIGS[name]
    edit_json(model_copy / "config.json", **changes)
    stages = Stages()
    assert message in refusal(model_copy, stages)
    assert stages.seen == set()


@pytest.mark.parametrize(
    "content", ["{}", "[]", "", "{", '{"model": {}}', '{"version": "1.0", "model": {"vocab": {}}}']
)
def test_a_broken_tokenizer_is_refused_before_the_weights_are_read(content: str, model_copy: Path) -> None:
    (model_copy / "tokenizer.json").write_text(content)
    stages = Stages()
    assert refusal(model_copy, stages).startswith(f"the tokenizer of {model_copy} ")
    assert stages.seen == set()


def test_a_vocabulary_of_nothing_is_refused(model_copy: Path) -> None:
    tokenizer = json.loads((model_copy / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"] = {}
    (model_copy / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert "has no vocabulary" in refusal(model_copy)


@pytest.mark.parametrize("content", ["", "[]", "{", '{"eos_token_id": "x"}', '{"eos_token_id": [2, -1]}'])
def test_a_generation_config_that_would_be_left_out_in_silence_is_refused(content: str, model_copy: Path) -> None:
    """transformers serves on without it: generations would not end."""
    (model_copy / "generation_config.json").write_text(content)
    assert str(model_copy / "generation_config.json") in refusal(model_copy)


TENSORS: dict[str, tuple[Callable[[Tensors], object], str]] = {
    "one is missing": (lambda t: t.pop(UP), f"lacks 1 weights of a llama model: {UP}"),
    "a block is missing": (lambda t: [t.pop(n) for n in list(t) if "layers.1." in n], "lacks 9 weights of a llama"),
    "one is of another shape": (
        lambda t: t.update({UP: torch.zeros(64, 31)}),
        f"weights of other shapes than a llama model: {UP} [64, 31] for [64, 32]",
    ),
    "one is a number": (lambda t: t.update({UP: torch.tensor(1.0)}), f"{UP} [] for [64, 32]"),
    "one is unknown": (lambda t: t.update({"model.layers.1.mlp.gate": torch.zeros(3)}), "has 1 weights that a llama"),
    "one is packed": (lambda t: t.update({UP: t[UP].to(torch.int8)}), f"{UP} is stored as I8"),
    "one is of eight bits": (lambda t: t.update({UP: t[UP].to(torch.float8_e4m3fn)}), f"{UP} is stored as F8_E4M3"),
}


@pytest.mark.parametrize("name", TENSORS)
def test_weights_that_are_not_those_of_the_model_are_refused_by_name(name: str, model_copy: Path) -> None:
    edit, message = TENSORS[name]
    edit_tensors(model_copy, edit)
    assert message in refusal(model_copy)


@pytest.mark.parametrize("key", ["dtype", "shape", "data_offsets"])
@pytest.mark.parametrize("value", [None, "x", -1, [], {}, [5], [-1, 0], [10, 5], [0, 10**12]])
def test_a_header_that_lies_about_a_tensor_is_refused(key: str, value: object, model_copy: Path) -> None:
    path = model_copy / "model.safetensors"
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    header[UP][key] = value
    changed = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(changed)) + changed + raw[8 + length :])
    assert "\n" not in refusal(model_copy)


FILES = ("config.json", "generation_config.json", "tokenizer.json", "model.safetensors")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("content", [b"", b"null", b"[]", b'"x"', b"\xff\xfe\x00garbage", None])
def test_a_file_of_anything_else_is_refused(name: str, content: bytes | None, model_copy: Path) -> None:
    (model_copy / name).unlink()
    if content is None:
        (model_copy / name).mkdir()
    else:
        (model_copy / name).write_bytes(content)
    assert "\n" not in refusal(model_copy)


WRONG = (None, "x", -1, 0, 3.5, [], {}, 7)
DECISIVE = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim", "vocab_size")


@pytest.mark.parametrize("key", DECISIVE)
def test_a_size_of_anything_else_is_refused(key: str, model_copy: Path) -> None:
    good = json.loads((model_copy / "config.json").read_text())
    for value in WRONG:
        if key == "head_dim" and value is None:  # derived, and right
            continue
        (model_copy / "config.json").write_text(json.dumps(good | {key: value}))
        assert "\n" not in refusal(model_copy)


def test_the_device_is_checked_before_anything_is_loaded() -> None:
    with pytest.raises(ModelSourceError, match=r"'warp' is no device; a device is cpu, cuda"):
        load_model("/nowhere", device="warp")
    with pytest.raises(ModelSourceError, match="device meta is not supported"):
        load_model("/nowhere", device="meta")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("device", ["cuda", "cuda:3"])
def test_a_gpu_that_is_not_there_ends_in_one_line(device: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model", "/nowhere", "--device", device]) == 1
    shown = capsys.readouterr().err
    assert shown.startswith(f"patchclamp serve: error: device {device}: there is no CUDA here")
    assert shown.count("\n") == 1


def test_a_dtype_that_the_device_cannot_compute_in_is_refused_before_anything_is_loaded() -> None:
    with pytest.raises(ModelSourceError, match=r"device cpu cannot compute in int8: .*--dtype float32 may"):
        load_model("/nowhere", dtype=torch.int8)


def test_serve_says_what_is_wrong_in_one_line(model_copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit_tensors(model_copy, lambda t: t.pop(UP))
    assert main(["--model", str(model_copy)]) == 1
    *stages, last = capsys.readouterr().err.splitlines()
    assert last == f"patchclamp serve: error: {model_copy} lacks 1 weights of a llama model: {UP}"
    assert all(line.startswith("model: ") for line in stages)


def test_a_kv_cache_that_does_not_fit_is_said_in_one_line(
    tiny_llama_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--model", str(tiny_llama_dir), "--kv-cache-tokens", str(10**15)]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"patchclamp serve: error: the model with --kv-cache-tokens {10**15} takes ")
    assert re.search(r"; at most --kv-cache-tokens \d+ fit$", last)


def test_a_cache_that_cannot_be_written_stops_no_local_model_and_is_said_once(
    model_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("not a directory")
    monkeypatch.setenv("PATCHCLAMP_CACHE", str(tmp_path / "file" / "cache"))
    assert load_model(str(model_copy)).info.n_layers == 2
    load_model(str(model_copy))
    said = [r.getMessage() for r in caplog.records if "cannot be remembered" in r.getMessage()]
    assert len(said) == 1
    assert str(tmp_path / "file" / "cache") in said[0]


def test_a_cache_that_cannot_be_written_stops_no_gguf_file(
    tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("not a directory")
    monkeypatch.setenv("PATCHCLAMP_CACHE", str(tmp_path / "file" / "cache"))
    assert load_model(str(tiny_gguf)).info.n_layers == 2
    assert "is made at every start: the cache" in caplog.text


@pytest.mark.usefixtures("own_cache")
def test_a_gguf_file_may_be_named_in_capitals(tiny_gguf: Path, tmp_path: Path) -> None:
    os.link(tiny_gguf, tmp_path / "TINY.GGUF")
    assert load_model(str(tmp_path / "TINY.GGUF")).info.name == "TINY"

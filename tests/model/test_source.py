import json
import shutil
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from transformers import AutoModelForCausalLM

from patchclamp_server.model.embedded import embedded_file
from patchclamp_server.model.errors import ModelSourceError
from patchclamp_server.model.source import resolve, weight_files


@pytest.fixture
def model_copy(tiny_llama_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_llama_dir, tmp_path / "copy"))


def test_a_local_directory_is_itself(tiny_llama_dir: Path) -> None:
    source = resolve(str(tiny_llama_dir))
    assert source.path == tiny_llama_dir
    assert source.name == tiny_llama_dir.name


def test_embedded_names_the_default_model() -> None:
    source = resolve("embedded")
    assert source.gguf_files == (source.path,) == (embedded_file(),)
    assert source.name == "SmolLM2-135M-Instruct"


def test_a_gguf_file_is_itself(tiny_gguf: Path) -> None:
    source = resolve(str(tiny_gguf))
    assert (source.name, source.gguf_files) == ("tiny", (tiny_gguf,))


@pytest.mark.parametrize("part", [1, 3])
def test_any_part_names_all_files_of_a_split_model(part: int, tmp_path: Path) -> None:
    files = tuple(tmp_path / f"big-0000{i}-of-00003.gguf" for i in (1, 2, 3))
    for file in files:
        file.touch()
    source = resolve(str(files[part - 1]))
    assert (source.name, source.gguf_files) == ("big", files)


def test_every_part_of_a_split_model_is_needed(tmp_path: Path) -> None:
    (tmp_path / "big-00002-of-00003.gguf").touch()
    with pytest.raises(ModelSourceError, match=r"lacks big-00001-of-00003\.gguf, big-00003-of-00003\.gguf beside it"):
        resolve(str(tmp_path / "big-00002-of-00003.gguf"))


@pytest.mark.parametrize("part", ["00004", "00000"])
def test_a_part_beyond_those_there_are_is_refused(part: str, tmp_path: Path) -> None:
    for name in ("00001", "00002", "00003", part):
        (tmp_path / f"big-{name}-of-00003.gguf").touch()
    with pytest.raises(ModelSourceError, match=rf"names itself part {int(part)} of 3"):
        resolve(str(tmp_path / f"big-{part}-of-00003.gguf"))


def test_a_directory_with_only_pickled_weights_is_refused(model_copy: Path) -> None:
    (model_copy / "model.safetensors").unlink()
    torch.save({}, model_copy / "pytorch_model.bin")
    with pytest.raises(ModelSourceError, match=r"only pickled weights \(pytorch_model.bin\).*safetensors"):
        resolve(str(model_copy))


def test_pickled_weights_beside_safetensors_do_no_harm(model_copy: Path) -> None:
    torch.save({}, model_copy / "pytorch_model.bin")
    assert weight_files(resolve(str(model_copy)).path) == [model_copy / "model.safetensors"]


def test_every_shard_of_an_index_is_needed(tiny_llama_dir: Path, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(tiny_llama_dir).save_pretrained(tmp_path, max_shard_size="40KB")
    shards = weight_files(tmp_path)
    assert len(shards) > 1
    shards[-1].unlink()
    with pytest.raises(ModelSourceError, match=f"lacks {shards[-1].name}"):
        weight_files(tmp_path)


@pytest.mark.parametrize("name", ["../model.safetensors", "model.bin"])
def test_an_index_may_name_only_safetensors_beside_it(model_copy: Path, name: str) -> None:
    (model_copy / "model.safetensors").unlink()
    (model_copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": name}}))
    with pytest.raises(ModelSourceError, match="not a safetensors file beside it"):
        resolve(str(model_copy))


def test_a_directory_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelSourceError, match=r"no config\.json"):
        resolve(str(tmp_path))


def test_a_directory_of_gguf_files_says_to_name_the_file(tmp_path: Path, tiny_gguf: Path) -> None:
    shutil.copy(tiny_gguf, tmp_path)
    with pytest.raises(ModelSourceError, match=r"name the \.gguf file itself"):
        resolve(str(tmp_path))


def offline_hub(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))


def in_hub_cache(cache: Path, ref: str) -> Path:
    """The folder where the hub's client keeps the one downloaded revision of `ref`."""
    repository = cache / f"models--{ref.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    return snapshot


def test_a_hub_id_is_loaded_from_the_local_hub_cache(
    tiny_llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offline_hub(monkeypatch, tmp_path)
    snapshot = in_hub_cache(tmp_path, "someone/tiny")
    shutil.copytree(tiny_llama_dir, snapshot, dirs_exist_ok=True)
    source = resolve("someone/tiny")
    assert (source.name, source.path) == ("someone/tiny", snapshot)


def test_a_hub_repository_without_safetensors_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    offline_hub(monkeypatch, tmp_path)
    (in_hub_cache(tmp_path, "someone/pickled") / "config.json").write_text("{}")
    with pytest.raises(ModelSourceError, match="no safetensors weights on the hub"):
        resolve("someone/pickled")


@pytest.mark.parametrize("ref", ["./nowhere", "nowhere/model.gguf", "/no/such/model", "a/b/c", ""])
def test_a_path_that_does_not_exist_is_refused_without_asking_the_hub(
    ref: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelSourceError, match=r"a model is \"embedded\", a hub id"):
        resolve(ref)


def test_a_hub_id_that_cannot_be_had_offline_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    offline_hub(monkeypatch, tmp_path)
    with pytest.raises(ModelSourceError, match="not in the local hub cache"):
        resolve("someone/something")
